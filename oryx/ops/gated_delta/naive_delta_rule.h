// The delta rule's formula token by token, for one decay a head (gated_delta.h) and for one a key channel (kda.h): slow, obvious, differentiable by autograd.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "oryx/ops/gated_delta/gated_delta_layout.h"

namespace oryx::ops::gated_delta {

// Rows that advance together: q^ [B, T, Ho, K], k^ [B, T, Hs, K], v [B, T, Hs, V], g [B, T, Hs, K] or [B, T, Hs, 1], beta [B, T, Hs], S [B, Hs, V, K].
inline std::pair<at::Tensor, at::Tensor> naive_recurrence(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
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

// Arguments as of the operators, checked (`p`), but for g, which has a last axis of K or 1. Returns o and the final state.
inline std::pair<at::Tensor, at::Tensor> naive_delta_rule(const Problem& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                                                          const at::Tensor& beta, const std::optional<at::Tensor>& initial_state, bool packed) {
  const auto wide = g.scalar_type();
  const at::Tensor qn = spread(normalise(q.to(wide), p.l2_eps).x, p.Ho) * p.scale;
  const at::Tensor kn = spread(normalise(k.to(wide), p.l2_eps).x, p.Hs), vs = spread(v.to(wide), p.Hs);
  const bool given = initial_state.has_value() && initial_state->defined();
  const at::Tensor S0 = given ? *initial_state : at::zeros({p.N, p.Hs, p.V, p.K}, g.options());
  at::Tensor o, S;
  if (packed) {
    std::vector<at::Tensor> os, states;
    for (int64_t n = 0; n < p.N; ++n) {
      const auto [begin, end] = p.sequences[n];
      const auto part = [begin = begin, end = end](const at::Tensor& x) { return x.slice(1, begin, end); };
      auto [on, Sn] = naive_recurrence(part(qn), part(kn), part(vs), part(g), part(beta), S0.slice(0, n, n + 1));
      os.push_back(on);
      states.push_back(Sn);
    }
    o = at::cat(os, 1);
    S = at::cat(states, 0);
  } else {
    std::tie(o, S) = naive_recurrence(qn, kn, vs, g, beta, S0);
  }
  return {wanted_only(p, o).to(v.scalar_type()), S};
}

}  // namespace oryx::ops::gated_delta
