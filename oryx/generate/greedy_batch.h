// Greedy continuations of several prompts side by side: one state, one packed pass over the prompts, then one token of each at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"

namespace oryx {

struct BatchPrompt {
  std::vector<int32_t> ids;                      // at least one
  std::shared_ptr<const TokenFacts> facts = {};  // what the schedule needs (gather_facts)
};

struct GreedyBatchOptions {
  int64_t max_new_tokens = 48;
  int64_t vocab_size = 0;   // ids from here on are never chosen; 0: all of the model's are
  uint64_t seed = 0;        // of a random schedule; prompt i is sequence i
  StateOptions state = {};
};

// Calls on_token(i, id) for each new token of prompt i until it answers false or max_new_tokens are there. The tokens are those of a Session of that prompt alone, up to
// rounding. Throws Error for ids outside of the vocabulary and logits that are not finite, Interrupted after Ctrl-C.
void generate_greedily(const LanguageModel& model, const ModelSchedule& schedule, const std::vector<BatchPrompt>& prompts, const GreedyBatchOptions& options,
                       const std::function<bool(size_t prompt, int32_t id)>& on_token);

}  // namespace oryx
