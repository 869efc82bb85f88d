#include "oryx/ops/gated_delta/gates.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "oryx/ops/few_rows/few_rows.h"

namespace oryx::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Two forward(const at::Tensor& ba, const at::Tensor& A_log, const at::Tensor& dt_bias, double strength) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("oryx::_gated_delta_gates", "")
                             .typed<Two(const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>();
  return op.call(ba, A_log, dt_bias, strength);
}

struct Gates : torch::autograd::Function<Gates> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& ba, const at::Tensor& A_log, const at::Tensor& dt_bias, double strength) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({ba, A_log, dt_bias});
    ctx->saved_data["strength"] = strength;
    auto [g, beta] = ops::forward(ba, A_log, dt_bias, strength);
    return {g, beta};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("oryx::_gated_delta_gates_backward", "")
                               .typed<Three(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>();
    const auto s = ctx->get_saved_variables();
    auto [d_ba, d_A_log, d_dt_bias] = op.call(grads[0], grads[1], s[0], s[1], s[2], ctx->saved_data["strength"].toDouble());
    return {d_ba, d_A_log, d_dt_bias, {}};
  }
};

}  // namespace

std::pair<at::Tensor, at::Tensor> gated_delta_gates_naive(const at::Tensor& ba, const at::Tensor& A_log, const at::Tensor& dt_bias, double strength) {
  const int64_t heads = A_log.numel();
  at::Tensor beta = ba.narrow(-1, 0, heads).sigmoid();  // rows apart as they are
  if (strength != 1) beta = beta * strength;
  // logaddexp: torch's softplus turns linear above 20.
  const at::Tensor step = at::logaddexp(rows_apart(ba.narrow(-1, heads, heads) + dt_bias), at::zeros({}, dt_bias.options()));
  return {-A_log.exp() * step, beta};
}

std::pair<at::Tensor, at::Tensor> gated_delta_gates(const at::Tensor& ba, const at::Tensor& A_log, const at::Tensor& dt_bias, double strength) {
  TORCH_CHECK(ba.dim() >= 1 && A_log.dim() == 1 && dt_bias.sizes() == A_log.sizes() && ba.size(-1) == 2 * A_log.numel(), "gated_delta_gates: ba ", ba.sizes(),
              " does not fit A_log ", A_log.sizes(), " and dt_bias ", dt_bias.sizes());
  if (!ba.is_cuda() || ba.scalar_type() != at::kFloat) return gated_delta_gates_naive(ba, A_log, dt_bias, strength);
  if (at::GradMode::is_enabled() && (ba.requires_grad() || A_log.requires_grad() || dt_bias.requires_grad())) {
    const auto out = Gates::apply(ba, A_log, dt_bias, strength);
    return {out[0], out[1]};
  }
  auto [g, beta] = forward(ba, A_log, dt_bias, strength);
  return {g, beta};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def("_gated_delta_gates(Tensor ba, Tensor A_log, Tensor dt_bias, float strength) -> (Tensor, Tensor)");
  m.def(
      "_gated_delta_gates_backward(Tensor d_g, Tensor d_beta, Tensor ba, Tensor A_log, Tensor dt_bias, float strength) -> (Tensor, Tensor, Tensor)");
}

}  // namespace oryx::ops
