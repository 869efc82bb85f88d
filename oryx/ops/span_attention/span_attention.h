// Causal softmax attention in which only the queries of chosen spans are computed.
//
//   o_i = sum_{j in visible(i)} softmax_j(scale * q_i . k_j) v_j
//
// Query i of a sequence stands at key index i + (keys - queries) of that sequence (aligned at the end); it sees the keys of
// its own sequence up to itself, with window > 0 only the last `window` of them (itself included).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::ops {

// Differentiable in q, k, v.
//
//   q  [B, Tq, Hq, K]    k [B, Tk, Hk, K]    v [B, Tk, Hk, V]   float32, bfloat16 or float64, one dtype; rotated by the caller
//   spans         [n, 3] int32   (row, begin, end) in query indices; rows of o outside them are zero. Absent: every query.
//   cu_seqlens    [N + 1] int32  packed sequences in the single row (B = 1): bounds of the queries, and of the keys unless
//   cu_seqlens_k  [N + 1] int32  gives those (each sequence at least as many keys as queries)
//   key_lengths   [B] int32      without cu_seqlens: row b has key_lengths[b] keys (Tk is a capacity); its Tq queries stand
//                                at the end of them
//   window        0: unlimited   scale: default K^-1/2
//
// Returns o [B, Tq, Hq, V]. Query head h uses key/value head h // (Hq / Hk). Memory is linear in Tq and Tk. On CUDA in bfloat16 nothing is read back
// to the host, and what lies out of range is clipped instead of refused.
at::Tensor span_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::optional<at::Tensor>& spans = {}, const std::optional<at::Tensor>& cu_seqlens = {},
                          const std::optional<at::Tensor>& cu_seqlens_k = {},
                          const std::optional<at::Tensor>& key_lengths = {}, int64_t window = 0,
                          std::optional<double> scale = {});

// The formula with an explicit score matrix, plain ATen, any dtype, differentiable by autograd: the oracle of the tests.
at::Tensor span_attention_naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const std::optional<at::Tensor>& spans = {},
                                const std::optional<at::Tensor>& cu_seqlens = {},
                                const std::optional<at::Tensor>& cu_seqlens_k = {},
                                const std::optional<at::Tensor>& key_lengths = {}, int64_t window = 0,
                                std::optional<double> scale = {});

}  // namespace oryx::ops
