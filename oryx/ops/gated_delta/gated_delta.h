// Gated delta rule (Yang et al. 2024, "Gated Delta Networks", arXiv 2412.06464).
//
//   q^ = q * rsqrt(sum q^2 + l2_eps),  k^ likewise            per head, over K
//   S_t = a_t S_{t-1} (I - b_t k^_t k^_t^T) + b_t v_t k^_t^T   a_t = exp(g_t), S: (V, K)
//   o_t = scale * S_t q^_t                                     the state is read after the update
//
// The decay comes before the prediction: the written value is b_t (v_t - a_t S_{t-1} k^_t).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oryx::ops {

struct GatedDeltaResult {
  at::Tensor o;            // [B, T, H, V], dtype of v
  at::Tensor final_state;  // [N, Hs, V, K] float32 (float64 for float64 inputs)
};

// Parallel form, differentiable in q, k, v, g, beta and initial_state.
//
//   q             [B, T, Hq, K]    k [B, T, Hk, K]    v [B, T, Hv, V]   float32, bfloat16 or float64, all of one dtype
//   g, beta       [B, T, Hs]       float32 (float64 with float64 inputs): log decay (<= 0), write strength
//   initial_state [N, Hs, V, K]    float32 (float64 with float64 inputs); zeros when absent
//   cu_seqlens    [N + 1] int32    packed documents in the single row (B = 1); without it N = B
//   spans         [n, 3] int32     (row, begin, end): where the readout o is wanted; o is zero elsewhere. Absent: everywhere.
//                                  The state advances over every token either way.
//   scale                          default K^-1/2
//
// Grouped heads are consecutive. Hs = max(Hk, Hv) state heads; state head h reads key head h // (Hs / Hk) and value head
// h // (Hs / Hv). Ho = max(Hq, Hs) output heads; output head h reads query head h // (Ho / Hq) and state head h // (Ho / Hs).
// o is [B, T, Ho, V].
//
// On a CUDA device bfloat16 inputs with K = V = 64 or 128 go to the kernels of cuda/ (docs/cuda.md), which do not wait for the device: the values of
// cu_seqlens and spans are then checked there, and bad ones end the program's use of the device.
GatedDeltaResult gated_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                                  const at::Tensor& beta, const std::optional<at::Tensor>& initial_state = {},
                                  const std::optional<at::Tensor>& cu_seqlens = {}, const std::optional<at::Tensor>& spans = {},
                                  std::optional<double> scale = {}, double l2_eps = 1e-6);

// The formula, token by token, plain ATen, any dtype, differentiable by autograd: the oracle of the tests. Same arguments.
GatedDeltaResult gated_delta_rule_naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                                        const at::Tensor& beta, const std::optional<at::Tensor>& initial_state = {},
                                        const std::optional<at::Tensor>& cu_seqlens = {},
                                        const std::optional<at::Tensor>& spans = {}, std::optional<double> scale = {},
                                        double l2_eps = 1e-6);

// One token of each of N sequences: q [N, Hq, K], k [N, Hk, K], v [N, Hv, V], g and beta [N, Hs]; state [N, Hs, V, K] is
// updated in place. Returns o [N, Ho, V]. Not differentiable.
at::Tensor gated_delta_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                            const at::Tensor& beta, at::Tensor state, std::optional<double> scale = {}, double l2_eps = 1e-6);

}  // namespace oryx::ops
