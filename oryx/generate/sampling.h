// The next token from a row of logits. Draws are counter-based: a token is a function of (logits, options, sequence, position).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace oryx {

struct SamplingOptions {
  double temperature = 0;  // 0: greedy, and the filters play no part
  int64_t top_k = 0;       // 0: all
  double top_p = 1;
  double min_p = 0;
  int64_t seed = 0;
  // Draw by a race: each token that the filters leave has a clock that rings after an exponential time of rate its weight, the clock's draw being a function of (seed, position, sequence, token
  // id), and the first to ring is drawn. The same distribution, other tokens; but two rows of logits that are nearly alike then mostly draw the same token, which is what
  // drafts want (Daliri et al. 2024, arXiv 2408.07978): of one uniform number and running sums a small change anywhere moves all that stands behind it.
  bool race = false;

  // Throws Error for values outside of their range (NaN included).
  void validate() const;
};

// logits [V] -> token id. Greedy takes the first of equals. Otherwise softmax(logits / temperature) is cut to the top_k likeliest tokens,
// then to the fewest likeliest whose share of what is left reaches top_p (Holtzman et al. 2020, arXiv 1904.09751), then to those at
// least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082), and drawn from. Throws Error when a logit is NaN
// or +inf, or none is finite.
int64_t sample_token(const at::Tensor& logits, const SamplingOptions& options, uint64_t position, uint32_t sequence = 0);

}  // namespace oryx
