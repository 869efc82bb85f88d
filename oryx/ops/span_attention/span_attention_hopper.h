// Tensors for the Hopper kernels of span_attention (cuda/span_attention_launch.h): only in CUDA builds.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace oryx::ops {

struct AttentionArguments {
  at::Tensor q, k, v;
  std::optional<at::Tensor> spans, cu_seqlens, cu_seqlens_k, key_lengths;
  int64_t window = 0;
  std::optional<double> scale;
};

// What the backward pass needs of the forward pass.
struct HopperAttention {
  at::Tensor o;
  at::Tensor lse;   // [Hq, slots]; undefined unless wanted
  at::Tensor plan;  // the work, planned on the device
};

// bfloat16, K = V = 64 or 128, scale > 0, on a device of compute capability 9.0.
bool hopper_serves(const AttentionArguments& a);
// `a` with spans and bounds on the device and strides that the kernels take.
AttentionArguments hopper_arguments(const AttentionArguments& a);
// Both take what hopper_arguments returned.
HopperAttention hopper_forward(const AttentionArguments& a, bool want_lse);
std::array<at::Tensor, 3> hopper_backward(const AttentionArguments& a, const HopperAttention& forward, const at::Tensor& d_o);

}  // namespace oryx::ops
