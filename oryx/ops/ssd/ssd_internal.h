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
  int64_t B, T, N, Hq, Hk, Hv, Hs, Ho, K, V;  // N: sequences
  // Filled by ssd_sizes alone:
  std::vector<Sequence> sequences;
  std::vector<uint8_t> wanted;  // [B * T], 1 where the readout is wanted; empty: everywhere
  int64_t count() const { return N; }
  bool wants_any(int64_t row, int64_t begin, int64_t end) const;
};

// Checks shapes and dtypes, without a look at what cu_seqlens and spans hold; throws c10::Error that names `op`.
SsdSizes ssd_shapes(const char* op, const SsdInputs& in);
// The same, and checks and lists what they hold; waits for the device where they are on one.
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

// The registered functions for any device, dtype and head dimension: vector kernels on the CPU, else the chunked form.
using SsdOptional = std::optional<at::Tensor>;
std::tuple<at::Tensor, at::Tensor> ssd_general(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                               const at::Tensor& dt_raw, const at::Tensor& dt_bias,
                                               const at::Tensor& A_log, const at::Tensor& D,
                                               const SsdOptional& initial_state, const SsdOptional& cu_seqlens,
                                               const SsdOptional& spans);
using SsdEight =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
SsdEight ssd_backward_general(const at::Tensor& d_o, const SsdOptional& d_final_state, const at::Tensor& q,
                              const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                              const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                              const SsdOptional& initial_state, const SsdOptional& cu_seqlens,
                              const SsdOptional& spans);
at::Tensor ssd_step_general(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                            const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D, at::Tensor& state);

}  // namespace oryx::ops
