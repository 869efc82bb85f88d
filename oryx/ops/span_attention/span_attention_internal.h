// What the device files of span_attention share: the form of any shape and device, and the checks that look at no data.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "oryx/ops/span_attention/sink_attention.h"

namespace oryx::ops {

// sink_attention of any device and type: softmaxes over the window and over the other keys, joined by their denominators.
at::Tensor sink_attention_any(const SinkAttention& a);
// Its arguments from those of torch.ops.oryx.sink_attention.
SinkAttention sink_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& sink_k, const at::Tensor& sink_v, const at::Tensor& positions,
                             const std::optional<at::Tensor>& between_k, const std::optional<at::Tensor>& between_v, const std::optional<at::Tensor>& between_positions,
                             const std::optional<at::Tensor>& between_from, const std::optional<at::Tensor>& between_until, const std::optional<at::Tensor>& spans,
                             const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k, const std::optional<at::Tensor>& key_lengths,
                             int64_t window, int64_t reach, std::optional<double> scale);

// The operator by the vector kernels (CPU) or by blocks of batched matrix products (float64, other devices), and the same under autograd.
at::Tensor span_attention_any(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& spans,
                              const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k,
                              const std::optional<at::Tensor>& key_lengths, int64_t window, std::optional<double> scale);
at::Tensor span_attention_any_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>& cu_seqlens,
                                       const std::optional<at::Tensor>& cu_seqlens_k, const std::optional<at::Tensor>& key_lengths,
                                       int64_t window, std::optional<double> scale);

}  // namespace oryx::ops
