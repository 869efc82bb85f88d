// Output projection and cross-entropy in one operator: tokens x vocabulary never stands in float32 at once.
//
//   lse_i = log sum_c exp(logits_ic),  nll_i = lse_i - logits_{i, target_i}  (0 where target_i = ignore_index)
//   loss = (sum_i nll_i + z_coef * sum_{i kept} lse_i^2) / (number of kept i)
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::ops {

struct CrossEntropyResult {
  at::Tensor
      loss;  // []: the mean over kept targets; 0 when none is kept. All three are float32 (float64 for float64 inputs)
  at::Tensor nll;  // [N], not differentiable
  at::Tensor lse;  // [N], not differentiable
};

// logits = hidden weight^T in blocks of rows; gradients of hidden and weight are made in the forward pass, block by
// block, so that no logits are kept.
//   hidden [N, D], weight [C, D] (float32, bfloat16 or float64), targets [N] int32 or int64. Differentiable in hidden,
//   weight.
// Under autocast hidden and weight are cast to its dtype; the products are then made in it, the softmax in float32.
// float64 is for checks: all its logits stand at once. A target that is no class and not ignore_index is an
// oryx::Error.
// On CUDA up to 1 GiB of logits stand at once, in hidden's dtype; the weight's gradient is summed in float32 and rounded once. Targets
// may be on the CPU, and are best left there: checking those on the device waits for it. While a CUDA graph is captured
// they are not checked; a bad one makes the loss NaN.
CrossEntropyResult linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                        int64_t ignore_index = -100, double z_coef = 0);

// Throws what linear_cross_entropy throws for targets (int64 on the CPU, any shape) of which one is no class and not ignore_index: for who hands them over on the device.
void check_targets(const at::Tensor& targets, int64_t classes, int64_t ignore_index = -100);

// The same from logits [N, C] that exist already. Differentiable in logits.
CrossEntropyResult cross_entropy(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index = -100,
                                 double z_coef = 0);
CrossEntropyResult cross_entropy_naive(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index = -100,
                                       double z_coef = 0);

}  // namespace oryx::ops
