#include "oryx/eval/completion.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cctype>
#include <cmath>

#include "oryx/common/interrupt.h"
#include "oryx/common/progress.h"
#include "oryx/generate/greedy_batch.h"
#include "oryx/generate/sampling.h"

namespace oryx {

bool contains_answer(std::string_view completion, const std::vector<std::string>& answers) {
  const auto same = [](char a, char b) { return std::tolower(static_cast<unsigned char>(a)) == std::tolower(static_cast<unsigned char>(b)); };
  return std::any_of(answers.begin(), answers.end(), [&](const std::string& answer) {
    return std::search(completion.begin(), completion.end(), answer.begin(), answer.end(), same) != completion.end() || answer.empty();
  });
}

void check_question_schedule(const ModelConfig& config, const std::string& schedule) {
  if (schedule != kQuestionSchedule) {
    ModelSchedule(config, schedule);
    return;
  }
  const auto mixers = config.mixers();
  if (std::find(mixers.begin(), mixers.end(), "attention") == mixers.end()) {
    fail("schedule 'question' puts the question into attention, but the model's mixers are {}", fmt::join(mixers, ", "));
  }
}

ModelSchedule question_schedule(const ModelConfig& config, const std::string& schedule, int64_t question_tokens) {
  if (schedule != kQuestionSchedule) return {config, schedule};
  return {config, fmt::format("linear,attention@-{}:", question_tokens)};
}

std::vector<std::string> question_schedules(const ModelConfig& config) {
  auto list = single_modes(config);
  if (has_attention_choice(config)) list.insert(list.begin(), kQuestionSchedule);
  return list;
}

void CompletionTask::describe(Fields& f) {
  f.add("data", data_, "the folder of the tasks: holds " + folder() + "/" + file() + ".jsonl, or .jsonl.zst");
  describe_more(f);
  f.add("limit", limit_, "examples, the first ones; 0: all", at_least(0));
  f.add("max_new_tokens", max_new_tokens_, "of a completion, which ends at a line's end too", at_least(1));
  f.add("max_prompt_tokens", max_prompt_tokens_, "longer prompts lose the beginning of their text; 0: none does", at_least(0));
  f.add("kv", kv_, "keys and values that the state holds: keep, drop, bounded:F+W or a policy, as surprise:budget=256 (docs/state.md)");
  f.add("batch_tokens", batch_tokens_, "tokens of prompts that run side by side; a longer one runs alone", at_least(0));
  f.add("piece", piece_, "tokens of one pass over a prompt that runs alone", at_least(1));
  f.add("seed", seed_, "of random schedules", at_least(0));
}

void CompletionTask::validate() const { (void)state(); }

StateOptions CompletionTask::state() const {
  StateOptions options;
  set_kv(options, kv_);
  return options;
}

EvalTable CompletionTask::run(const EvalSubject& subject, const std::vector<std::string>& schedules) {
  if (subject.tokenizer == nullptr) fail("{}: has no tokeniser to read text with; give one with --tokenizer", subject.name);
  const auto& config = subject.model.config();
  const auto list = schedules.empty() ? question_schedules(config) : schedules;
  for (const auto& s : list) check_question_schedule(config, s);
  std::filesystem::path data = data_;
  if (!data_.empty()) data /= folder();
  std::vector<CompletionItem> items;
  std::vector<Prompt> prompts;
  for (const Example& example : read_examples(data, file(), "--data", limit_)) {
    items.push_back(item(example));
    if (items.back().answers.empty()) fail("{}: no answer", example.where());
    auto ids = subject.tokenizer->encode_prompt(items.back().context);
    const auto question = subject.tokenizer->encode(items.back().question);
    if (max_prompt_tokens_ > 0) {
      const int64_t room = max_prompt_tokens_ - static_cast<int64_t>(question.size());
      if (room < 1) fail("{}: the question takes {} tokens, max_prompt_tokens is {}", example.where(), question.size(), max_prompt_tokens_);
      const int64_t over = static_cast<int64_t>(ids.size()) - room;
      if (over > 0) ids.erase(ids.begin() + 1, ids.begin() + 1 + over);  // bos stays
    }
    ids.insert(ids.end(), question.begin(), question.end());
    prompts.push_back({std::move(ids), static_cast<int64_t>(question.size())});
  }
  EvalTable table{{{"schedule", "schedule", cell_text()},
                   {"contains", "contains", cell_percent()},
                   {"contains_stderr", "stderr", cell_percent()},
                   {"attention_share", "attention", cell_percent()},
                   {"flops_per_token", "FLOPs/token", cell_count()},
                   {"state_bytes", "state", cell_bytes()},
                   {"prompt_tokens", "prompt", cell_fixed(0)},
                   {"examples", "examples", cell_text()}},
                  {}};
  for (const auto& s : list) table.rows.push_back(evaluate(subject, s, items, prompts));
  return table;
}

namespace {

// Greedy text up to a line's end or eos.
class CompletedText {
 public:
  CompletedText(const Tokenizer& tokenizer, const std::vector<int32_t>& prompt) : tokenizer_(tokenizer), decoder_(tokenizer) {
    for (const int32_t id : prompt) decoder_.add(id);
  }

  // False when that was the end.
  bool add(int32_t id) {
    if (id == tokenizer_.eos_id()) return false;
    text_ += decoder_.add(id);
    // A space or a line's end before the first word is no end.
    const size_t begin = text_.find_first_not_of(" \n"), end = begin == std::string::npos ? begin : text_.find('\n', begin);
    if (end == std::string::npos) {
      ++tokens_;
      return true;
    }
    text_.resize(end);
    ended_ = true;
    return false;
  }
  std::string finish() { return text_ + (ended_ ? "" : decoder_.finish()); }
  int64_t tokens() const { return tokens_; }  // behind which more was wanted

 private:
  const Tokenizer& tokenizer_;
  StreamDecoder decoder_;
  std::string text_;
  int64_t tokens_ = 0;
  bool ended_ = false;
};

}  // namespace

void CompletionTask::count(const EvalSubject& subject, const ModelSchedule& schedule, const Prompt& prompt, const std::shared_ptr<const TokenFacts>& facts,
                           size_t sequence, int64_t tokens, EvalCost& cost) const {
  const auto length = static_cast<int64_t>(prompt.ids.size());
  ModePiece piece{.row = 0, .column = 0, .length = tokens, .start = 0, .context = {}};
  piece.context.prompt_length = length;
  piece.context.seed = static_cast<uint64_t>(seed_);
  piece.context.sequence = sequence;
  piece.context.facts = facts;
  cost.add(subject.model, schedule.route({piece}, 1, tokens), tokens, state(), first_pass_flops(subject.model.config(), schedule, length));
}

std::string CompletionTask::complete_alone(const EvalSubject& subject, const std::string& name, const Prompt& prompt, EvalCost& cost) const {
  const at::NoGradGuard no_grad;
  const Tokenizer& tokenizer = *subject.tokenizer;
  const ModelSchedule schedule = question_schedule(subject.model.config(), name, prompt.question_tokens);
  const auto length = static_cast<int64_t>(prompt.ids.size());
  SessionOptions options{length, length + max_new_tokens_, piece_, static_cast<uint64_t>(seed_), state()};
  options.facts = gather_facts(subject.model, schedule, prompt.ids, {{"question", {{length - prompt.question_tokens, length}}}});
  Session session(subject.model, schedule, options);
  CompletedText text(tokenizer, prompt.ids);
  at::Tensor hidden = session.extend(prompt.ids);
  for (int64_t i = 0; i < max_new_tokens_; ++i) {
    const at::Tensor logits = subject.model.logits(hidden).squeeze(0).narrow(0, 0, tokenizer.vocab_size());
    const auto next = static_cast<int32_t>(sample_token(logits, {}, static_cast<uint64_t>(session.length())));
    if (!text.add(next)) break;
    if (i + 1 < max_new_tokens_) hidden = session.extend({&next, 1});
  }
  count(subject, schedule, prompt, session.facts(), 0, session.length(), cost);
  return text.finish();
}

std::vector<std::string> CompletionTask::complete(const EvalSubject& subject, const std::string& name, const std::vector<Prompt>& prompts, size_t first, size_t last,
                                                  EvalCost& cost) const {
  if (last - first == 1) return {complete_alone(subject, name, prompts[first], cost)};
  // One schedule for prompts whose questions differ in length.
  const ModelSchedule schedule(subject.model.config(), name == kQuestionSchedule ? "linear,part(attention=question),attention@gen" : name);
  std::vector<BatchPrompt> batch;
  std::vector<CompletedText> texts;
  for (size_t i = first; i < last; ++i) {
    const auto length = static_cast<int64_t>(prompts[i].ids.size());
    batch.push_back({prompts[i].ids, gather_facts(subject.model, schedule, prompts[i].ids, {{"question", {{length - prompts[i].question_tokens, length}}}})});
    texts.emplace_back(*subject.tokenizer, prompts[i].ids);
  }
  const GreedyBatchOptions options{max_new_tokens_, subject.tokenizer->vocab_size(), static_cast<uint64_t>(seed_), state()};
  generate_greedily(subject.model, schedule, batch, options, [&](size_t i, int32_t id) { return texts[i].add(id); });
  std::vector<std::string> out;
  for (size_t i = 0; i < texts.size(); ++i) {
    // The last token of a completion is not read.
    const auto read = static_cast<int64_t>(batch[i].ids.size()) + std::min(texts[i].tokens(), max_new_tokens_ - 1);
    count(subject, schedule, prompts[first + i], batch[i].facts, i, read, cost);
    out.push_back(texts[i].finish());
  }
  return out;
}

Json CompletionTask::evaluate(const EvalSubject& subject, const std::string& schedule, const std::vector<CompletionItem>& items,
                              const std::vector<Prompt>& prompts) const {
  ProgressBar bar(schedule, static_cast<int64_t>(items.size()), "examples");
  EvalCost cost;
  std::vector<double> found;
  double tokens = 0, hits = 0;
  for (size_t first = 0; first < items.size();) {
    check_interrupt();
    size_t last = first;
    int64_t together = 0;
    const auto size = [&](size_t i) { return static_cast<int64_t>(prompts[i].ids.size()); };
    while (last < items.size() && (last == first || together + size(last) <= batch_tokens_)) together += size(last++);
    const auto texts = complete(subject, schedule, prompts, first, last, cost);
    for (size_t i = first; i < last; ++i) {
      found.push_back(contains_answer(texts[i - first], items[i].answers) ? 1 : 0);
      hits += found.back();
      tokens += static_cast<double>(size(i));
    }
    first = last;
    bar.update(static_cast<int64_t>(first), fmt::format("found {:.0f}%", 100 * hits / static_cast<double>(first)));
  }
  bar.finish();
  const Spread s = spread_of(found);
  return {{"schedule", schedule},
          {"contains", s.mean},
          {"contains_stderr", s.stderr_of_mean},
          {"attention_share", cost.attention_share},
          {"flops_per_token", cost.flops_per_token},
          {"state_bytes", static_cast<int64_t>(std::llround(cost.state_bytes))},
          {"kv", kv_text(state())},
          {"prompt_tokens", tokens / static_cast<double>(items.size())},
          {"examples", static_cast<int64_t>(items.size())}};
}

}  // namespace oryx
