// The oracle: the other forms are tested against it.
#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/gated_delta/naive_delta_rule.h"

namespace oryx::ops {

GatedDeltaResult gated_delta_rule_naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                                        const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
                                        const std::optional<at::Tensor>& spans, std::optional<double> scale, double l2_eps) {
  const auto p = gated_delta::check_arguments("gated_delta_rule_naive", q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  const bool packed = cu_seqlens.has_value() && cu_seqlens->defined();
  const auto [o, S] = gated_delta::naive_delta_rule(p, q, k, v, g.unsqueeze(-1), beta, initial_state, packed);
  return {o, S};
}

}  // namespace oryx::ops
