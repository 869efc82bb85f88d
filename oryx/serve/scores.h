// How likely tokens were, as requests may ask for them, and the form that OpenAI's answers give them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/data/tokenizer.h"

namespace oryx::serve {

// By the model's own logits, before temperature and filters.
struct TokenScores {
  int32_t id = 0;
  double logprob = 0;                           // NaN of a text's first token, which nothing is before
  std::vector<std::pair<int32_t, double>> top;  // the likeliest tokens and their log-probabilities, falling; of equals the lower id first
};

// logits [V] on the CPU; the `top` likeliest of them beside the token that came. Throws Error for an id outside of them.
TokenScores score_token(const at::Tensor& logits, int32_t id, int64_t top);

// The same of rows of logits [n, V] where they stand, for ids[i] of row i; `top` as above. What a GPU sums in another order differs in the last bits of a double.
std::vector<TokenScores> score_rows(const at::Tensor& logits, std::span<const int32_t> ids, int64_t top);

// A token and where its text begins: characters of the answer's text before it.
struct ShownToken {
  TokenScores scores;
  int64_t offset = 0;
};

// The token's text; "bytes:\xe2\x82" for one that is not whole characters.
std::string token_text(const Tokenizer& tokenizer, int32_t id);

// `logprobs` of a completion: lists of tokens, token_logprobs, top_logprobs (null when `top` is 0) and text_offset.
Json completion_logprobs(const Tokenizer& tokenizer, std::span<const ShownToken> tokens, int64_t top);
// `logprobs` of a chat: content, a list of objects with token, logprob, bytes and top_logprobs.
Json chat_logprobs(const Tokenizer& tokenizer, std::span<const ShownToken> tokens);

}  // namespace oryx::serve
