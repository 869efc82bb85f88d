// The chunked parallel form from ATen's batched matrix products: float64, and the independent check of the float32
// kernels.
//
// Within a chunk of C tokens that starts from state S0, with G_ij = exp(g_{j+1} + .. + g_i) for j <= i (else 0), c_i =
// exp(g_1 + .. + g_i):
//
//   A = strictly lower(diag(b) G * k k^T)            u_i = b_i (v_i - a_i S_{i-1} k_i), the written values:
//   U = (I + A)^-1 diag(b) (v - diag(c) k S0^T)      o = scale (diag(c) q S0^T + (G * q k^T) U)
//   S_C = c_C S0 + U^T diag(G_C) k
//
// (the WY form of Yang et al. 2024, arXiv 2406.06484, with the decays of 2412.06464). Decays are always exp of the sum
// over the segment in question, never a quotient or a difference of running sums: those lose their digits after a
// strong decay.
#include <ATen/ATen.h>

#include "oryx/ops/gated_delta/gated_delta_internal.h"
#include "oryx/ops/gated_delta/gated_delta_layout.h"

namespace oryx::ops::gated_delta {

namespace {

// G of the head of this file from g [..., C].
at::Tensor segment_decay(const at::Tensor& g) {
  const int64_t C = g.size(-1);
  const at::Tensor from = at::ones({C, C}, g.options().dtype(at::kBool));
  const at::Tensor sums = at::where(from.tril(-1), rows(g), at::zeros({}, g.options())).cumsum(-2);
  return at::where(from.tril(), sums.exp(), at::zeros({}, g.options()));
}

// Everything of a chunk that does not depend on the state. Head axes: k, v side [M, Hs, ...], q side [M, Hs, groups,
// ...].
struct Terms {
  Unit qn, kn;             // token layout, heads as given
  at::Tensor q, k, v, b;   // chunk layout; q [M, Hs, groups, C, K], others [M, Hs, C, .]
  at::Tensor G, c, end;    // [M, Hs, C, C], [M, Hs, C] from the start, [M, Hs, C] to the end
  at::Tensor kk, inverse;  // k k^T, (I + A)^-1
  at::Tensor last;         // [M, Hs, 1, 1] decay over the chunk
  at::Tensor qk;           // [M, Hs, groups, C, C]

  Terms(const Problem& p, const Inputs& x, const Layout& layout)
      : qn(normalise(x.q, p.l2_eps)), kn(normalise(x.k, p.l2_eps)) {
    q = layout.to_chunks(spread(qn.x, p.Ho)).unflatten(1, {p.Hs, p.groups});
    k = layout.to_chunks(spread(kn.x, p.Hs));
    v = layout.to_chunks(spread(x.v, p.Hs));
    b = layout.to_chunks(x.beta);
    const at::Tensor g = layout.to_chunks(x.g);
    G = segment_decay(g);
    c = g.cumsum(-1).exp();
    end = G.select(-2, kChunk - 1);
    last = c.narrow(-1, kChunk - 1, 1).unsqueeze(-1);
    kk = at::matmul(k, k.mT());
    const at::Tensor eye = at::eye(kChunk, g.options());
    const at::Tensor A = (rows(b) * G * kk).tril(-1);
    inverse = at::linalg_solve_triangular(A + eye, eye.expand_as(A).contiguous(), /*upper=*/false, /*left=*/true,
                                          /*unitriangular=*/true);
    qk = at::matmul(q, k.unsqueeze(2).mT());
  }
};

}  // namespace

Outputs chunked_forward(const Problem& p, const Inputs& x, bool save) {
  Outputs out;
  at::Tensor S = start_state(p, x);  // [N, Hs, V, K]
  const Layout layout(p, x.g.device());
  if (layout.M == 0)
    return {at::zeros({p.B, p.T, p.Ho, p.V}, x.v.options()), S, at::empty({0, p.Hs, p.V, p.K}, S.options()), {}};
  const Terms t(p, x, layout);
  const at::Tensor value = at::matmul(t.inverse, rows(t.b) * t.v);  // U = value - key S0^T
  const at::Tensor key = at::matmul(t.inverse, rows(t.b * t.c) * t.k);
  const at::Tensor k_end = rows(t.end) * t.k;
  at::Tensor S0 = at::empty({layout.M, p.Hs, p.V, p.K}, S.options()), U = at::empty_like(t.v);
  for (size_t i = 0; i < layout.chunks.size(); ++i) {
    const auto& m = layout.chunks[i];
    const at::Tensor s = S.index_select(0, layout.sequences[i]);
    const at::Tensor u = value.index_select(0, m) - at::matmul(key.index_select(0, m), s.mT());
    S0.index_copy_(0, m, s);
    U.index_copy_(0, m, u);
    S.index_copy_(0, layout.sequences[i], t.last.index_select(0, m) * s + at::matmul(u.mT(), k_end.index_select(0, m)));
  }
  const at::Tensor past = rows(t.c).unsqueeze(2) * at::matmul(t.q, S0.unsqueeze(2).mT());
  const at::Tensor o = p.scale * (past + at::matmul(t.G.unsqueeze(2) * t.qk, U.unsqueeze(2)));
  out.o = wanted_only(p, layout.to_tokens(p, o.flatten(1, 2)));
  out.final_state = S;
  if (save) out.chunk_states = S0;
  return out;
}

// With P = scale G * q k^T, W = v - diag(c) k S0^T, z = W - (G * k k^T) U the residuals (U = diag(b) z):
//
//   dU = P^T do + diag(G_C) k dS_C^T     y = (I + A)^-T dU     db = y . z     dW = dv = diag(b) y
//   dS0 = c_C dS_C - (diag(c) dW)^T k + scale (diag(c) do)^T q
//   dq = scale diag(c) do S0 + E_q k                      E_q = scale G * (do U^T)
//   dk = -diag(c) dW S0 + E_q^T q + (E_k + E_k^T) k + diag(G_C) U dS_C        E_k = -strictly lower(G * (dW U^T))
//
// Each decay's gradient times the decay itself is D_ij = E_q * q k^T + E_k * k k^T for G_ij, and a row-wise dot product
// for c and G_C; g_l meets every G_ij with j < l <= i, c_i with i >= l, G_C,j with j < l.
Gradients chunked_backward(const Problem& p, const Inputs& x, const Outputs& saved, const at::Tensor& d_o,
                           const at::Tensor& d_final) {
  const Layout layout(p, x.g.device());
  at::Tensor dS = d_final.clone();
  Gradients d;
  if (layout.M == 0) {
    return {at::zeros_like(x.q), at::zeros_like(x.k),    at::zeros_like(x.v),
            at::zeros_like(x.g), at::zeros_like(x.beta), dS};
  }
  const Terms t(p, x, layout);
  const at::Tensor& S0 = saved.chunk_states;
  const at::Tensor up = p.scale * layout.to_chunks(wanted_only(p, d_o)).unflatten(1, {p.Hs, p.groups});  // scale do
  const at::Tensor W = t.v - rows(t.c) * at::matmul(t.k, S0.mT());
  const at::Tensor U = at::matmul(t.inverse, rows(t.b) * W);
  const at::Tensor z = W - at::matmul((t.G * t.kk).tril(-1), U);

  const at::Tensor up_past = rows(t.c).unsqueeze(2) * up;
  const at::Tensor dU_o = at::matmul((t.G.unsqueeze(2) * t.qk).mT(), up).sum(2);
  const at::Tensor dS_o = at::matmul(up_past.mT(), t.q).sum(2);
  const at::Tensor k_end = rows(t.end) * t.k, k_start = rows(t.c) * t.k;
  at::Tensor dS_end = at::empty_like(S0), y = at::empty_like(t.v);
  for (size_t i = layout.chunks.size(); i-- > 0;) {
    const auto& m = layout.chunks[i];
    const at::Tensor ds = dS.index_select(0, layout.sequences[i]);
    const at::Tensor du = dU_o.index_select(0, m) + at::matmul(k_end.index_select(0, m), ds.mT());
    const at::Tensor yi = at::matmul(t.inverse.index_select(0, m).mT(), du);
    const at::Tensor dw = rows(t.b.index_select(0, m)) * yi;
    dS_end.index_copy_(0, m, ds);
    y.index_copy_(0, m, yi);
    dS.index_copy_(
        0, layout.sequences[i],
        t.last.index_select(0, m) * ds + dS_o.index_select(0, m) - at::matmul(dw.mT(), k_start.index_select(0, m)));
  }

  const at::Tensor dW = rows(t.b) * y;
  const at::Tensor Eq = t.G.unsqueeze(2) * at::matmul(up, U.unsqueeze(2).mT());  // [M, Hs, groups, C, C]
  const at::Tensor Ek = -(t.G * at::matmul(dW, U.mT())).tril(-1);
  const at::Tensor dq_past = at::matmul(up_past, S0.unsqueeze(2));
  const at::Tensor dk_past = -at::matmul(rows(t.c) * dW, S0);
  const at::Tensor dk_end = rows(t.end) * at::matmul(U, dS_end);
  const at::Tensor dq = dq_past + at::matmul(Eq, t.k.unsqueeze(2));
  const at::Tensor dk = dk_past + dk_end + at::matmul(Eq.mT(), t.q).sum(2) + at::matmul(Ek + Ek.mT(), t.k);

  // D summed over i >= l (flip, cumsum, flip), then over j < l.
  const at::Tensor D = ((Eq * t.qk).sum(2) + Ek * t.kk).tril(-1).flip(-2).cumsum(-2).flip(-2);
  const at::Tensor from_start = (t.q * dq_past).sum(-1).sum(2) + (t.k * dk_past).sum(-1);  // [M, Hs, C] of c_i
  const at::Tensor to_end = (t.k * dk_end).sum(-1);                                        // of G_C,j
  const at::Tensor whole = (t.last * S0 * dS_end).sum(-1).sum(-1, true);                   // of c_C
  const at::Tensor dg =
      D.tril(-1).sum(-1) + from_start.flip(-1).cumsum(-1).flip(-1) + (to_end.cumsum(-1) - to_end) + whole;

  d.q = normalise_backward(t.qn, gather_heads(layout.to_tokens(p, dq.flatten(1, 2)), p.Hq));
  d.k = normalise_backward(t.kn, gather_heads(layout.to_tokens(p, dk), p.Hk));
  d.v = gather_heads(layout.to_tokens(p, dW), p.Hv);
  d.g = layout.to_tokens(p, dg);
  d.beta = layout.to_tokens(p, (y * z).sum(-1));
  d.state = dS;
  return d;
}

at::Tensor plain_step(const Problem& p, const Inputs& x, at::Tensor& state) { return delta_step(p, x, rows(rows(x.g.exp())), state); }

}  // namespace oryx::ops::gated_delta
