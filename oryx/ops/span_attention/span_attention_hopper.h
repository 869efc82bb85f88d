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

// Keys outside of the window (sink_attention.h), for the forward pass.
struct HopperFarKeys {
  at::Tensor first_k = {}, first_v = {};      // [N, first, Hk, D], first may be 0
  at::Tensor between_k = {}, between_v = {};  // [N, C, Hk, D]; undefined: none
  at::Tensor seen = {};                       // [N, C up to a multiple of 128, 2] int32: query t sees key i when seen[i][0] <= t < seen[i][1]
  at::Tensor positions = {};                  // [B, Tq] int32, dense: consecutive in a sequence
  int64_t window = 0, reach = 0;
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
HopperAttention hopper_forward(const AttentionArguments& a, bool want_lse, const HopperFarKeys* far = nullptr);
// From the host through pinned memory: the copy does not wait for what the device still has to do.
at::Tensor ints_on(const at::Tensor& x, at::Device device);
// Elements of a head side by side, all else at multiples of 16 bytes.
at::Tensor hopper_aligned(const at::Tensor& x);
std::array<at::Tensor, 3> hopper_backward(const AttentionArguments& a, const HopperAttention& forward, const at::Tensor& d_o);

}  // namespace oryx::ops
