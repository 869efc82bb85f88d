// What the files of this operator share: the arguments, their checked sizes, and the forms that compute.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "oryx/ops/sequences.h"
#include "oryx/ops/ssd/ssd.h"

namespace oryx::ops {

// The arguments of ssd(); absent ones are undefined tensors.
struct SsdInputs {
  at::Tensor q, k, v, dt_raw, dt_bias, A_log, D, initial_state, cu_seqlens, spans;
};

// Heads: state head h reads key head h / (Hs / Hk) and value head h / (Hs / Hv); output head h reads query head h / (Ho
// / Hq) and state head h / (Ho / Hs).
struct SsdSizes {
  int64_t B, T, Hq, Hk, Hv, Hs, Ho, K, V;
  std::vector<Sequence> sequences;
  std::vector<uint8_t> wanted;  // [B * T], 1 where the readout is wanted; empty: everywhere
  int64_t count() const { return static_cast<int64_t>(sequences.size()); }
  bool wants_any(int64_t row, int64_t begin, int64_t end) const;
};

// Checks shapes, dtypes, cu_seqlens and spans; throws c10::Error that names `op`.
SsdSizes ssd_sizes(const char* op, const SsdInputs& in);

// float32 for float32 and bfloat16, float64 for float64.
inline at::ScalarType ssd_compute_dtype(const SsdInputs& in) {
  return in.v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Everything but cu_seqlens and spans in `dtype`, detached.
SsdInputs ssd_convert(const SsdInputs& in, at::ScalarType dtype);

struct SsdGradients {
  at::Tensor q, k, v, dt_raw, dt_bias, A_log, D, initial_state;  // the last undefined when there is no initial state
};

// Chunked parallel form from ATen's batched matrix products; inputs of one floating dtype. Memory is linear in T.
SsdResult ssd_chunked(const SsdInputs& in, const SsdSizes& sizes);
// d_o and d_final_state of the inputs' dtype; d_final_state may be undefined (zero).
SsdGradients ssd_chunked_backward(const SsdInputs& in, const SsdSizes& sizes, const at::Tensor& d_o,
                                  const at::Tensor& d_final_state);

// The same by the vector kernels (ssd_kernels.h); inputs float32.
SsdResult ssd_vector(const SsdInputs& in, const SsdSizes& sizes);
SsdGradients ssd_vector_backward(const SsdInputs& in, const SsdSizes& sizes, const at::Tensor& d_o,
                                 const at::Tensor& d_final_state);
// One token of each sequence (T = 1); `state` contiguous float32, updated. Returns o [N, 1, Ho, V].
at::Tensor ssd_vector_step(const SsdInputs& in, const SsdSizes& sizes, const at::Tensor& state);

}  // namespace oryx::ops
