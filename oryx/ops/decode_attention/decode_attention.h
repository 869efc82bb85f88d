// Attention of one new token a sequence over cached keys that were kept before RoPE (docs/decisions/0005): the rotation happens while keys are read.
//
//   o_n = sum_{j visible} softmax_j(scale * R(p_n) q_n . R(j) k_j) v_j     p_n = lengths[n] - 1;  visible: p_n - window < j <= p_n, window 0: j <= p_n
//
// R(p) rotates as in rope.h. Key j of a sequence stands at position j.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::ops {

struct DecodeRope {
  double theta = 0;        // 0: nothing is rotated
  int64_t rotary_dim = 0;  // the first values of a head that are; 0: all
};

// Not differentiable.
//
//   q       [N, Hq, K]                            float32, bfloat16 or float64, one dtype; before rotation
//   keys    [N, capacity, Hk, K]                  before rotation, as the state keeps them
//   values  [N, capacity, Hk, V]                  the last dimension of both dense, the others of any stride
//   lengths [N] int32                             keys of each sequence, that of the query's own token included: 1 to capacity
//   blocks  [N, most] int32, optional             paged: keys and values are [pages, page, Hk, K or V], and token j of sequence n stands in row j % page
//                                                 of page blocks[n, j / page]
//   wanted  [N] bool, optional                    sequences whose output is wanted: the others are neither read nor computed, their o is zero
//   window  0: unlimited                          scale: default K^-1/2
//
// Returns o [N, Hq, V]. Query head h uses key/value head h // (Hq / Hk). On CUDA lengths, blocks and wanted are read on the device and never waited
// for: a length beyond the capacity there is cut to it. On the CPU pages are gathered first.
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                            const std::optional<at::Tensor>& blocks = {}, const std::optional<at::Tensor>& wanted = {}, DecodeRope rope = {},
                            int64_t window = 0, std::optional<double> scale = {});

// Rotated copies of all keys and an explicit score matrix, any dtype: the oracle of the tests. Same arguments.
at::Tensor decode_attention_naive(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                                  const std::optional<at::Tensor>& blocks = {}, const std::optional<at::Tensor>& wanted = {},
                                  DecodeRope rope = {}, int64_t window = 0, std::optional<double> scale = {});

}  // namespace oryx::ops
