// What the files of this operator share. Heads, sequences and chunks are those of the gated delta rule, whose checks and layout serve here
// too; only g has another shape, [B, T, Hs, K].
#pragma once

#include <string_view>

#include "oryx/ops/gated_delta/gated_delta_internal.h"

namespace oryx::ops::kimi {

using gated_delta::Gradients;
using gated_delta::Inputs;
using gated_delta::Outputs;
using gated_delta::Problem;

// Throws oryx::Error with one line that starts with `op` when the arguments do not fit together.
Problem check_arguments(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                        const at::Tensor& beta, const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
                        const std::optional<at::Tensor>& spans, std::optional<double> scale, double l2_eps);

// The same without a look at the values of cu_seqlens and spans, which may be in the making on a device: sequences, chunks and wanted stay empty, N is set.
Problem check_shapes(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                     const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& spans,
                     std::optional<double> scale, double l2_eps);

// Whether the CUDA kernels (kda_cuda.cc) are in this build and take these inputs: bfloat16 on a CUDA device, K = V = 64 or 128.
bool device_kernels_take(const at::Tensor& q, const at::Tensor& v);

// The same for one token of each sequence (q, k, v three-dimensional).
Problem check_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                   const at::Tensor& state, std::optional<double> scale, double l2_eps);

// Batched matrix products of ATen, float32 and float64, any device.
Outputs chunked_forward(const Problem& p, const Inputs& x, bool save);
Gradients chunked_backward(const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o, const at::Tensor& d_final);

// One token of each sequence (x.q [N, Hq, K] ...); updates the state in place whatever its strides. Returns o [N, Ho, V].
at::Tensor plain_step(const Problem& p, const Inputs& x, at::Tensor& state);

// The same three by vector kernels: float32 on the CPU. The step's state must be dense in its last two axes, the others contiguous.
Outputs kernel_forward(const Problem& p, const Inputs& x, bool save);
Gradients kernel_backward(const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o, const at::Tensor& d_final);
at::Tensor kernel_step(const Problem& p, const Inputs& x, at::Tensor& state);

}  // namespace oryx::ops::kimi
