// Log-likelihoods of continuations under a mode schedule, by the rules of the EleutherAI evaluation harness (lm_eval 0.4).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "oryx/data/tokenizer.h"
#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"

namespace oryx {

struct TokenPair {
  std::vector<int32_t> context, continuation;     // bos stands before the context
  std::shared_ptr<const TokenFacts> facts = {};   // of the context, where the schedule asks for them
};

// The two texts as tokens: spaces at the context's end go over to the continuation, the whole is tokenised, and what lies behind as many tokens as the
// context has alone is the continuation (the harness's _encode_pair). Throws Error when nothing is left to score.
TokenPair encode_pair(const Tokenizer& tokenizer, std::string context, std::string continuation);

struct Likelihood {
  double log_p = 0;     // nats, summed over the continuation's tokens
  bool greedy = false;  // each of them was the likeliest
};

// What the sequences of an evaluation cost, on average.
struct EvalCost {
  double attention_share = 0;  // of all (token, layer) pairs, those in the mixer `attention`
  double flops_per_token = 0;  // forward
  double state_bytes = 0;      // of one sequence at its end
  int64_t sequences = 0, tokens = 0;

  // One more sequence of this routing, whose state keeps what `options` say; `more_flops` were spent beside.
  void add(const LanguageModel& model, const std::vector<std::shared_ptr<const Routing>>& routing, int64_t tokens, const StateOptions& options = {},
           double more_flops = 0);
};

// FLOPs that routed_flops counts and a state that does not keep everything does not spend: attention to tokens that it has dropped; less those that a choice of rows takes, a readout of
// the linear mixers at every token (KeptRule). Rows of the routing are sequences from their beginning.
double saved_flops(const ModelConfig& config, const std::vector<std::shared_ptr<const Routing>>& routing, const StateOptions& options);

struct LikelihoodOptions {
  int64_t batch_tokens = 4096;  // of one pass, packed; a longer sequence stands alone
  uint64_t seed = 0;            // of random schedules; pair i is sequence first + i
  uint64_t first = 0;           // of the pairs, where they are some of more
  StateOptions state = {};      // what is kept of keys and values; each sequence is read in one call, so rows may be chosen but not dropped altogether (drop_rows)
  std::function<void(int64_t pairs)> progress = {};
};

// The context is the schedule's prompt, the continuation is generated text to it. Throws Error for logits that are not finite, Interrupted after Ctrl-C.
std::vector<Likelihood> score_pairs(const LanguageModel& model, const ModelSchedule& schedule, const std::vector<TokenPair>& pairs,
                                    const LikelihoodOptions& options, EvalCost& cost);

struct Spread {
  double mean = 0, stderr_of_mean = 0;  // sample standard deviation / sqrt(n): 0 for one value
};
Spread spread_of(const std::vector<double>& values);

}  // namespace oryx
