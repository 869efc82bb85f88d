// Needle in a haystack (oryx/data/synthetic.h) under a mode schedule.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "oryx/data/synthetic.h"
#include "oryx/data/tokenizer.h"
#include "oryx/eval/likelihood.h"
#include "oryx/model/language_model.h"

namespace oryx {

struct NeedleEvaluation {
  // A schedule's text, or "question": question and answer in attention, the model's first mixer before them. The prompt's parts "question" and "needle" are
  // known to the policy `part`.
  std::string schedule = "attention";
  int64_t length = 512;   // tokens of the prompt at most
  double depth = 0.5;     // of the needle, in [0, 1]
  int64_t examples = 8;
  uint64_t seed = 0;
  uint64_t first_index = 0;
  int64_t prefill_piece = 1024;  // tokens of one pass at most
  // Prompts packed into passes of so many tokens, each read in one call; 0, a longer prompt or a state without keys and values (drop): one at a time, piece by piece.
  // The result is the same up to rounding; under a random schedule each packed prompt draws for itself.
  int64_t batch_tokens = 0;
  StateOptions state = {};       // what is kept of keys and values
  std::function<void(int64_t examples, double accuracy)> progress = {};
};

struct NeedleResult {
  int64_t correct = 0, examples = 0;
  double nll_sum = 0;           // nats, over all answer tokens
  int64_t answer_tokens = 0;
  int64_t prompt_tokens = 0;    // of all examples
  EvalCost cost;

  double accuracy() const { return static_cast<double>(correct) / static_cast<double>(examples); }
  double nats() const { return nll_sum / static_cast<double>(answer_tokens); }
};

// An example is right when each answer token is the likeliest after the prompt and the answer tokens before it: then greedy generation
// gives the answer. Throws Error for bad options and logits that are not finite, Interrupted after Ctrl-C.
NeedleResult evaluate_needle(const LanguageModel& model, const Tokenizer& tokenizer, const NeedleTask& task, const NeedleEvaluation& evaluation);

}  // namespace oryx
