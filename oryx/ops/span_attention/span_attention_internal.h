// What the device files of span_attention share: the form of any shape and device, and the checks that look at no data.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::ops {

// The operator by the vector kernels (CPU) or by blocks of batched matrix products (float64, other devices), and the same under autograd.
at::Tensor span_attention_any(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& spans,
                              const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k,
                              const std::optional<at::Tensor>& key_lengths, int64_t window, std::optional<double> scale);
at::Tensor span_attention_any_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>& cu_seqlens,
                                       const std::optional<at::Tensor>& cu_seqlens_k, const std::optional<at::Tensor>& key_lengths,
                                       int64_t window, std::optional<double> scale);

}  // namespace oryx::ops
