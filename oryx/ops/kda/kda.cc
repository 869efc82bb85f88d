#include "oryx/ops/kda/kda.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "oryx/common/log.h"
#include "oryx/ops/kda/kda_internal.h"

namespace oryx::ops {

namespace {

using kimi::Gradients;
using kimi::Inputs;
using kimi::Outputs;
using kimi::Problem;
using Optional = std::optional<at::Tensor>;

Problem check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
              const Optional& initial_state, const Optional& cu_seqlens, const Optional& spans, std::optional<double> scale, double l2_eps) {
  return kimi::check_arguments("kda", q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
}

// 16-bit values are computed with in float32.
Inputs widen(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta, const Optional& state) {
  const auto wide = [&](const at::Tensor& x) { return x.to(g.scalar_type()); };
  return {wide(q), wide(k), wide(v), wide(g), wide(beta), state.has_value() && state->defined() ? wide(*state) : at::Tensor()};
}

// The vector kernels are float32 on the CPU; what the CUDA kernels do not take goes the chunked form's way, which runs anywhere.
bool by_kernels(const Inputs& x) {
  if (x.g.is_cuda()) log::warn_once("kda: on CUDA by batched matrix products, slowly (the kernels take bfloat16 with 64 or 128 key and as many value dimensions)");
  return x.g.is_cpu() && x.g.scalar_type() == at::kFloat;
}

Outputs forward(const Problem& p, const Inputs& x, bool save) {
  return by_kernels(x) ? kimi::kernel_forward(p, x, save) : kimi::chunked_forward(p, x, save);
}

Gradients backward(const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o, const at::Tensor& d_final) {
  return by_kernels(x) ? kimi::kernel_backward(p, x, saved, d_o, d_final) : kimi::chunked_backward(p, x, saved, d_o, d_final);
}

using DeviceForward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                                     const Optional&, const Optional&, const Optional&, std::optional<double>, double, bool);
using DeviceBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&, const Optional&, const Optional&,
    std::optional<double>, double, const at::Tensor&, const Optional&, const Optional&);

const c10::OperatorHandle& device_forward_operator() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::_kda", "");
  return op;
}

// Returns o, the final state and, if `save`, what the backward pass takes as `saved`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> device_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                                                              const at::Tensor& beta, const Optional& initial_state, const Optional& cu_seqlens,
                                                              const Optional& spans, std::optional<double> scale, double l2_eps, bool save) {
  static const auto op = device_forward_operator().typed<DeviceForward>();
  return op.call(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps, save);
}

std::tuple<at::Tensor, at::Tensor> rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                                        const at::Tensor& beta, const Optional& initial_state, const Optional& cu_seqlens,
                                        const Optional& spans, std::optional<double> scale, double l2_eps) {
  const at::NoGradGuard no_grad;
  if (kimi::device_kernels_take(q, v)) {
    const auto [o, final_state, saved] = device_forward(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps, /*save=*/false);
    return {o, final_state};
  }
  const Problem p = check(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  const Outputs out = forward(p, widen(q, k, v, g, beta, initial_state), /*save=*/false);
  return {out.o.to(v.scalar_type()), out.final_state};
}

class Rule : public torch::autograd::Function<Rule> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                                                const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                                                const Optional& initial_state, const Optional& cu_seqlens, const Optional& spans,
                                                std::optional<double> scale, double l2_eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto or_none = [](const Optional& x) { return x.value_or(at::Tensor()); };
    ctx->set_materialize_grads(false);
    if (kimi::device_kernels_take(q, v)) {
      const auto [o, final_state, saved] = device_forward(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps, /*save=*/true);
      ctx->save_for_backward({q, k, v, g, beta, or_none(initial_state), or_none(cu_seqlens), or_none(spans), saved, {}});
      ctx->saved_data["scale"] = scale;
      ctx->saved_data["l2_eps"] = l2_eps;
      return {o, final_state};
    }
    const Problem p = check(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
    const Outputs out = ops::forward(p, widen(q, k, v, g, beta, initial_state), /*save=*/true);
    ctx->save_for_backward({q, k, v, g, beta, or_none(initial_state), or_none(cu_seqlens), or_none(spans), out.chunk_states, out.residual});
    ctx->saved_data["scale"] = p.scale;
    ctx->saved_data["l2_eps"] = l2_eps;
    return {out.o.to(v.scalar_type()), out.final_state};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list up) {
    const auto s = ctx->get_saved_variables();
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor none;
    const double l2_eps = ctx->saved_data["l2_eps"].toDouble();
    if (kimi::device_kernels_take(s[0], s[2])) {
      static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::_kda_backward", "").typed<DeviceBackward>();
      const auto [d_q, d_k, d_v, d_g, d_beta, d_state] =
          op.call(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], ctx->saved_data["scale"].toOptional<double>(), l2_eps, s[8], up[0], up[1]);
      return {d_q, d_k, d_v, d_g, d_beta, s[5].defined() ? d_state : none, none, none, none, none};
    }
    const Problem p = check(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], ctx->saved_data["scale"].toDouble(), l2_eps);
    const auto wide = s[3].scalar_type(), narrow = s[0].scalar_type();
    const auto upstream = [&](const at::Tensor& x, at::IntArrayRef shape) { return x.defined() ? x.to(wide).contiguous() : at::zeros(shape, s[3].options()); };
    const Gradients d = ops::backward(p, widen(s[0], s[1], s[2], s[3], s[4], s[5]), {{}, {}, s[8], s[9]}, upstream(up[0], {p.B, p.T, p.Ho, p.V}),
                                      upstream(up[1], {p.N, p.Hs, p.V, p.K}));
    return {d.q.to(narrow), d.k.to(narrow), d.v.to(narrow), d.g, d.beta, s[5].defined() ? d.state : none, none, none, none, none};
  }
};

std::tuple<at::Tensor, at::Tensor> rule_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                                                 const at::Tensor& beta, const Optional& initial_state, const Optional& cu_seqlens,
                                                 const Optional& spans, std::optional<double> scale, double l2_eps) {
  const auto needs = [](const at::Tensor& x) { return x.requires_grad(); };
  const bool any = needs(q) || needs(k) || needs(v) || needs(g) || needs(beta) ||
                   (initial_state.has_value() && initial_state->defined() && needs(*initial_state));
  if (!any || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return rule(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  }
  const auto out = Rule::apply(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  return {out[0], out[1]};
}

at::Tensor step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                std::optional<double> scale, double l2_eps) {
  const at::NoGradGuard no_grad;
  const Problem p = kimi::check_step(q, k, v, g, beta, state, scale, l2_eps);
  Inputs x = widen(q, k, v, g, beta, {});
  for (at::Tensor* t : {&x.q, &x.k, &x.v, &x.g, &x.beta}) *t = t->contiguous();
  if (state.scalar_type() == at::kDouble || !state.is_cpu()) return kimi::plain_step(p, x, state).to(v.scalar_type());
  if (state.stride(3) == 1 && state.stride(2) == p.K) return kimi::kernel_step(p, x, state).to(v.scalar_type());
  log::warn_once("kda_step: the state's last two axes are not dense; stepping by plain tensor operations, slowly");
  return kimi::plain_step(p, x, state).to(v.scalar_type());
}

}  // namespace

bool kimi::device_kernels_take(const at::Tensor& q, const at::Tensor& v) {
  return q.is_cuda() && q.scalar_type() == at::kBFloat16 && q.dim() == 4 && (q.size(3) == 64 || q.size(3) == 128) && v.dim() == 4 && v.size(3) == q.size(3) &&
         device_forward_operator().hasKernelForDispatchKey(c10::DispatchKey::CUDA);
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "kda(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state=None, Tensor? cu_seqlens=None, "
      "Tensor? spans=None, float? scale=None, float l2_eps=1e-06) -> (Tensor, Tensor)");
  m.def(
      "kda_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, float? scale=None, float l2_eps=1e-06) "
      "-> Tensor");
}
// The CUDA kernels (kda_cuda.cc): kda dispatches to them what they take.
TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "_kda(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, Tensor? spans, float? scale, float l2_eps, bool save) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "_kda_backward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, Tensor? spans, float? scale, float l2_eps, "
      "Tensor saved, Tensor? d_o, Tensor? d_final_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(oryx, CPU, m) {
  m.impl("kda", rule);
  m.impl("kda_step", step);
}
TORCH_LIBRARY_IMPL(oryx, AutogradCPU, m) { m.impl("kda", rule_autograd); }
// The same functions: the forms behind them run on any device.
TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("kda", rule);
  m.impl("kda_step", step);
}
TORCH_LIBRARY_IMPL(oryx, AutogradCUDA, m) { m.impl("kda", rule_autograd); }

KdaResult kda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
              const Optional& initial_state, const Optional& cu_seqlens, const Optional& spans, std::optional<double> scale, double l2_eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("oryx::kda", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                                       const at::Tensor&, const Optional&, const Optional&, const Optional&,
                                                                       std::optional<double>, double)>();
  auto [o, final_state] = op.call(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  return {o, final_state};
}

at::Tensor kda_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                    at::Tensor state, std::optional<double> scale, double l2_eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("oryx::kda_step", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                               at::Tensor&, std::optional<double>, double)>();
  return op.call(q, k, v, g, beta, state, scale, l2_eps);
}

}  // namespace oryx::ops
