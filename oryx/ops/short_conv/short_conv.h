// Causal depthwise convolution over the last w tokens, with an optional SiLU.
//
//   y_t[c] = act(sum_{j < w} weight[c, j] x_{t - w + 1 + j}[c] + bias[c])     weight[:, w - 1] meets the current token
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::ops {

enum class Activation { kNone, kSilu };

struct ShortConvResult {
  at::Tensor y;            // [B, T, C]
  at::Tensor final_state;  // [N, C, w - 1]: the last inputs, oldest first, before weight and activation
};

// Differentiable in x, weight, bias and initial_state.
//   x [B, T, C] float32, bfloat16 or float64; weight [C, w]; bias [C]; initial_state [N, C, w - 1] (zeros when absent)
//   cu_seqlens [N + 1] int32: packed documents in the single row (B = 1); without it N = B
ShortConvResult short_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias = {},
                           const std::optional<at::Tensor>& initial_state = {},
                           const std::optional<at::Tensor>& cu_seqlens = {}, Activation activation = Activation::kNone);

ShortConvResult short_conv_naive(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias = {},
                                 const std::optional<at::Tensor>& initial_state = {},
                                 const std::optional<at::Tensor>& cu_seqlens = {},
                                 Activation activation = Activation::kNone);

// One token of each of N sequences: x [N, C]; state [N, C, w - 1] is updated in place. Returns y [N, C]. Not
// differentiable.
at::Tensor short_conv_step(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           at::Tensor state, Activation activation);

}  // namespace oryx::ops
