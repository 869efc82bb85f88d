// Kimi Delta Attention (Kimi Team 2025, "Kimi Linear", arXiv 2510.26692): the gated delta rule with a decay for each key channel.
//
//   q^ = q * rsqrt(sum q^2 + l2_eps),  k^ likewise                        per head, over K
//   S_t = S_{t-1} diag(a_t) (I - b_t k^_t k^_t^T) + b_t v_t k^_t^T         a_t = exp(g_t), one a channel; S: (V, K)
//   o_t = scale * S_t q^_t                                                 the state is read after the update
//
// With the same g in all channels it is gated_delta_rule (oryx/ops/gated_delta/gated_delta.h). The paper writes S as (K, V), transposed.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::ops {

struct KdaResult {
  at::Tensor o;            // [B, T, Ho, V], dtype of v
  at::Tensor final_state;  // [N, Hs, V, K] float32 (float64 for float64 inputs)
};

// Parallel form, differentiable in q, k, v, g, beta and initial_state.
//
//   q             [B, T, Hq, K]    k [B, T, Hk, K]    v [B, T, Hv, V]   float32, bfloat16 or float64, all of one dtype
//   g             [B, T, Hs, K]    float32 (float64 with float64 inputs): log decay of each key channel (<= 0; -inf forgets the channel)
//   beta          [B, T, Hs]       as g: write strength
//   initial_state [N, Hs, V, K]    as g; zeros when absent
//   cu_seqlens    [N + 1] int32    packed documents in the single row (B = 1); without it N = B
//   spans         [n, 3] int32     (row, begin, end): where the readout o is wanted; o is zero elsewhere. Absent: everywhere.
//                                  The state advances over every token either way.
//   scale                          default K^-1/2
//
// Heads group as in gated_delta_rule: Hs = max(Hk, Hv) state heads, Ho = max(Hq, Hs) output heads, consecutive. Arguments that do not fit
// together are an oryx::Error of one line. Memory is linear in T.
KdaResult kda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
              const std::optional<at::Tensor>& initial_state = {}, const std::optional<at::Tensor>& cu_seqlens = {},
              const std::optional<at::Tensor>& spans = {}, std::optional<double> scale = {}, double l2_eps = 1e-6);

// The formula, token by token, plain ATen, any dtype, differentiable by autograd: the oracle of the tests. Same arguments.
KdaResult kda_naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                    const std::optional<at::Tensor>& initial_state = {}, const std::optional<at::Tensor>& cu_seqlens = {},
                    const std::optional<at::Tensor>& spans = {}, std::optional<double> scale = {}, double l2_eps = 1e-6);

// One token of each of N sequences: q [N, Hq, K], k [N, Hk, K], v [N, Hv, V], g [N, Hs, K], beta [N, Hs]; state [N, Hs, V, K] is updated in
// place. Returns o [N, Ho, V]. Not differentiable.
at::Tensor kda_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                    at::Tensor state, std::optional<double> scale = {}, double l2_eps = 1e-6);

}  // namespace oryx::ops
