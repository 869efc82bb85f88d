// The formula, token by token: slow, obvious, differentiable by autograd. The other forms are tested against it.
#include <ATen/ATen.h>

#include "oryx/ops/gated_delta/gated_delta_layout.h"
#include "oryx/ops/kda/kda.h"
#include "oryx/ops/kda/kda_internal.h"

namespace oryx::ops {

namespace {

// Rows that advance together: q^ [B, T, Ho, K], k^ [B, T, Hs, K], v [B, T, Hs, V], g [B, T, Hs, K], beta [B, T, Hs], S [B, Hs, V, K].
std::pair<at::Tensor, at::Tensor> recur(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                                        const at::Tensor& beta, at::Tensor S) {
  const int64_t T = q.size(1), groups = q.size(2) / k.size(2);
  std::vector<at::Tensor> o;
  for (int64_t t = 0; t < T; ++t) {
    const at::Tensor kt = k.select(1, t).unsqueeze(-2);                   // [B, Hs, 1, K]
    const at::Tensor decayed = S * g.select(1, t).exp().unsqueeze(-2);    // each column by its channel's decay
    const at::Tensor residual = v.select(1, t) - (decayed * kt).sum(-1);  // [B, Hs, V]
    S = decayed + (beta.select(1, t).unsqueeze(-1) * residual).unsqueeze(-1) * kt;
    o.push_back((S.repeat_interleave(groups, 1) * q.select(1, t).unsqueeze(-2)).sum(-1));
  }
  if (o.empty()) return {at::zeros({q.size(0), 0, q.size(2), v.size(3)}, v.options()), S};
  return {at::stack(o, 1), S};
}

}  // namespace

KdaResult kda_naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
                    const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
                    const std::optional<at::Tensor>& spans, std::optional<double> scale, double l2_eps) {
  using gated_delta::normalise;
  using gated_delta::spread;
  const auto p = kimi::check_arguments("kda_naive", q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  const auto wide = g.scalar_type();
  const at::Tensor qn = spread(normalise(q.to(wide), l2_eps).x, p.Ho) * p.scale;
  const at::Tensor kn = spread(normalise(k.to(wide), l2_eps).x, p.Hs), vs = spread(v.to(wide), p.Hs);
  const bool given = initial_state.has_value() && initial_state->defined();
  const at::Tensor S0 = given ? *initial_state : at::zeros({p.N, p.Hs, p.V, p.K}, g.options());

  at::Tensor o, S;
  if (cu_seqlens.has_value() && cu_seqlens->defined()) {
    std::vector<at::Tensor> os, states;
    for (int64_t n = 0; n < p.N; ++n) {
      const auto [begin, end] = p.sequences[n];
      const auto part = [begin = begin, end = end](const at::Tensor& x) { return x.slice(1, begin, end); };
      auto [on, Sn] = recur(part(qn), part(kn), part(vs), part(g), part(beta), S0.slice(0, n, n + 1));
      os.push_back(on);
      states.push_back(Sn);
    }
    o = at::cat(os, 1);
    S = at::cat(states, 0);
  } else {
    std::tie(o, S) = recur(qn, kn, vs, g, beta, S0);
  }
  return {gated_delta::wanted_only(p, o).to(v.scalar_type()), S};
}

}  // namespace oryx::ops
