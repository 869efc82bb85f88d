// What the files of this operator share: the checked arguments, and the two whole-sequence forms behind
// gated_delta_rule.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace oryx::ops::gated_delta {

constexpr int64_t kChunk = 64;  // tokens that are worked on at once; a sequence's last chunk may be shorter

// A document (or batch row): tokens [begin, end) of the flattened [B * T] token axis.
struct Sequence {
  int64_t begin, end;
};

// Tokens [begin, begin + length) of the flattened token axis, length <= kChunk.
struct Chunk {
  int64_t begin, length;
};

// The arguments after all checks. Heads as in gated_delta.h; `groups` is Ho / Hs.
struct Problem {
  int64_t B, T, N, Hq, Hk, Hv, Hs, Ho, K, V, groups;
  double scale, l2_eps;
  std::vector<Sequence> sequences;   // N
  std::vector<Chunk> chunks;         // those of sequence 0, then of sequence 1, ...
  std::vector<int64_t> first_chunk;  // N + 1: sequence n has chunks [first_chunk[n], first_chunk[n + 1])
  std::vector<uint8_t> wanted;       // B * T, nonzero where o is wanted; empty: everywhere
};

// Throws oryx::Error with one line that starts with `op` when the arguments do not fit together.
Problem check_arguments(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& g, const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
                        const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& spans,
                        std::optional<double> scale, double l2_eps);

// The same without a look at the values of cu_seqlens and spans, which may be in the making on a device: sequences, chunks and wanted stay
// empty, N is set.
Problem check_shapes(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                     const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
                     const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& spans,
                     std::optional<double> scale, double l2_eps);

// The same for one token of each sequence (q, k, v three-dimensional).
Problem check_step(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                   const at::Tensor& beta, const at::Tensor& state, std::optional<double> scale, double l2_eps);

// Tensors of one dtype (float32 or float64), any strides; state undefined when absent.
struct Inputs {
  at::Tensor q, k, v, g, beta, state;
};

struct Outputs {
  at::Tensor o, final_state;
  // What backward needs beside the inputs, each for its own form.
  at::Tensor chunk_states;  // the state before each chunk, [chunks, Hs, V, K]; of the kernels [chunks, Hs, K, V]
  at::Tensor residual;      // [B, T, Hs, V] v - a S k of each token; only the kernels save it
};

struct Gradients {
  at::Tensor q, k, v, g, beta, state;
};

// Batched matrix products of ATen, float32 and float64. Memory linear in T.
Outputs chunked_forward(const Problem& p, const Inputs& x, bool save);
Gradients chunked_backward(const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o,
                           const at::Tensor& d_final);

// Whether the CUDA kernels (gated_delta_cuda.cc) are in this build and take these inputs: bfloat16 on a CUDA device, K = V = 64 or 128.
bool device_kernels_take(const at::Tensor& q, const at::Tensor& v);

// One token of each sequence (x.q [N, Hq, K] ...); updates the state in place whatever its strides. Returns o [N, Ho,
// V].
at::Tensor plain_step(const Problem& p, const Inputs& x, at::Tensor& state);

// The same three by vector kernels: float32 only. The step's state must be dense in its last two axes, the others
// contiguous.
Outputs kernel_forward(const Problem& p, const Inputs& x, bool save);
Gradients kernel_backward(const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o,
                          const at::Tensor& d_final);
at::Tensor kernel_step(const Problem& p, const Inputs& x, at::Tensor& state);

// Runs a delta rule's kernels over sequences and heads, which the threads share (g of [B, T, Hs] or [B, T, Hs, K], as those kernels want it).
struct HeadKernels;
Outputs run_forward(const HeadKernels& kernels, const Problem& p, const Inputs& x, bool save);
Gradients run_backward(const HeadKernels& kernels, const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o,
                       const at::Tensor& d_final);

}  // namespace oryx::ops::gated_delta
