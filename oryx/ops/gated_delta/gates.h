// Decay and write strength of the gated delta rule from their projections (arXiv 2412.06464):
//
//   beta = strength * sigmoid(b),  g = -exp(A_log) * softplus(a + dt_bias)      softplus exact: log(1 + e^x)
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace oryx::ops {

// ba [..., 2 Hs]: b, then a; A_log, dt_bias [Hs]; all float32 (float64 on the CPU). Returns {g, beta}, [..., Hs] each. Differentiable in all three.
std::pair<at::Tensor, at::Tensor> gated_delta_gates(const at::Tensor& ba, const at::Tensor& A_log, const at::Tensor& dt_bias, double strength = 1);
std::pair<at::Tensor, at::Tensor> gated_delta_gates_naive(const at::Tensor& ba, const at::Tensor& A_log, const at::Tensor& dt_bias, double strength = 1);

}  // namespace oryx::ops
