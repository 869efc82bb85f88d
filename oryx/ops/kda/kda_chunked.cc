// The chunked parallel form from ATen's batched matrix products, forward and backward.
//
// Within a chunk of C tokens that starts from state S0, with G_ij = exp(g_{j+1} + .. + g_i), a vector over K, for j <= i, c_i = exp(g_1 + ..
// + g_i) and e_j = G_Cj:
//
//   P_kk[i, j] = k_i . (G_ij * k_j),  P_qk[i, j] = q_i . (G_ij * k_j)        lower triangles
//   A = strictly lower(diag(b) P_kk)             U = (I + A)^-1 diag(b) (v - (c * k) S0^T), the written values
//   o = scale ((c * q) S0^T + P_qk U)            S_C = S0 diag(c_C) + U^T (e * k)
//
// (the WY form of arXiv 2510.26692, section 3). P is no plain product: its decay depends on row, column and channel. It factors as (q_i *
// exp(sum of g from r to i)) . (k_j * exp(sum of g from j to r)) for any reference point r; only with j <= r <= i are both exponents at or
// below zero, so that nothing overflows however strong the decay. A binary tree gives each pair such a point: a block of 2h tokens is cut in
// the middle, its later half meets its earlier half across the cut, and both halves are cut again (secondary chunking down to single tokens).
// That is log2(C) batched products, in all half the work of one full product. Decays are exp of a sum over the segment in question, never of a
// difference of running sums, which would lose its digits after a strong decay.
#include <ATen/ATen.h>

#include "oryx/ops/gated_delta/gated_delta_layout.h"
#include "oryx/ops/kda/kda_internal.h"

namespace oryx::ops::kimi {

namespace {

using namespace gated_delta;

at::Tensor suffix_sum(const at::Tensor& x, int64_t dim) { return x.flip(dim).cumsum(dim).flip(dim); }

// Of all elements behind (before) this one along an axis.
at::Tensor sum_behind(const at::Tensor& x, int64_t dim) {
  const int64_t n = x.size(dim);
  return at::cat({suffix_sum(x.narrow(dim, 1, n - 1), dim), at::zeros_like(x.narrow(dim, 0, 1))}, dim);
}
at::Tensor sum_before(const at::Tensor& x, int64_t dim) {
  const int64_t n = x.size(dim);
  return at::cat({at::zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, n - 1).cumsum(dim)}, dim);
}

// One level of the tree: blocks of 2h tokens, cut in the middle. x [M, Hs, C, ...] -> its earlier or later halves, [M, Hs, C / 2h, h, ...].
struct Level {
  int64_t h;
  at::Tensor later, earlier;  // decay from the cut to each token of the later half, to the cut from each of the earlier half: [M, Hs, n, h, K]

  Level(const at::Tensor& g, int64_t half) : h(half) {
    later = later_half(g).cumsum(3).exp();
    earlier = sum_behind(earlier_half(g), 3).exp();
  }
  at::Tensor halves(const at::Tensor& x) const { return x.unflatten(2, {kChunk / (2 * h), 2, h}); }
  at::Tensor earlier_half(const at::Tensor& x) const { return halves(x).select(3, 0); }
  at::Tensor later_half(const at::Tensor& x) const { return halves(x).select(3, 1); }
  // The blocks of P [M, Hs, C, R, C] below the cuts, a view: [M, Hs, n, h, R, h].
  at::Tensor blocks(const at::Tensor& P) const {
    const int64_t n = kChunk / (2 * h);
    const at::Tensor diagonal = P.unflatten(4, {n, 2 * h}).unflatten(2, {n, 2 * h}).diagonal(0, 2, 5);  // [M, Hs, 2h, R, 2h, n]
    return diagonal.narrow(2, h, h).narrow(4, 0, h).movedim(-1, 2);
  }
  // Rows that meet k: [M, Hs, n, h R, K].
  at::Tensor decayed_rows(const at::Tensor& x) const { return (later_half(x) * later.unsqueeze(4)).flatten(3, 4); }
  at::Tensor decayed_keys(const at::Tensor& k) const { return earlier_half(k) * earlier; }
};

// P [M, Hs, C, R, C]: x_i . (G_ij * k_j) at j <= i, zero above. x [M, Hs, C, R, K], k and g [M, Hs, C, K].
at::Tensor products(const at::Tensor& x, const at::Tensor& k, const at::Tensor& g) {
  const int64_t R = x.size(3);
  at::Tensor P = at::zeros({x.size(0), x.size(1), kChunk, R, kChunk}, x.options());
  P.diagonal(0, 2, 4).copy_((x * k.unsqueeze(3)).sum(-1).transpose(2, 3));
  for (int64_t h = kChunk / 2; h > 0; h /= 2) {
    const Level level(g, h);
    level.blocks(P).copy_(at::matmul(level.decayed_rows(x), level.decayed_keys(k).mT()).unflatten(3, {h, R}));
  }
  return P;
}

struct ProductGradients {
  at::Tensor x, k, g;
};

// From dP, of which only j <= i is read.
ProductGradients products_backward(const at::Tensor& x, const at::Tensor& k, const at::Tensor& g, const at::Tensor& dP) {
  const int64_t R = x.size(3);
  const at::Tensor d_diagonal = dP.diagonal(0, 2, 4).transpose(2, 3).unsqueeze(-1);  // [M, Hs, C, R, 1]
  ProductGradients d{d_diagonal * k.unsqueeze(3), (d_diagonal * x).sum(3), at::zeros_like(g)};
  for (int64_t h = kChunk / 2; h > 0; h /= 2) {
    const Level level(g, h);
    const at::Tensor d_block = level.blocks(dP).flatten(3, 4);  // [M, Hs, n, h R, h]
    const at::Tensor dx = level.later.unsqueeze(4) * at::matmul(d_block, level.decayed_keys(k)).unflatten(3, {h, R});
    const at::Tensor dk = level.earlier * at::matmul(d_block.mT(), level.decayed_rows(x));
    level.later_half(d.x).add_(dx);
    level.earlier_half(d.k).add_(dk);
    // An exponent's gradient is the factor times the factor's own; token l's g stands in those of i >= l behind the cut, of j < l before it.
    level.later_half(d.g).add_(suffix_sum((level.later_half(x) * dx).sum(4), 3));
    level.earlier_half(d.g).add_(sum_before(level.earlier_half(k) * dk, 3));
  }
  return d;
}

at::Tensor rows(const at::Tensor& c) { return c.unsqueeze(-1); }

// Everything of a chunk that does not depend on the state. Rows of q are (token, group): [M, Hs, C, groups, .].
struct Terms {
  Unit qn, kn;              // token layout, heads as given
  at::Tensor k, v, b, g;    // chunk layout, [M, Hs, C, .]
  at::Tensor x;             // [M, Hs, C, 1 + groups, K]: k, then q
  at::Tensor c, end, last;  // decay from the start, to the end [M, Hs, C, K]; over the chunk [M, Hs, 1, K]
  at::Tensor kk, qk;        // P_kk without its diagonal [M, Hs, C, C], P_qk [M, Hs, C groups, C]
  at::Tensor inverse;       // (I + A)^-1
  at::Tensor q_start;       // c * q [M, Hs, C groups, K]

  Terms(const Problem& p, const Inputs& in, const Layout& layout) : qn(normalise(in.q, p.l2_eps)), kn(normalise(in.k, p.l2_eps)) {
    k = layout.to_chunks(spread(kn.x, p.Hs));
    v = layout.to_chunks(spread(in.v, p.Hs));
    b = layout.to_chunks(in.beta);
    g = layout.to_chunks(in.g);
    const at::Tensor q = layout.to_chunks(spread(qn.x, p.Ho).unflatten(2, {p.Hs, p.groups}));
    x = at::cat({k.unsqueeze(3), q}, 3);
    c = g.cumsum(2).exp();
    end = sum_behind(g, 2).exp();
    last = c.narrow(2, kChunk - 1, 1);
    const at::Tensor P = products(x, k, g);
    kk = P.select(3, 0).tril(-1);
    qk = P.narrow(3, 1, p.groups).flatten(2, 3);
    const at::Tensor eye = at::eye(kChunk, g.options());
    inverse = at::linalg_solve_triangular(rows(b) * kk + eye, eye.expand_as(kk).contiguous(), /*upper=*/false, /*left=*/true,
                                          /*unitriangular=*/true);
    q_start = (q * c.unsqueeze(3)).flatten(2, 3);
  }
};

// [M, Hs, C groups, .] -> [B, T, Ho, .]
at::Tensor to_output(const Problem& p, const Layout& layout, const at::Tensor& x) {
  return layout.to_tokens(p, x.unflatten(2, {kChunk, p.groups})).flatten(2, 3);
}

}  // namespace

Outputs chunked_forward(const Problem& p, const Inputs& x, bool save) {
  Outputs out;
  at::Tensor S = start_state(p, x);  // [N, Hs, V, K]
  const Layout layout(p, x.g.device());
  if (layout.M == 0) return {at::zeros({p.B, p.T, p.Ho, p.V}, x.v.options()), S, at::empty({0, p.Hs, p.V, p.K}, S.options()), {}};
  const Terms t(p, x, layout);
  const at::Tensor value = at::matmul(t.inverse, rows(t.b) * t.v);  // U = value - key S0^T
  const at::Tensor key = at::matmul(t.inverse, rows(t.b) * t.c * t.k);
  const at::Tensor k_end = t.end * t.k;
  at::Tensor S0 = at::empty({layout.M, p.Hs, p.V, p.K}, S.options()), U = at::empty_like(t.v);
  for (size_t i = 0; i < layout.chunks.size(); ++i) {
    const auto& m = layout.chunks[i];
    const at::Tensor s = S.index_select(0, layout.sequences[i]);
    const at::Tensor u = value.index_select(0, m) - at::matmul(key.index_select(0, m), s.mT());
    S0.index_copy_(0, m, s);
    U.index_copy_(0, m, u);
    S.index_copy_(0, layout.sequences[i], t.last.index_select(0, m) * s + at::matmul(u.mT(), k_end.index_select(0, m)));
  }
  const at::Tensor o = p.scale * (at::matmul(t.q_start, S0.mT()) + at::matmul(t.qk, U));
  out.o = wanted_only(p, to_output(p, layout, o));
  out.final_state = S;
  if (save) out.chunk_states = S0;
  return out;
}

// With W = v - (c * k) S0^T and z = W - P_kk U the residuals (U = diag(b) z):
//
//   dU = scale P_qk^T do + (e * k) dS_C^T     y = (I + A)^-T dU     db = y . z     dW = dv = diag(b) y
//   dS0 = dS_C diag(c_C) - dW^T (c * k) + scale do^T (c * q)
//   dP_qk = scale do U^T     dP_kk = -strictly lower(dW U^T)     both back through the tree
//   d(c * q) = scale do S0     d(c * k) = -dW S0     d(e * k) = U dS_C
//
// The gradient of an exponent is the decayed factor times its own gradient, channel by channel; g_l stands in c_i for i >= l, in e_j for j < l.
Gradients chunked_backward(const Problem& p, const Inputs& in, const Outputs& saved, const at::Tensor& d_o, const at::Tensor& d_final) {
  const Layout layout(p, in.g.device());
  at::Tensor dS = d_final.clone();
  if (layout.M == 0) {
    return {at::zeros_like(in.q), at::zeros_like(in.k), at::zeros_like(in.v), at::zeros_like(in.g), at::zeros_like(in.beta), dS};
  }
  const Terms t(p, in, layout);
  const at::Tensor& S0 = saved.chunk_states;
  const at::Tensor up = p.scale * layout.to_chunks(wanted_only(p, d_o).unflatten(2, {p.Hs, p.groups})).flatten(2, 3);  // [M, Hs, C groups, V]
  const at::Tensor k_start = t.c * t.k, k_end = t.end * t.k;
  const at::Tensor W = t.v - at::matmul(k_start, S0.mT());
  const at::Tensor U = at::matmul(t.inverse, rows(t.b) * W);
  const at::Tensor z = W - at::matmul(t.kk, U);

  const at::Tensor dU_o = at::matmul(t.qk.mT(), up), dS_o = at::matmul(up.mT(), t.q_start);
  at::Tensor dS_end = at::empty_like(S0), y = at::empty_like(t.v);
  for (size_t i = layout.chunks.size(); i-- > 0;) {
    const auto& m = layout.chunks[i];
    const at::Tensor ds = dS.index_select(0, layout.sequences[i]);
    const at::Tensor du = dU_o.index_select(0, m) + at::matmul(k_end.index_select(0, m), ds.mT());
    const at::Tensor yi = at::matmul(t.inverse.index_select(0, m).mT(), du);
    const at::Tensor dw = rows(t.b.index_select(0, m)) * yi;
    dS_end.index_copy_(0, m, ds);
    y.index_copy_(0, m, yi);
    dS.index_copy_(0, layout.sequences[i],
                   t.last.index_select(0, m) * ds + dS_o.index_select(0, m) - at::matmul(dw.mT(), k_start.index_select(0, m)));
  }

  const at::Tensor dW = rows(t.b) * y;
  const at::Tensor dP_kk = -at::matmul(dW, U.mT()).tril(-1), dP_qk = at::matmul(up, U.mT()).unflatten(2, {kChunk, p.groups});
  const ProductGradients tree = products_backward(t.x, t.k, t.g, at::cat({dP_kk.unsqueeze(3), dP_qk}, 3));
  const at::Tensor q = t.x.narrow(3, 1, p.groups);
  const at::Tensor dq_start = t.c.unsqueeze(3) * at::matmul(up, S0).unflatten(2, {kChunk, p.groups});  // of q, through c * q
  const at::Tensor dk_start = -t.c * at::matmul(dW, S0), dk_end = t.end * at::matmul(U, dS_end);
  const at::Tensor dq = dq_start + tree.x.narrow(3, 1, p.groups);
  const at::Tensor dk = dk_start + dk_end + tree.k + tree.x.select(3, 0);
  const at::Tensor whole = (t.last * S0 * dS_end).sum(2, /*keepdim=*/true);  // of c_C before S0
  const at::Tensor dg = tree.g + suffix_sum((q * dq_start).sum(3) + t.k * dk_start, 2) + sum_before(t.k * dk_end, 2) + whole;

  Gradients d;
  d.q = normalise_backward(t.qn, gather_heads(to_output(p, layout, dq.flatten(2, 3)), p.Hq));
  d.k = normalise_backward(t.kn, gather_heads(layout.to_tokens(p, dk), p.Hk));
  d.v = gather_heads(layout.to_tokens(p, dW), p.Hv);
  d.g = layout.to_tokens(p, dg);
  d.beta = layout.to_tokens(p, (y * z).sum(-1));
  d.state = dS;
  return d;
}

at::Tensor plain_step(const Problem& p, const Inputs& x, at::Tensor& state) { return delta_step(p, x, x.g.exp().unsqueeze(-2), state); }

}  // namespace oryx::ops::kimi
