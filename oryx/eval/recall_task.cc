// `oryx eval recall`: associative recall by number of pairs, length and mode schedule.
#include "oryx/common/progress.h"
#include "oryx/eval/recall.h"
#include "oryx/eval/task.h"

namespace oryx {

namespace {

class RecallTask : public EvalTask {
 public:
  void describe(Fields& f) override {
    f.add("pairs", pairs_, "numbers of key-value pairs", at_least(1));
    f.add("lengths", lengths_, "tokens of a sequence, filled up with noise; 0: no noise", at_least(0));
    f.add("queries", task_.queries, "keys asked for at the end of a sequence", at_least(1));
    f.add("key_symbols", task_.key_symbols, "distinct keys", at_least(1));
    f.add("value_symbols", task_.value_symbols, "distinct values", at_least(2));
    f.add("filler_symbols", task_.filler_symbols, "distinct noise tokens", at_least(0));
    f.add("words", words_, "symbols are words of the model's tokeniser, as in text, behind bos; else symbol i is token i");
    f.add("examples", evaluation_.examples, "sequences of each kind", at_least(1));
    f.add("batch_size", evaluation_.batch_size, "sequences run at once", at_least(1));
    f.add("kv", kv_, "keys and values that a state holds: keep, drop, bounded:F+W or a policy, as surprise:budget=256 (docs/state.md)");
    f.add("seed", seed_, "of the sequences: one that training did not use", at_least(0));
  }

  void validate() const override {
    if (pairs_.empty() || lengths_.empty()) fail("recall: no {}, expected at least one", pairs_.empty() ? "pairs" : "lengths");
    StateOptions options;
    set_kv(options, kv_);
  }

  EvalTable run(const EvalSubject& subject, const std::vector<std::string>& schedules) override {
    const auto& config = subject.model.config();
    const auto list = schedules.empty() ? default_schedules(config) : schedules;
    for (const auto& s : list) RecallRouting(config, s);
    if (words_) {
      if (subject.tokenizer == nullptr) fail("{}: has no tokeniser to take words from", subject.name);
      evaluation_.symbols = word_symbols(*subject.tokenizer, task_.vocab_size(), kWordSeed);
      evaluation_.bos = subject.tokenizer->bos_id();
    }
    for (const int64_t pairs : pairs_) {
      for (const int64_t length : lengths_) {
        if (words_) check(kind(pairs, length));
        if (!words_) check_recall(config, kind(pairs, length));
      }
    }
    EvalTable table{columns(), {}};
    for (const auto& s : list) {
      for (const int64_t pairs : pairs_) {
        for (const int64_t length : lengths_) table.rows.push_back(evaluate(subject, s, kind(pairs, length)));
      }
    }
    return table;
  }

 private:
  static constexpr uint64_t kWordSeed = 1;  // which words are keys, values and filler: the same for every evaluation with one tokeniser

  static std::vector<std::string> default_schedules(const ModelConfig& config) {
    auto list = single_modes(config);
    if (has_attention_choice(config)) list.push_back("queries");
    return list;
  }

  RecallOptions kind(int64_t pairs, int64_t length) const {
    RecallOptions task = task_;
    task.pairs = pairs;
    task.length = length;
    return task;
  }

  Json evaluate(const EvalSubject& subject, const std::string& schedule, const RecallOptions& task) const {
    RecallEvaluation e = evaluation_;
    e.schedule = schedule;
    set_kv(e.state, kv_);
    e.seed = static_cast<uint64_t>(seed_);
    ProgressBar bar(fmt::format("{}, {} pairs", schedule, task.pairs), e.examples, "sequences");
    e.progress = [&](int64_t done, double accuracy) { bar.update(done, fmt::format("correct {:.1f}%", 100 * accuracy)); };
    const RecallResult r = evaluate_recall(subject.model, task, e);
    return {{"schedule", r.schedule},
            {"pairs", task.pairs},
            {"length", task.tokens() + (words_ ? 1 : 0)},
            {"words", words_},
            {"accuracy", r.accuracy()},
            {"nats", r.nats()},
            {"attention_share", r.attention_share},
            {"flops_per_token", r.flops_per_token},
            {"state_bytes", r.state_bytes},
            {"kv", kv_text(e.state)},
            {"queries", r.queries},
            {"seconds", r.seconds}};
  }

  static std::vector<EvalColumn> columns() {
    return {{"schedule", "schedule", cell_text()},
            {"pairs", "pairs", cell_text()},
            {"length", "length", cell_text()},
            {"accuracy", "correct", cell_percent()},
            {"nats", "nats", cell_fixed(4)},
            {"attention_share", "attention", cell_percent()},
            {"flops_per_token", "FLOPs/token", cell_count()},
            {"state_bytes", "state", cell_bytes()},
            {"queries", "queries", cell_text()}};
  }

  std::vector<int64_t> pairs_{4, 8, 16}, lengths_{0};
  bool words_ = false;
  std::string kv_ = "keep";
  RecallOptions task_;
  RecallEvaluation evaluation_;
  int64_t seed_ = static_cast<int64_t>(RecallEvaluation{}.seed);
};

ORYX_EVAL_TASK(recall, "accuracy on associative recall by pairs, length and mode schedule", RecallTask);

}  // namespace
}  // namespace oryx
