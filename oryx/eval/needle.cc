#include "oryx/eval/needle.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/progress.h"
#include "oryx/data/text_source.h"
#include "oryx/eval/completion.h"
#include "oryx/eval/task.h"
#include "oryx/model/scheduling.h"

namespace oryx {

namespace {

constexpr size_t kHayBytes = size_t{4} << 20;  // text read for the hay at most

int64_t needle_question_tokens(const Tokenizer& tokenizer, const NeedleExample& e) { return static_cast<int64_t>(tokenizer.encode("\n\n" + e.question).size()); }

PromptParts needle_parts(const NeedleExample& e, int64_t question) {
  const auto length = static_cast<int64_t>(e.ids.size());
  return {{"question", {{length - question, length}}}, {"needle", {{e.needle_begin, e.needle_end}}}};
}

// One example: prompt and answer go in, the logits before each answer token are compared with it.
void score(const LanguageModel& model, const Tokenizer& tokenizer, const NeedleExample& e, const NeedleEvaluation& o, NeedleResult& r) {
  const auto length = static_cast<int64_t>(e.ids.size()), question = needle_question_tokens(tokenizer, e);
  const ModelSchedule schedule = question_schedule(model.config(), o.schedule, question);
  std::vector<int32_t> ids = e.ids;
  ids.insert(ids.end(), e.answer_ids.begin(), e.answer_ids.end() - 1);
  const auto answer = static_cast<int64_t>(e.answer_ids.size()), tokens = static_cast<int64_t>(ids.size());
  SessionOptions options{length, tokens, o.prefill_piece, o.seed, o.state};
  options.facts = gather_facts(model, schedule, e.ids, needle_parts(e, question));
  Session session(model, schedule, options);
  const at::Tensor hidden = session.extend(ids, answer);                                                    // [A, D]
  const at::Tensor log_p = model.logits(hidden).to(at::kFloat).log_softmax(-1);                             // [A, V]
  const at::Tensor wanted = at::tensor(std::vector<int64_t>(e.answer_ids.begin(), e.answer_ids.end()), at::kLong).to(log_p.device());  // [A]
  const double sum = -log_p.gather(1, wanted.unsqueeze(1)).sum(at::kDouble).item<double>();
  if (!std::isfinite(sum)) fail("needle: schedule '{}' gives logits that are not finite; the model's weights are damaged", o.schedule);
  r.nll_sum += sum;
  r.answer_tokens += answer;
  r.prompt_tokens += static_cast<int64_t>(e.ids.size());
  ModePiece piece{.row = 0, .column = 0, .length = tokens, .start = 0, .context = {}};
  piece.context.prompt_length = length;
  piece.context.seed = o.seed;
  piece.context.facts = session.facts();
  r.cost.add(model, schedule.route({piece}, 1, tokens), tokens, o.state, first_pass_flops(model.config(), schedule, length));
  r.correct += at::equal(log_p.argmax(-1), wanted) ? 1 : 0;
  ++r.examples;
}

// The same of many examples, packed: all tokens of a prompt are read in one call, over a state where it does not keep everything. No more of them stand in memory
// than one pass takes.
void score_needles(const LanguageModel& model, const Tokenizer& tokenizer, const std::function<NeedleExample(int64_t)>& example, const NeedleEvaluation& o, NeedleResult& r) {
  const ModelSchedule schedule(model.config(), o.schedule == kQuestionSchedule ? "linear,part(attention=question),attention@gen" : o.schedule);
  LikelihoodOptions options{.batch_tokens = o.batch_tokens, .seed = o.seed, .state = o.state};
  std::vector<TokenPair> pairs;
  int64_t together = 0;
  const auto score_all = [&] {
    options.first = static_cast<uint64_t>(r.examples);
    for (const Likelihood& l : score_pairs(model, schedule, pairs, options, r.cost)) {
      r.nll_sum -= l.log_p;
      r.correct += l.greedy ? 1 : 0;
      ++r.examples;
    }
    pairs.clear();
    together = 0;
    if (o.progress) o.progress(r.examples, r.accuracy());
  };
  for (int64_t i = 0; i < o.examples; ++i) {
    const NeedleExample e = example(i);
    const auto answer = static_cast<int64_t>(e.answer_ids.size()), tokens = static_cast<int64_t>(e.ids.size()) + answer - 1;
    if (!pairs.empty() && together + tokens > o.batch_tokens) score_all();
    pairs.push_back({e.ids, e.answer_ids, gather_facts(model, schedule, e.ids, needle_parts(e, needle_question_tokens(tokenizer, e)), e.answer_ids)});
    together += tokens;
    r.answer_tokens += answer;
    r.prompt_tokens += static_cast<int64_t>(e.ids.size());
  }
  score_all();
}

}  // namespace

NeedleResult evaluate_needle(const LanguageModel& model, const Tokenizer& tokenizer, const NeedleTask& task, const NeedleEvaluation& o) {
  at::NoGradGuard no_grad;
  check_question_schedule(model.config(), o.schedule);
  if (o.examples < 1 || o.prefill_piece < 1) fail("needle: {} examples in pieces of {}, expected at least one of each", o.examples, o.prefill_piece);
  NeedleResult r;
  const auto example = [&](int64_t i) { return task.example(o.length, o.depth, o.seed, o.first_index + static_cast<uint64_t>(i)); };
  if (o.length <= o.batch_tokens && !o.state.drop_rows) {
    score_needles(model, tokenizer, example, o, r);
    return r;
  }
  for (int64_t i = 0; i < o.examples; ++i) {
    score(model, tokenizer, example(i), o, r);
    if (o.progress) o.progress(r.examples, r.accuracy());
  }
  return r;
}

namespace {

std::vector<std::string> read_hay(const std::string& path) {
  TextSource source(list_text_files(path));
  std::vector<std::string> documents;
  size_t bytes = 0;
  for (Document d; bytes < kHayBytes && source.next(d);) {
    bytes += d.text.size();
    documents.push_back(std::move(d.text));
  }
  return documents;
}

class NeedleEvalTask : public EvalTask {
 public:
  void describe(Fields& f) override {
    f.add("lengths", lengths_, "tokens of the prompt at most", at_least(1));
    f.add("depths", depths_, "where the needle stands: 0 the beginning, 1 the end of the hay", between(0, 1));
    f.add("kind", kinds_, "the haystacks", one_of({"noise", "essay_number", "essay_word"}));
    f.add("hay", hay_, "text for the essay kinds: a .txt or .jsonl, or a folder of them");
    f.add("examples", examples_, "prompts for each length and depth", at_least(1));
    f.add("kv", kv_, "keys and values that the state holds: keep, drop, bounded:F+W or a policy, as surprise:budget=256 (docs/state.md)");
    f.add("batch_tokens", batch_tokens_, "tokens of one pass, several prompts packed; longer prompts, and all with --kv drop, run one at a time", at_least(0));
    f.add("piece", piece_, "tokens of one pass over a prompt that runs alone", at_least(1));
    f.add("seed", seed_, "of the prompts", at_least(0));
  }

  EvalTable run(const EvalSubject& subject, const std::vector<std::string>& schedules) override {
    if (subject.tokenizer == nullptr) fail("{}: has no tokeniser, which needle-in-a-haystack is written with", subject.name);
    std::vector<std::string> hay;
    for (const auto& kind : kinds_) {
      if (kind == "noise" || !hay.empty()) continue;
      if (hay_.empty()) fail("needle: --kind {} needs --hay, a folder of text", kind);
      hay = read_hay(hay_);
    }
    const auto& config = subject.model.config();
    const auto list = schedules.empty() ? question_schedules(config) : schedules;
    for (const auto& s : list) check_question_schedule(config, s);
    std::vector<NeedleTask> tasks;
    for (const auto& kind : kinds_) {
      tasks.emplace_back(*subject.tokenizer, parse_needle_kind(kind), kind == "noise" ? std::vector<std::string>{} : hay);
      for (const int64_t length : lengths_) tasks.back().example(length, 0, static_cast<uint64_t>(seed_), 0);  // refused before the work begins
    }
    EvalTable table{columns(), {}};
    for (const auto& s : list) {
      for (size_t k = 0; k < kinds_.size(); ++k) {
        for (const int64_t length : lengths_) {
          for (const double depth : depths_) table.rows.push_back(evaluate(subject, tasks[k], kinds_[k], s, length, depth));
        }
      }
    }
    return table;
  }

  void validate() const override {
    if (kinds_.empty()) fail("needle: no kind of haystack");
    if (lengths_.empty() || depths_.empty()) fail("needle: no {}, expected at least one", lengths_.empty() ? "lengths" : "depths");
    (void)state();
  }

 private:
  StateOptions state() const {
    StateOptions options;
    set_kv(options, kv_);
    return options;
  }

  Json evaluate(const EvalSubject& subject, const NeedleTask& task, const std::string& kind, const std::string& schedule, int64_t length, double depth) const {
    ProgressBar bar(fmt::format("{}, {}, {} tokens, depth {:g}", schedule, kind, length, depth), examples_, "prompts");
    NeedleEvaluation e{.schedule = schedule, .length = length, .depth = depth, .examples = examples_, .seed = static_cast<uint64_t>(seed_)};
    e.prefill_piece = piece_;
    e.batch_tokens = batch_tokens_;
    e.state = state();
    e.progress = [&](int64_t done, double accuracy) { bar.update(done, fmt::format("found {:.0f}%", 100 * accuracy)); };
    const NeedleResult r = evaluate_needle(subject.model, *subject.tokenizer, task, e);
    const double p = r.accuracy(), n = static_cast<double>(r.examples);
    return {{"schedule", schedule},
            {"kind", kind},
            {"length", length},
            {"depth", depth},
            {"accuracy", p},
            {"accuracy_stderr", n > 1 ? std::sqrt(p * (1 - p) / (n - 1)) : 0.0},
            {"nats", r.nats()},
            {"attention_share", r.cost.attention_share},
            {"flops_per_token", r.cost.flops_per_token},
            {"state_bytes", static_cast<int64_t>(std::llround(r.cost.state_bytes))},
            {"kv", kv_text(e.state)},
            {"examples", r.examples},
            {"prompt_tokens", static_cast<double>(r.prompt_tokens) / n}};
  }

  static std::vector<EvalColumn> columns() {
    return {{"schedule", "schedule", cell_text()},
            {"kind", "hay", cell_text()},
            {"length", "length", cell_text()},
            {"depth", "depth", cell_text()},
            {"accuracy", "found", cell_percent()},
            {"nats", "nats/token", cell_fixed(3)},
            {"attention_share", "attention", cell_percent()},
            {"flops_per_token", "FLOPs/token", cell_count()},
            {"state_bytes", "state", cell_bytes()},
            {"examples", "prompts", cell_text()}};
  }

  std::vector<int64_t> lengths_{256, 512, 1024};
  std::vector<double> depths_{0, 0.25, 0.5, 0.75, 1};
  std::vector<std::string> kinds_{"noise"};
  std::string hay_, kv_ = "keep";
  int64_t examples_ = 8, batch_tokens_ = 4096, piece_ = 1024, seed_ = 0;
};

ORYX_EVAL_TASK(needle, "needle in a haystack by length, depth and mode schedule", NeedleEvalTask);

}  // namespace
}  // namespace oryx
