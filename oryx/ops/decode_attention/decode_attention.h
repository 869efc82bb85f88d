// Attention of one new token a sequence over cached keys that were kept before RoPE (docs/decisions/0005): the rotation happens while keys are read.
//
//   o_n = sum_{j visible} softmax_j(scale * R(p_n) q_n . R(j) k_j) v_j     p_n = lengths[n] - 1;  visible: p_n - window < j <= p_n, window 0: j <= p_n
//
// R(p) rotates as in rope.h. Key j of a sequence stands at position j.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

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
// for: a length beyond the capacity there is cut to it. On the CPU keys and values are read where they lie, pages or not, and what a sequence gets does not
// depend on the others, on where its rows lie, or on the number of threads, to the last bit.
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                            const std::optional<at::Tensor>& blocks = {}, const std::optional<at::Tensor>& wanted = {}, DecodeRope rope = {},
                            int64_t window = 0, std::optional<double> scale = {});

// The same over pages of several pools, as a state holds those of sequences that came together from different places (oryx/state/pages.h). Not differentiable.
struct PagedDecode {
  at::Tensor q = {};                           // [N, Hq, K] as above
  std::vector<at::Tensor> keys = {}, values = {};   // by pool: [pages, page, Hk, K or V], one page size; pages are numbered through all pools
  at::Tensor lengths = {};                     // [N] int32
  at::Tensor blocks = {};                      // [N, most] int32; the numbers of pages that are not seen are not looked at
  std::optional<at::Tensor> wanted = {};       // [N] bool; of the others nothing is looked at, and their o is zero
  DecodeRope rope = {};
  int64_t window = 0;                     // 0: unlimited
  int64_t first = 0;                      // with a window: the first keys are seen too,
  int64_t reach = 0;                      // but none (of all) that stands so many or more before the query; 0: no end
  std::optional<double> scale = {};
  // Keys become k * k_norm / sqrt(mean(k^2) + norm_eps) before they are rotated: by head, factors [K], or over all heads of a row, [Hk * K].
  std::optional<at::Tensor> k_norm = {};
  double norm_eps = 0;
};

// -> o [N, Hq, V]. On the CPU as above. Elsewhere the pools become one first, and with `first`, `reach` or `k_norm` the naive form runs.
at::Tensor paged_decode_attention(const PagedDecode& a);
at::Tensor paged_decode_attention_naive(const PagedDecode& a);

// Rotated copies of all keys and an explicit score matrix, any dtype: the oracle of the tests. Same arguments.
at::Tensor decode_attention_naive(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                                  const std::optional<at::Tensor>& blocks = {}, const std::optional<at::Tensor>& wanted = {},
                                  DecodeRope rope = {}, int64_t window = 0, std::optional<double> scale = {});

}  // namespace oryx::ops
