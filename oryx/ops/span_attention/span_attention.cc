#include "oryx/ops/span_attention/span_attention.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "oryx/common/log.h"
#include "oryx/ops/span_attention/span_attention_blockwise.h"
#include "oryx/ops/span_attention/span_attention_cpu.h"
#include "oryx/ops/span_attention/span_attention_internal.h"
#include "oryx/ops/span_attention/span_attention_plan.h"

namespace oryx::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::pair<at::Tensor, at::Tensor> forward_with_lse(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                   const AttentionPlan& plan, bool want_lse) {
  if (q.scalar_type() == at::kDouble) return span_attention_blockwise(q, k, v, plan);
  if (!q.is_cpu()) {
    log::warn_once("span_attention: {} on CUDA by blocks of batched matrix products, slowly", c10::toString(q.scalar_type()));
    const auto out = span_attention_blockwise(q.to(at::kFloat), k.to(at::kFloat), v.to(at::kFloat), plan);
    return {out.first.to(q.scalar_type()), out.second};
  }
  return span_attention_cpu(q, k, v, plan, want_lse);
}

std::array<at::Tensor, 3> backward_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& o,
                                      const at::Tensor& lse, const at::Tensor& d_o, const AttentionPlan& plan) {
  if (q.scalar_type() == at::kDouble) return span_attention_blockwise_backward(q, k, v, o, lse, d_o, plan);
  if (q.is_cpu()) return span_attention_cpu_backward(q, k, v, o, lse, d_o, plan);
  const auto wide = [](const at::Tensor& x) { return x.to(at::kFloat); };
  auto d = span_attention_blockwise_backward(wide(q), wide(k), wide(v), wide(o), lse, wide(d_o), plan);
  for (at::Tensor& x : d) x = x.to(q.scalar_type());
  return d;
}

// Saves o and the logarithms of the denominators; the backward pass computes the probabilities again from them.
struct SpanAttentionFunction : torch::autograd::Function<SpanAttentionFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const OptionalTensor& spans, const OptionalTensor& cu_seqlens,
                            const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths, int64_t window,
                            std::optional<double> scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const AttentionPlan plan =
        make_attention_plan(q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
    const auto [o, lse] = forward_with_lse(q, k, v, plan, true);
    const auto or_none = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward(
        {q, k, v, o, lse, or_none(spans), or_none(cu_seqlens), or_none(cu_seqlens_k), or_none(key_lengths)});
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = plan.scale;
    return o;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : OptionalTensor(); };
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &o = saved[3], &lse = saved[4];
    const AttentionPlan plan =
        make_attention_plan(q, k, v, optional(5), optional(6), optional(7), optional(8),
                            ctx->saved_data["window"].toInt(), ctx->saved_data["scale"].toDouble());
    const auto d = backward_of(q, k, v, o, lse, grads[0], plan);
    const at::Tensor none;
    return {d[0], d[1], d[2], none, none, none, none, none, none};
  }
};

}  // namespace

at::Tensor span_attention_any(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& spans,
                       const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k,
                       const OptionalTensor& key_lengths, int64_t window, std::optional<double> scale) {
  const AttentionPlan plan = make_attention_plan(q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  return forward_with_lse(q, k, v, plan, false).first;
}

at::Tensor span_attention_any_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& spans,
                            const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k,
                            const OptionalTensor& key_lengths, int64_t window, std::optional<double> scale) {
  if (at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad())) {
    return SpanAttentionFunction::apply(q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return span_attention_any(q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
}

at::Tensor span_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& spans,
                          const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k,
                          const OptionalTensor& key_lengths, int64_t window, std::optional<double> scale) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::span_attention", "").typed<decltype(span_attention_any)>();
  return op.call(q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
}

}  // namespace oryx::ops

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "span_attention(Tensor q, Tensor k, Tensor v, Tensor? spans=None, Tensor? cu_seqlens=None, Tensor? "
      "cu_seqlens_k=None, "
      "Tensor? key_lengths=None, int window=0, float? scale=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(oryx, CPU, m) { m.impl("span_attention", oryx::ops::span_attention_any); }
TORCH_LIBRARY_IMPL(oryx, AutogradCPU, m) { m.impl("span_attention", oryx::ops::span_attention_any_autograd); }
