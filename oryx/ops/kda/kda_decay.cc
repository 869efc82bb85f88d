#include "oryx/ops/kda/kda_decay.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "oryx/ops/few_rows/few_rows.h"

namespace oryx::ops {

namespace {

at::Tensor decay_forward(const at::Tensor& x, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::_kda_decay", "").typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  return op.call(x, A_log, dt_bias);
}

struct Decay : torch::autograd::Function<Decay> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& A_log, const at::Tensor& dt_bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, A_log, dt_bias});
    return {decay_forward(x, A_log, dt_bias)};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("oryx::_kda_decay_backward", "")
                               .typed<Three(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
    const auto s = ctx->get_saved_variables();
    auto [d_x, d_A_log, d_dt_bias] = op.call(grads[0], s[0], s[1], s[2]);
    return {d_x, d_A_log, d_dt_bias};
  }
};

}  // namespace

at::Tensor kda_decay_naive(const at::Tensor& x, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  // logaddexp: torch's softplus turns linear above 20.
  const at::Tensor step = at::logaddexp(rows_apart(x + dt_bias), at::zeros({}, dt_bias.options()));
  return -A_log.exp().unsqueeze(-1) * step.unflatten(-1, {A_log.numel(), -1});
}

at::Tensor kda_decay(const at::Tensor& x, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  TORCH_CHECK(x.dim() >= 1 && A_log.dim() == 1 && dt_bias.dim() == 1 && x.size(-1) == dt_bias.numel() && A_log.numel() > 0 && dt_bias.numel() % A_log.numel() == 0,
              "kda_decay: x ", x.sizes(), " does not fit A_log ", A_log.sizes(), " and dt_bias ", dt_bias.sizes());
  if (!x.is_cuda() || x.scalar_type() != at::kFloat || dt_bias.numel() / A_log.numel() % 4 != 0) return kda_decay_naive(x, A_log, dt_bias);
  if (at::GradMode::is_enabled() && (x.requires_grad() || A_log.requires_grad() || dt_bias.requires_grad())) return Decay::apply(x, A_log, dt_bias)[0];
  return decay_forward(x, A_log, dt_bias);
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def("_kda_decay(Tensor x, Tensor A_log, Tensor dt_bias) -> Tensor");
  m.def("_kda_decay_backward(Tensor d_g, Tensor x, Tensor A_log, Tensor dt_bias) -> (Tensor, Tensor, Tensor)");
}

}  // namespace oryx::ops
