// `oryx eval perplexity`: text perplexity by mode schedule.
#include <algorithm>

#include "oryx/common/progress.h"
#include "oryx/eval/eval_text.h"
#include "oryx/eval/perplexity.h"
#include "oryx/eval/task.h"

namespace oryx {

namespace {

class PerplexityTask : public EvalTask {
 public:
  void describe(Fields& f) override {
    f.add("data", data_, "a data set (its held-out part is scored), a .tok file, or text: a .txt or .jsonl, or a folder of them");
    f.add("seq_len", seq_len_, "tokens of a window at most; documents are cut into windows", at_least(1));
    f.add("batch_tokens", batch_tokens_, "tokens scored at once at most; 0: one window", at_least(0));
    f.add("max_tokens", max_tokens_, "stop after the document that reaches so many; 0: score all", at_least(0));
    f.add("chunk", chunk_, "chunk of the default list's random schedules", at_least(1));
    f.add("kv", kv_, "keys and values that a state holds: keep, bounded:F+W or a policy, as surprise:budget=256 (docs/state.md)");
    f.add("seed", seed_, "of random schedules", at_least(0));
  }

  void validate() const override {
    StateOptions state;
    set_kv(state, kv_);
  }

  EvalTable run(const EvalSubject& subject, const std::vector<std::string>& schedules) override {
    if (data_.empty()) fail("perplexity: --data is missing; give a data set, a .tok file or a folder of text");
    const auto& config = subject.model.config();
    std::vector<ModelSchedule> parsed;  // all of them before any work
    for (const auto& s : schedules.empty() ? default_schedules(config) : schedules) parsed.emplace_back(config, s);
    for (const auto& s : parsed) {
      for (const auto& need : s.needs()) {
        if (need.starts_with("part:")) fail("schedule '{}': part '{}' of the prompt is not known here; known: none (perplexity has no questions: oryx sweep takes --setting parts=false)", s.text(), need.substr(5));
      }
    }
    const EvalText text = open_text(subject, data_, max_tokens_);
    EvalReader reader(text.tokens, {.seq_len = seq_len_, .tokens_per_batch = batch_tokens_, .max_tokens = static_cast<uint64_t>(max_tokens_)});
    EvalTable table{columns(), {}};
    for (const auto& s : parsed) table.rows.push_back(evaluate(subject, text, s, reader));
    return table;
  }

 private:
  std::vector<std::string> default_schedules(const ModelConfig& config) const {
    auto list = single_modes(config);
    if (!has_attention_choice(config)) return list;
    for (const char* share : {"0.05", "0.1", "0.25", "0.5"}) list.push_back(fmt::format("random(attention={};chunk={})", share, chunk_));
    list.push_back("linear,attention@90%:");
    return list;
  }

  Json evaluate(const EvalSubject& subject, const EvalText& text, const ModelSchedule& schedule, EvalReader& reader) const {
    auto total = static_cast<int64_t>(text.tokens->tokens() - text.tokens->documents());
    if (max_tokens_ > 0) total = std::min(total, max_tokens_);
    ProgressBar bar(schedule.text(), total, "tokens");
    PerplexityOptions options;
    options.seed = static_cast<uint64_t>(seed_);
    set_kv(options.state, kv_);
    options.tokenizer = text.tokenizer;
    options.progress = [&](int64_t targets, double nats) { bar.update(targets, fmt::format("nats {:.4f}", nats)); };
    const auto r = evaluate_perplexity(subject.model, schedule, reader, options);
    const auto bits = r.bits_per_byte();
    return {{"schedule", r.schedule},
            {"attention_share", r.attention_share},
            {"nats", r.nats()},
            {"perplexity", r.perplexity()},
            {"bits_per_byte", bits ? Json(*bits) : Json(nullptr)},
            {"flops_per_token", r.flops_per_token},
            {"state_bytes", r.state_bytes},
            {"kv", kv_text(options.state)},
            {"targets", r.targets},
            {"text_bytes", r.text_bytes},
            {"windows", r.windows},
            {"longest_window", r.longest},
            {"seconds", r.seconds}};
  }

  static std::vector<EvalColumn> columns() {
    return {{"schedule", "schedule", cell_text()},
            {"attention_share", "attention", cell_percent()},
            {"nats", "nats", cell_fixed(4)},
            {"perplexity", "perplexity", cell_fixed(3)},
            {"bits_per_byte", "bits/byte", cell_fixed(4)},
            {"flops_per_token", "FLOPs/token", cell_count()},
            {"state_bytes", "state", cell_bytes()},
            {"targets", "tokens", cell_text()},
            {"seconds", "seconds", cell_fixed(1)}};
  }

  std::string data_, kv_ = "keep";
  int64_t seq_len_ = 1024, batch_tokens_ = 0, max_tokens_ = 0, chunk_ = 64, seed_ = 0;
};

ORYX_EVAL_TASK(perplexity, "perplexity of text by mode schedule", PerplexityTask);

}  // namespace
}  // namespace oryx
