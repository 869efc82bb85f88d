// RMSNorm and its gated forms. Means and roots in float32 (float64 for float64 inputs).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oryx::ops {

// y = x * rsqrt(mean x^2 + eps) * (weight, or 1 + weight when zero_centred) over the last axis (Zhang & Sennrich 2019,
// arXiv 1910.07467). x [..., D], weight [D]; y has x's dtype. Differentiable in x and weight.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool zero_centred = false);
at::Tensor rms_norm_naive(const at::Tensor& x, const at::Tensor& weight, double eps, bool zero_centred = false);

// sum = x + residual, y = rms_norm(sum): returns {y, sum}. One pass over memory. Differentiable in x, residual and
// weight.
std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const at::Tensor& weight, double eps);

// gate_first false: y = rms_norm(x) * silu(gate), over the last axis (weight [V], one for all heads).
// gate_first true:  y = rms_norm(x * silu(gate)), over each of `groups` equal slices of the last axis (Mamba-2's
// checkpoints). x, gate [..., V], weight [V]. Differentiable in x, gate and weight.
at::Tensor gated_rms_norm(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps,
                          bool gate_first = false, int64_t groups = 1);
at::Tensor gated_rms_norm_naive(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps,
                                bool gate_first = false, int64_t groups = 1);

}  // namespace oryx::ops
