#include "oryx/ops/ssd/ssd.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "oryx/ops/ssd/ssd_internal.h"

namespace oryx::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::variable_list;

at::Tensor or_undefined(const OptionalTensor& t) { return t.value_or(at::Tensor()); }
OptionalTensor or_absent(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }

// The vector kernels are float32 on the CPU; the rest takes the chunked form, which runs anywhere.
bool by_vectors(const at::Tensor& v) { return v.is_cpu() && v.scalar_type() != at::kDouble; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> ssd_general(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           const at::Tensor& dt_raw, const at::Tensor& dt_bias, const at::Tensor& A_log,
                                           const at::Tensor& D, const OptionalTensor& initial_state,
                                           const OptionalTensor& cu_seqlens, const OptionalTensor& spans) {
  const SsdInputs in{
      q, k, v, dt_raw, dt_bias, A_log, D, or_undefined(initial_state), or_undefined(cu_seqlens), or_undefined(spans)};
  const SsdSizes sizes = ssd_sizes("ssd", in);
  const at::ScalarType dtype = ssd_compute_dtype(in);
  const SsdResult r = (by_vectors(v) ? ssd_vector : ssd_chunked)(ssd_convert(in, dtype), sizes);
  return {r.o.to(v.scalar_type()), r.final_state};
}

SsdEight ssd_backward_general(const at::Tensor& d_o, const OptionalTensor& d_final_state, const at::Tensor& q,
                              const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                              const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                              const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                              const OptionalTensor& spans) {
  const SsdInputs in{
      q, k, v, dt_raw, dt_bias, A_log, D, or_undefined(initial_state), or_undefined(cu_seqlens), or_undefined(spans)};
  const SsdSizes sizes = ssd_sizes("ssd_backward", in);
  TORCH_CHECK(d_o.sizes() == at::IntArrayRef({sizes.B, sizes.T, sizes.Ho, sizes.V}), "ssd_backward: d_o is ",
              d_o.sizes());
  const at::ScalarType dtype = ssd_compute_dtype(in);
  const at::Tensor d_state = d_final_state ? d_final_state->to(dtype) : at::Tensor();
  const auto run = by_vectors(v) ? ssd_vector_backward : ssd_chunked_backward;
  const SsdGradients g = run(ssd_convert(in, dtype), sizes, d_o.to(dtype), d_state);
  return {g.q.to(q.scalar_type()),
          g.k.to(k.scalar_type()),
          g.v.to(v.scalar_type()),
          g.dt_raw.to(dt_raw.scalar_type()),
          g.dt_bias.to(dt_bias.scalar_type()),
          g.A_log.to(A_log.scalar_type()),
          g.D.to(D.scalar_type()),
          g.initial_state.defined() ? g.initial_state.to(initial_state->scalar_type()) : at::Tensor()};
}

at::Tensor ssd_step_general(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                        const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D, at::Tensor& state) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && dt_raw.dim() == 2,
              "ssd_step: q, k, v must be [N, heads, dim] and dt_raw [N, Hs], got ", q.sizes(), ", ", k.sizes(), ", ",
              v.sizes(), ", ", dt_raw.sizes());
  const SsdInputs in{
      q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), dt_raw.unsqueeze(1), dt_bias, A_log, D, state, {}, {}};
  const SsdSizes sizes = ssd_sizes("ssd_step", in);
  if (by_vectors(v)) {
    const at::Tensor work = state.to(at::kFloat).contiguous();  // the state itself where that is possible
    const at::Tensor o = ssd_vector_step(ssd_convert(in, at::kFloat), sizes, work);
    if (!work.is_same(state)) state.copy_(work);
    return o.squeeze(1).to(v.scalar_type());
  }
  const SsdResult r = ssd_chunked(ssd_convert(in, ssd_compute_dtype(in)), sizes);
  state.copy_(r.final_state);
  return r.o.squeeze(1).to(v.scalar_type());
}

namespace {

auto call(const SsdInputs& in) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::ssd", "").typed<decltype(ssd_general)>();
  return op.call(in.q, in.k, in.v, in.dt_raw, in.dt_bias, in.A_log, in.D, or_absent(in.initial_state),
                 or_absent(in.cu_seqlens), or_absent(in.spans));
}

class SsdFunction : public torch::autograd::Function<SsdFunction> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& dt_raw, const at::Tensor& dt_bias,
                               const at::Tensor& A_log, const at::Tensor& D, const OptionalTensor& initial_state,
                               const OptionalTensor& cu_seqlens, const OptionalTensor& spans) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const SsdInputs in{
        q, k, v, dt_raw, dt_bias, A_log, D, or_undefined(initial_state), or_undefined(cu_seqlens), or_undefined(spans)};
    auto [o, state] = call(in);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, dt_raw, dt_bias, A_log, D, in.initial_state, in.cu_seqlens, in.spans});
    ctx->saved_data["o_sizes"] = o.sizes().vec();
    return {o, state};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("oryx::ssd_backward", "").typed<decltype(ssd_backward_general)>();
    const variable_list s = ctx->get_saved_variables();
    const at::Tensor d_o =
        grads[0].defined() ? grads[0] : at::zeros(ctx->saved_data["o_sizes"].toIntVector(), s[2].options());
    auto [q, k, v, dt_raw, dt_bias, A_log, D, state] =
        op.call(d_o, or_absent(grads[1]), s[0], s[1], s[2], s[3], s[4], s[5], s[6], or_absent(s[7]), or_absent(s[8]),
                or_absent(s[9]));
    return {q, k, v, dt_raw, dt_bias, A_log, D, state, at::Tensor(), at::Tensor()};
  }
};

std::tuple<at::Tensor, at::Tensor> ssd_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                const at::Tensor& dt_raw, const at::Tensor& dt_bias,
                                                const at::Tensor& A_log, const at::Tensor& D,
                                                const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                const OptionalTensor& spans) {
  const variable_list out = SsdFunction::apply(q, k, v, dt_raw, dt_bias, A_log, D, initial_state, cu_seqlens, spans);
  return {out[0], out[1]};
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "ssd(Tensor q, Tensor k, Tensor v, Tensor dt_raw, Tensor dt_bias, Tensor A_log, Tensor D, Tensor? "
      "initial_state=None, "
      "Tensor? cu_seqlens=None, Tensor? spans=None) -> (Tensor o, Tensor final_state)");
  m.def(
      "ssd_backward(Tensor d_o, Tensor? d_final_state, Tensor q, Tensor k, Tensor v, Tensor dt_raw, Tensor dt_bias, "
      "Tensor A_log, "
      "Tensor D, Tensor? initial_state, Tensor? cu_seqlens, Tensor? spans) -> (Tensor d_q, Tensor d_k, Tensor d_v, "
      "Tensor d_dt_raw, "
      "Tensor d_dt_bias, Tensor d_A_log, Tensor d_D, Tensor d_initial_state)");
  m.def(
      "ssd_step(Tensor q, Tensor k, Tensor v, Tensor dt_raw, Tensor dt_bias, Tensor A_log, Tensor D, Tensor(a!) state) "
      "-> Tensor");
}
TORCH_LIBRARY_IMPL(oryx, CPU, m) {
  m.impl("ssd", ssd_general);
  m.impl("ssd_backward", ssd_backward_general);
  m.impl("ssd_step", ssd_step_general);
}
TORCH_LIBRARY_IMPL(oryx, Autograd, m) { m.impl("ssd", ssd_autograd); }

}  // namespace

SsdResult ssd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
              const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
              const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
              const std::optional<at::Tensor>& spans) {
  auto [o, state] = call(
      {q, k, v, dt_raw, dt_bias, A_log, D, or_undefined(initial_state), or_undefined(cu_seqlens), or_undefined(spans)});
  return {o, state};
}

at::Tensor ssd_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D, at::Tensor state) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::ssd_step", "").typed<decltype(ssd_step_general)>();
  at::NoGradGuard no_grad;
  return op.call(q, k, v, dt_raw, dt_bias, A_log, D, state);
}

}  // namespace oryx::ops
