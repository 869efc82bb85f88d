// Accuracy on multi-query associative recall (oryx/data/synthetic.h) under a mode schedule.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "oryx/data/synthetic.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/language_model.h"
#include "oryx/model/routing.h"
#include "oryx/modes/schedule.h"

namespace oryx {

// Which tokens of a recall batch take which mixer: a schedule's text, or "queries": attention at the keys that are asked for and
// the model's first mixer everywhere else. Throws Error for a bad schedule, and for "queries" when the model has no attention.
class RecallRouting {
 public:
  RecallRouting(const ModelConfig& config, const std::string& schedule);
  ~RecallRouting();
  RecallRouting(RecallRouting&&) noexcept;
  // For ModelInput::routing. Row b of the batch is sequence `first_sequence` + b of a random schedule's draws; facts[b] is known of it (empty: nothing is).
  std::vector<std::shared_ptr<const Routing>> route(const RecallBatch& batch, uint64_t seed, uint64_t step, uint64_t first_sequence,
                                                    const std::vector<std::shared_ptr<const TokenFacts>>& facts = {}) const;
  // What a schedule needs of a batch (ModelSchedule::needs), by row: the parts "question", the keys that are asked for, and "needle", the pairs that answer them; and the scores
  // of a first pass. Empty where it needs nothing.
  std::vector<std::shared_ptr<const TokenFacts>> facts(const LanguageModel& model, const RecallBatch& batch) const;
  double first_pass_flops(const ModelConfig& config, int64_t length) const;  // of a sequence, for facts()
  const std::string& text() const;

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

struct RecallEvaluation {
  std::string schedule = "attention";  // as RecallRouting takes it
  uint64_t seed = 0x6576616c;          // of the examples: one that training did not use
  uint64_t first_index = 0;            // of the first example
  int64_t examples = 128;
  int64_t batch_size = 16;             // examples at a time; the result does not depend on it
  // The token that stands for each of the task's symbols, and one that begins every sequence (-1: none). Empty: symbol i is token i.
  std::vector<int32_t> symbols = {};
  int32_t bos = -1;
  StateOptions state = {};             // what is kept of keys and values; all: the sequences run without a state, which gives the same
  // Called after each batch with the examples done so far and the accuracy on them.
  std::function<void(int64_t examples, double accuracy)> progress = {};
};

struct RecallResult {
  std::string schedule;
  int64_t correct = 0, queries = 0;
  double nll_sum = 0;          // nats, over the queries' targets
  double attention_share = 0;  // of all (token, layer) pairs, those in mixer `attention`
  double flops_per_token = 0;  // forward
  int64_t state_bytes = 0;     // of one sequence at its end
  double seconds = 0;

  double accuracy() const { return static_cast<double>(correct) / static_cast<double>(queries); }
  double nats() const { return nll_sum / static_cast<double>(queries); }
};

// Throws Error when the task's numbers do not fit together, or its symbols the model's vocabulary.
void check_recall(const ModelConfig& config, const RecallOptions& task);

// So many different words of a tokeniser, in an order drawn from `seed`: tokens that are a space and three or more small letters and that text gives back as
// themselves. Throws Error when there are fewer.
std::vector<int32_t> word_symbols(const Tokenizer& tokenizer, int64_t count, uint64_t seed);

// A query is right when the likeliest token (of the whole vocabulary) after its key is its value. Throws Error when the task does not
// fit the model's vocabulary or a logit is not finite, and Interrupted after Ctrl-C.
RecallResult evaluate_recall(const LanguageModel& model, const RecallOptions& task, const RecallEvaluation& evaluation = {});

}  // namespace oryx
