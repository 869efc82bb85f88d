#include "oryx/eval/choice.h"

#include <cmath>
#include <numeric>

#include "oryx/common/progress.h"

namespace oryx {

int64_t characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

std::string stripped(std::string_view text) {
  constexpr std::string_view kSpace = " \t\n\r\f\v";
  const size_t begin = text.find_first_not_of(kSpace), end = text.find_last_not_of(kSpace);
  return begin == std::string_view::npos ? "" : std::string(text.substr(begin, end - begin + 1));
}

ChoiceScore score_choices(const ChoiceItem& item, const std::vector<Likelihood>& l) {
  TORCH_CHECK(l.size() == item.requests.size() && !l.empty(), "choice: ", l.size(), " likelihoods of ", item.requests.size());
  ChoiceScore score;
  if (l.size() == 1) {
    score.acc = l[0].greedy ? 1 : 0;
    score.log_p = l[0].log_p;
    return score;
  }
  TORCH_CHECK(item.choices.size() == l.size(), "choice: ", item.choices.size(), " texts for ", l.size());
  const auto best_is_gold = [&](auto length) {
    size_t best = 0;
    double most = l[0].log_p / length(0);
    for (size_t i = 1; i < l.size(); ++i) {
      const double here = l[i].log_p / length(i);
      if (here > most) most = here, best = i;
    }
    return static_cast<int64_t>(best) == item.gold ? 1.0 : 0.0;
  };
  score.acc = best_is_gold([](size_t) { return 1.0; });
  score.acc_norm = best_is_gold([&](size_t i) { return static_cast<double>(characters(item.choices[i])); });
  score.acc_bytes = best_is_gold([&](size_t i) { return static_cast<double>(item.choices[i].size()); });
  score.log_p = l[static_cast<size_t>(item.gold)].log_p;
  return score;
}

void ChoiceTask::describe(Fields& f) {
  if (split_.empty()) split_ = default_split();
  f.add("data", data_, "the folder of the tasks: holds " + folder() + "/SPLIT.jsonl, or .jsonl.zst");
  f.add("split", split_, "which of the task's files");
  f.add("limit", limit_, "examples scored, the first ones; 0: all", at_least(0));
  f.add("batch_tokens", batch_tokens_, "tokens of one pass, several sequences packed", at_least(1));
  f.add("seed", seed_, "of random schedules", at_least(0));
}

EvalTable ChoiceTask::run(const EvalSubject& subject, const std::vector<std::string>& schedules) {
  if (subject.tokenizer == nullptr) fail("{}: has no tokeniser to read text with; give one with --tokenizer", subject.name);
  const auto& config = subject.model.config();
  std::vector<ModelSchedule> parsed;  // all of them before any work
  for (const auto& s : schedules.empty() ? single_modes(config) : schedules) parsed.emplace_back(config, s);
  std::filesystem::path data = data_;
  if (!data_.empty()) data /= folder();
  std::vector<ChoiceItem> items;
  for (const Example& example : read_examples(data, split_, "--data", limit_)) {
    items.push_back(item(example));
    const ChoiceItem& last = items.back();
    if (last.requests.empty() || last.gold < 0 || last.gold >= static_cast<int64_t>(last.requests.size())) {
      fail("{}: the right answer is number {} of {} choices", example.where(), last.gold, last.requests.size());
    }
    for (const auto& choice : last.choices) {
      if (choice.empty()) fail("{}: a choice without text", example.where());
    }
  }
  EvalTable table{columns(), {}};
  for (const auto& s : parsed) table.rows.push_back(evaluate(subject, s, items));
  return table;
}

Json ChoiceTask::evaluate(const EvalSubject& subject, const ModelSchedule& schedule, const std::vector<ChoiceItem>& items) const {
  std::vector<TokenPair> pairs;
  for (const ChoiceItem& item : items) {
    for (const auto& [context, continuation] : item.requests) pairs.push_back(encode_pair(*subject.tokenizer, context, continuation));
  }
  ProgressBar bar(schedule.text(), static_cast<int64_t>(pairs.size()), "texts");
  LikelihoodOptions options{.batch_tokens = batch_tokens_, .seed = static_cast<uint64_t>(seed_)};
  options.progress = [&](int64_t done) { bar.update(done); };
  EvalCost cost;
  const auto likelihoods = score_pairs(subject.model, schedule, pairs, options, cost);
  bar.finish();
  std::vector<double> acc, acc_norm, acc_bytes, log_p;
  size_t at = 0;
  for (const ChoiceItem& item : items) {
    const auto begin = likelihoods.begin() + static_cast<int64_t>(at);
    const ChoiceScore s = score_choices(item, {begin, begin + static_cast<int64_t>(item.requests.size())});
    at += item.requests.size();
    acc.push_back(s.acc);
    acc_norm.push_back(s.acc_norm);
    acc_bytes.push_back(s.acc_bytes);
    log_p.push_back(s.log_p);
  }
  const Spread a = spread_of(acc), n = spread_of(acc_norm), b = spread_of(acc_bytes), l = spread_of(log_p);
  Json row = {{"schedule", schedule.text()}, {"acc", a.mean}, {"acc_stderr", a.stderr_of_mean}};
  if (normalised()) {
    row.update({{"acc_norm", n.mean}, {"acc_norm_stderr", n.stderr_of_mean}, {"acc_bytes", b.mean}, {"acc_bytes_stderr", b.stderr_of_mean}});
  }
  row.update({{"nats", -l.mean},
              {"attention_share", cost.attention_share},
              {"flops_per_token", cost.flops_per_token},
              {"state_bytes", static_cast<int64_t>(std::llround(cost.state_bytes))},
              {"examples", static_cast<int64_t>(items.size())}});
  return row;
}

std::vector<EvalColumn> ChoiceTask::columns() const {
  std::vector<EvalColumn> c = {{"schedule", "schedule", cell_text()}, {"acc", "acc", cell_percent()}, {"acc_stderr", "stderr", cell_percent()}};
  if (normalised()) {
    c.insert(c.end(), {{"acc_norm", "acc_norm", cell_percent()}, {"acc_norm_stderr", "stderr", cell_percent()}, {"acc_bytes", "acc_bytes", cell_percent()}});
  }
  c.insert(c.end(), {{"nats", "nats/answer", cell_fixed(3)},
                     {"attention_share", "attention", cell_percent()},
                     {"flops_per_token", "FLOPs/token", cell_count()},
                     {"state_bytes", "state", cell_bytes()},
                     {"examples", "examples", cell_text()}});
  return c;
}

}  // namespace oryx
