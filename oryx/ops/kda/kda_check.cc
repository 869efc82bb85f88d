#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include "oryx/common/error.h"
#include "oryx/ops/kda/kda_internal.h"

namespace oryx::ops::kimi {

namespace {

// One channel of g, which the gated delta rule's checks take for the whole.
at::Tensor one_channel(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& g) {
  if (g.dim() != q.dim() || k.dim() != q.dim() || g.size(-1) != k.size(-1)) {
    fail("{}: g is [{}], expected a log decay for each state head and key channel: [..., heads, K] as k, which is [{}]", op,
         fmt::join(g.sizes(), ", "), fmt::join(k.sizes(), ", "));
  }
  return g.size(-1) > 0 ? g.select(-1, 0) : g.sum(-1);
}

}  // namespace

Problem check_arguments(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                        const at::Tensor& beta, const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
                        const std::optional<at::Tensor>& spans, std::optional<double> scale, double l2_eps) {
  return gated_delta::check_arguments(op, q, k, v, one_channel(op, q, k, g), beta, initial_state, cu_seqlens, spans, scale, l2_eps);
}

Problem check_shapes(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                     const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& spans,
                     std::optional<double> scale, double l2_eps) {
  return gated_delta::check_shapes(op, q, k, v, one_channel(op, q, k, g), beta, initial_state, cu_seqlens, spans, scale, l2_eps);
}

Problem check_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                   const at::Tensor& state, std::optional<double> scale, double l2_eps) {
  return gated_delta::check_step("kda_step", q, k, v, one_channel("kda_step", q, k, g), beta, state, scale, l2_eps);
}

}  // namespace oryx::ops::kimi
