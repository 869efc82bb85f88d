// Log decays of Kimi Delta Attention from their projection (arXiv 2510.26692):
//
//   g = -exp(A_log) * softplus(x + dt_bias)      one A_log a state head, one dt_bias a channel; softplus exact: log(1 + e^x)
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::ops {

// x [..., Hs K], A_log [Hs], dt_bias [Hs K], all float32 (float64 on the CPU). Returns g [..., Hs, K], at most 0. Differentiable in all three.
at::Tensor kda_decay(const at::Tensor& x, const at::Tensor& A_log, const at::Tensor& dt_bias);
at::Tensor kda_decay_naive(const at::Tensor& x, const at::Tensor& A_log, const at::Tensor& dt_bias);

}  // namespace oryx::ops
