// Mamba-2's state-space dual recurrence (Dao & Gu 2024, arXiv 2405.21060), in attention's letters: q is C, k is B, v is
// x.
//
//   dt = softplus(dt_raw + dt_bias)  (exact log(1 + e^x)),  A = -exp(A_log)      one scalar a state head
//   S_t = exp(dt_t A) S_{t-1} + dt_t v_t k_t^T               S: (V, K)
//   o_t = S_t q_t + D v_t                                    no 1/sqrt(K), no normalisation
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::ops {

struct SsdResult {
  at::Tensor o;            // [B, T, Ho, V], dtype of v
  at::Tensor final_state;  // [N, Hs, V, K] float32 (float64 for float64 inputs)
};

// Parallel form, differentiable in q, k, v, dt_raw, dt_bias, A_log, D and initial_state.
//
//   q             [B, T, Hq, K]    k [B, T, Hk, K]    v [B, T, Hv, V]   float32, bfloat16 or float64, all of one dtype
//   dt_raw        [B, T, Hs]       dt_bias, A_log, D [Hs]               float32 (float64 with float64 inputs)
//   initial_state [N, Hs, V, K]    float32 (float64 with float64 inputs); zeros when absent
//   cu_seqlens    [N + 1] int32    packed documents in the single row (B = 1); without it N = B
//   spans         [n, 3] int32     (row, begin, end): where the readout o is wanted; o is zero elsewhere. Absent:
//   everywhere.
//
// Heads group as in gated_delta.h: Hs = max(Hk, Hv), Ho = max(Hq, Hs).
SsdResult ssd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
              const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
              const std::optional<at::Tensor>& initial_state = {}, const std::optional<at::Tensor>& cu_seqlens = {},
              const std::optional<at::Tensor>& spans = {});

// The formula, token by token, plain ATen, any dtype, differentiable by autograd: the oracle of the tests.
SsdResult ssd_naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                    const std::optional<at::Tensor>& initial_state = {},
                    const std::optional<at::Tensor>& cu_seqlens = {}, const std::optional<at::Tensor>& spans = {});

// One token of each of N sequences: q [N, Hq, K], k [N, Hk, K], v [N, Hv, V], dt_raw [N, Hs]; state [N, Hs, V, K] is
// updated in place. Returns o [N, Ho, V]. Not differentiable.
at::Tensor ssd_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D, at::Tensor state);

}  // namespace oryx::ops
