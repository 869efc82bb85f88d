// What the gated delta rule and its relatives hand to their launchers on CUDA: tensors in, device pointers out. `Rule` names one of them:
//
//   struct Rule {
//     using Problem, Arguments, Gradients;                    // of its check_shapes() and of its launchers
//     static constexpr const char* kName;
//     static Problem check(op, q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
//     static size_t saved(a), workspace(a), backward_workspace(a);
//     static int forward(a, workspace, stream), backward(a, d, workspace, stream);
//   };
#pragma once

#include <ATen/ATen.h>

#include <cfloat>
#include <cstdint>
#include <optional>
#include <tuple>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/gated_delta/cuda/gated_delta_cuda.h"

namespace oryx::ops::delta {

using Optional = std::optional<at::Tensor>;

// Contiguous, on q's device, starting at a multiple of 16 bytes.
inline at::Tensor plain(const at::Tensor& x, const at::Tensor& q) {
  const at::Tensor y = x.to(q.device(), /*non_blocking=*/true).contiguous();
  return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0 ? y : y.clone();
}

inline at::Tensor plain_or_none(const Optional& x, const at::Tensor& q) { return x.has_value() && x->defined() ? plain(*x, q) : at::Tensor(); }

// The launchers' arguments and the tensors that keep them alive.
template <typename Rule>
struct Call {
  typename Rule::Problem p;
  at::Tensor q, k, v, g, beta, state, cu_seqlens, wanted;
  typename Rule::Arguments arguments{};

  Call(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& g_in, const at::Tensor& beta_in,
       const Optional& state_in, const Optional& cu_in, const Optional& spans, std::optional<double> scale, double l2_eps)
      : p(Rule::check(Rule::kName, q_in, k_in, v_in, g_in, beta_in, state_in, cu_in, spans, scale, l2_eps)),
        q(plain(q_in, q_in)),
        k(plain(k_in, q)),
        v(plain(v_in, q)),
        g(plain(g_in, q)),
        beta(plain(beta_in, q)),
        state(plain_or_none(state_in, q)),
        cu_seqlens(plain_or_none(cu_in, q)),
        wanted(mask(spans)) {
    TORCH_CHECK(p.B * p.T <= INT32_MAX / 2, Rule::kName, ": ", p.B * p.T, " tokens are more than the CUDA kernels take");
    typename Rule::Arguments& a = arguments;
    a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
    a.g = g.const_data_ptr<float>(), a.beta = beta.const_data_ptr<float>();
    a.initial_state = static_cast<const float*>(cuda::read_or_null(state));
    a.cu_seqlens = static_cast<const int32_t*>(cuda::read_or_null(cu_seqlens));
    a.wanted = static_cast<const uint8_t*>(cuda::read_or_null(wanted));
    const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
    a.B = narrow(p.B), a.T = narrow(p.T), a.N = narrow(p.N), a.Hq = narrow(p.Hq), a.Hk = narrow(p.Hk), a.Hv = narrow(p.Hv), a.D = narrow(p.K);
    a.scale = p.scale == 0 ? FLT_MIN : static_cast<float>(p.scale), a.l2_eps = static_cast<float>(l2_eps);
  }

  at::Tensor bytes(size_t n) const { return at::empty({static_cast<int64_t>(n)}, q.options().dtype(at::kByte)); }

 private:
  at::Tensor mask(const Optional& spans) const {
    const at::Tensor s = plain_or_none(spans, q);
    if (!s.defined()) return {};
    const at::Tensor m = at::empty({p.B, p.T}, s.options().dtype(at::kByte));
    cuda::check(Rule::kName, oryx_gated_delta_wanted(s.const_data_ptr<int32_t>(), static_cast<int32_t>(s.size(0)), static_cast<int32_t>(p.B), static_cast<int32_t>(p.T),
                                                     m.mutable_data_ptr<uint8_t>(), cuda::stream_of(q)));
    return m;
  }
};

// -> o, the final state, and what the backward pass wants (of no bytes without `save`).
template <typename Rule>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                                                         const at::Tensor& beta, const Optional& initial_state, const Optional& cu_seqlens,
                                                         const Optional& spans, std::optional<double> scale, double l2_eps, bool save) {
  const c10::cuda::CUDAGuard guard(q.device());
  Call<Rule> c(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  const auto& p = c.p;
  const at::Tensor o = at::empty({p.B, p.T, p.Ho, p.V}, q.options());
  const at::Tensor final_state = at::empty({p.N, p.Hs, p.V, p.K}, c.g.options());
  const at::Tensor saved = c.bytes(save ? Rule::saved(&c.arguments) : 0);
  c.arguments.o = o.mutable_data_ptr(), c.arguments.final_state = final_state.mutable_data_ptr<float>();
  if (save) c.arguments.saved = saved.mutable_data_ptr();
  const at::Tensor workspace = c.bytes(Rule::workspace(&c.arguments));
  cuda::check(Rule::kName, Rule::forward(&c.arguments, workspace.mutable_data_ptr(), cuda::stream_of(c.q)));
  return {o, final_state, saved};
}

// -> the gradients of q, k, v, g, beta and of the initial state, undefined without one.
template <typename Rule>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cuda(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta, const Optional& initial_state,
    const Optional& cu_seqlens, const Optional& spans, std::optional<double> scale, double l2_eps, const at::Tensor& saved, const Optional& d_o,
    const Optional& d_final_state) {
  const c10::cuda::CUDAGuard guard(q.device());
  Call<Rule> c(q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  const auto& p = c.p;
  c.arguments.saved = saved.mutable_data_ptr();
  const at::Tensor up = d_o.has_value() && d_o->defined() ? plain(d_o->to(q.scalar_type()), c.q) : at::zeros({p.B, p.T, p.Ho, p.V}, q.options());
  const at::Tensor up_state = plain_or_none(d_final_state, c.q);
  const at::Tensor d_q = at::empty_like(c.q), d_k = at::empty_like(c.k), d_v = at::empty_like(c.v), d_g = at::empty_like(c.g),
                   d_beta = at::empty_like(c.beta), d_state = c.state.defined() ? at::empty_like(c.state) : at::Tensor();
  const typename Rule::Gradients gradients{up.const_data_ptr(), static_cast<const float*>(cuda::read_or_null(up_state)),
                                          d_q.mutable_data_ptr(), d_k.mutable_data_ptr(), d_v.mutable_data_ptr(), d_g.mutable_data_ptr<float>(),
                                          d_beta.mutable_data_ptr<float>(), static_cast<float*>(cuda::write_or_null(d_state))};
  const at::Tensor workspace = c.bytes(Rule::backward_workspace(&c.arguments));
  cuda::check(Rule::kName, Rule::backward(&c.arguments, &gradients, workspace.mutable_data_ptr(), cuda::stream_of(c.q)));
  return {d_q, d_k, d_v, d_g, d_beta, d_state};
}

}  // namespace oryx::ops::delta
