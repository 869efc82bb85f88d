#include "oryx/eval/needle.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/progress.h"
#include "oryx/data/text_source.h"
#include "oryx/eval/task.h"
#include "oryx/generate/session.h"
#include "oryx/model/scheduling.h"

namespace oryx {

namespace {

constexpr const char* kQuestion = "question";
constexpr size_t kHayBytes = size_t{4} << 20;  // text read for the hay at most

void check_schedule(const ModelConfig& config, const std::string& schedule) {
  if (schedule != kQuestion) {
    ModelSchedule(config, schedule);
    return;
  }
  const auto mixers = config.mixers();
  if (std::find(mixers.begin(), mixers.end(), "attention") == mixers.end()) {
    fail("schedule 'question' puts the question into attention, but the model's mixers are {}", fmt::join(mixers, ", "));
  }
}

ModelSchedule schedule_for(const ModelConfig& config, const Tokenizer& tokenizer, const std::string& schedule, const NeedleExample& e) {
  if (schedule != kQuestion) return {config, schedule};
  const size_t question = tokenizer.encode("\n\n" + e.question).size();
  return {config, fmt::format("linear,attention@-{}:", question)};
}

// One example: prompt and answer go in, the logits before each answer token are compared with it.
void score(const LanguageModel& model, const Tokenizer& tokenizer, const NeedleExample& e, const NeedleEvaluation& o, NeedleResult& r) {
  const ModelSchedule schedule = schedule_for(model.config(), tokenizer, o.schedule, e);
  std::vector<int32_t> ids = e.ids;
  ids.insert(ids.end(), e.answer_ids.begin(), e.answer_ids.end() - 1);
  const auto answer = static_cast<int64_t>(e.answer_ids.size()), tokens = static_cast<int64_t>(ids.size());
  Session session(model, schedule, {static_cast<int64_t>(e.ids.size()), tokens, o.prefill_piece, o.seed});
  const at::Tensor hidden = session.extend(ids, answer);                                                    // [A, D]
  const at::Tensor log_p = model.logits(hidden).to(at::kFloat).log_softmax(-1);                             // [A, V]
  const at::Tensor wanted = at::tensor(std::vector<int64_t>(e.answer_ids.begin(), e.answer_ids.end()), at::kLong).to(log_p.device());  // [A]
  const double sum = -log_p.gather(1, wanted.unsqueeze(1)).sum(at::kDouble).item<double>();
  if (!std::isfinite(sum)) fail("needle: schedule '{}' gives logits that are not finite; the model's weights are damaged", o.schedule);
  r.nll_sum += sum;
  r.answer_tokens += answer;
  r.prompt_tokens += static_cast<int64_t>(e.ids.size());
  r.attention_share += session.attention_share();
  r.correct += at::equal(log_p.argmax(-1), wanted) ? 1 : 0;
  ++r.examples;
}

}  // namespace

NeedleResult evaluate_needle(const LanguageModel& model, const Tokenizer& tokenizer, const NeedleTask& task, const NeedleEvaluation& o) {
  at::NoGradGuard no_grad;
  check_schedule(model.config(), o.schedule);
  if (o.examples < 1 || o.prefill_piece < 1) fail("needle: {} examples in pieces of {}, expected at least one of each", o.examples, o.prefill_piece);
  NeedleResult r;
  for (int64_t i = 0; i < o.examples; ++i) {
    score(model, tokenizer, task.example(o.length, o.depth, o.seed, o.first_index + static_cast<uint64_t>(i)), o, r);
    if (o.progress) o.progress(r.examples, r.accuracy());
  }
  r.attention_share /= static_cast<double>(r.examples);
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
    f.add("kind", kind_, "the hay", {{"noise", NeedleKind::noise}, {"essay_number", NeedleKind::essay_number}, {"essay_word", NeedleKind::essay_word}});
    f.add("hay", hay_, "text for the essay kinds: a .txt or .jsonl, or a folder of them");
    f.add("examples", examples_, "prompts for each length and depth", at_least(1));
    f.add("piece", piece_, "tokens of one pass over the prompt at most", at_least(1));
    f.add("seed", seed_, "of the prompts", at_least(0));
  }

  EvalTable run(const EvalSubject& subject, const std::vector<std::string>& schedules) override {
    if (subject.tokenizer == nullptr) fail("{}: has no tokeniser, which needle-in-a-haystack is written with", subject.name);
    if (kind_ != NeedleKind::noise && hay_.empty()) fail("needle: --kind {} needs --hay, a folder of text", to_string(kind_));
    const auto& config = subject.model.config();
    auto list = schedules;
    if (list.empty()) {
      list = single_modes(config);
      if (has_attention_choice(config)) list.insert(list.begin(), kQuestion);
    }
    for (const auto& s : list) check_schedule(config, s);
    const NeedleTask task(*subject.tokenizer, kind_, kind_ == NeedleKind::noise ? std::vector<std::string>{} : read_hay(hay_));
    for (const int64_t length : lengths_) task.example(length, 0, static_cast<uint64_t>(seed_), 0);  // refused before the work begins
    EvalTable table{columns(), {}};
    for (const auto& s : list) {
      for (const int64_t length : lengths_) {
        for (const double depth : depths_) table.rows.push_back(evaluate(subject, task, s, length, depth));
      }
    }
    return table;
  }

 private:
  Json evaluate(const EvalSubject& subject, const NeedleTask& task, const std::string& schedule, int64_t length, double depth) const {
    ProgressBar bar(fmt::format("{}, {} tokens, depth {:g}", schedule, length, depth), examples_, "prompts");
    NeedleEvaluation e{.schedule = schedule, .length = length, .depth = depth, .examples = examples_, .seed = static_cast<uint64_t>(seed_)};
    e.prefill_piece = piece_;
    e.progress = [&](int64_t done, double accuracy) { bar.update(done, fmt::format("found {:.0f}%", 100 * accuracy)); };
    const NeedleResult r = evaluate_needle(subject.model, *subject.tokenizer, task, e);
    return {{"schedule", schedule},          {"length", length},       {"depth", depth},
            {"accuracy", r.accuracy()},      {"nats", r.nats()},       {"attention_share", r.attention_share},
            {"examples", r.examples},        {"prompt_tokens", static_cast<double>(r.prompt_tokens) / static_cast<double>(r.examples)}};
  }

  static std::vector<EvalColumn> columns() {
    return {{"schedule", "schedule", cell_text()},
            {"length", "length", cell_text()},
            {"depth", "depth", cell_text()},
            {"accuracy", "found", cell_percent()},
            {"nats", "nats/token", cell_fixed(3)},
            {"attention_share", "attention", cell_percent()},
            {"examples", "prompts", cell_text()}};
  }

  std::vector<int64_t> lengths_{256, 512, 1024};
  std::vector<double> depths_{0, 0.25, 0.5, 0.75, 1};
  NeedleKind kind_ = NeedleKind::noise;
  std::string hay_;
  int64_t examples_ = 8, piece_ = 1024, seed_ = 0;
};

ORYX_EVAL_TASK(needle, "needle in a haystack by length, depth and mode schedule", NeedleEvalTask);

}  // namespace
}  // namespace oryx
