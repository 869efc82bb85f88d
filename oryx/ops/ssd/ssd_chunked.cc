// The chunked parallel form from ATen's batched matrix products. Inside a chunk of c tokens, with a_m = dt_m A (the log
// decay), u_j = dt_j v_j, S the state before the chunk and S' the one after it:
//
//   L[i, j]  = exp(sum_{j < m <= i} a_m) for j <= i      gamma_i = exp(sum_{m <= i} a_m)      tail_j = L[c - 1, j]
//   o_i = sum_{j <= i} (q_i . k_j) L[i, j] u_j + gamma_i S q_i + D v_i
//   S'  = gamma_{c-1} S + sum_j tail_j u_j k_j^T
//
// The sums of L run inside the segment (j, i] and not as differences of one running sum, which would lose all digits
// after a strong decay. Chunks go one after another, so that the memory at any time is that of one chunk, and of one
// state a chunk in backward.
#include "oryx/ops/ssd/ssd_internal.h"

namespace oryx::ops {
namespace {

constexpr int64_t kChunk = 64;

// Sequences that share begin and length are computed together: the rows of a dense batch, or one packed document.
struct Batch {
  int64_t first_row, rows, begin, length, first_state;
};

std::vector<Batch> batches(const SsdInputs& in, const SsdSizes& s) {
  std::vector<Batch> out;
  if (!in.cu_seqlens.defined()) {
    out.push_back({0, s.B, 0, s.T, 0});
    return out;
  }
  for (int64_t n = 0; n < s.count(); ++n) out.push_back({0, 1, s.sequences[n].begin, s.sequences[n].length, n});
  return out;
}

at::Tensor tokens(const at::Tensor& x, const Batch& b, int64_t begin, int64_t end) {
  return x.narrow(0, b.first_row, b.rows).narrow(1, b.begin + begin, end - begin);
}

// [b, c, h, d] -> [b, heads, c, d]
at::Tensor by_head(const at::Tensor& x, int64_t heads) {
  return x.transpose(1, 2).repeat_interleave(heads / x.size(2), 1);
}

// [b, heads, c, d] -> [b, c, h, d], summed over the heads that share a source head.
at::Tensor by_token(const at::Tensor& x, int64_t heads) {
  return x.unflatten(1, {heads, x.size(1) / heads}).sum(2).transpose(1, 2);
}

at::Tensor reverse_cumsum(const at::Tensor& x, int64_t dim) { return x.flip(dim).cumsum(dim).flip(dim); }

struct Chunk {
  at::Tensor q;                    // [b, Hs, R, c, K], R = Ho / Hs
  at::Tensor k, v, u;              // [b, Hs, c, K or V]
  at::Tensor x, dt, a;             // [b, Hs, c]; x = dt_raw + dt_bias
  at::Tensor L, gamma, tail, end;  // [b, Hs, c, c], [b, Hs, c, 1], [b, Hs, c, 1], [b, Hs, 1, 1]

  Chunk(const SsdInputs& in, const SsdSizes& s, const Batch& b, int64_t begin, int64_t c_end) {
    q = by_head(tokens(in.q, b, begin, c_end), s.Ho).unflatten(1, {s.Hs, s.Ho / s.Hs});
    k = by_head(tokens(in.k, b, begin, c_end), s.Hs);
    v = by_head(tokens(in.v, b, begin, c_end), s.Hs);
    x = (tokens(in.dt_raw, b, begin, c_end) + in.dt_bias).transpose(1, 2);
    dt = at::logaddexp(x, at::zeros({}, x.options()));
    a = dt * -at::exp(in.A_log).unsqueeze(-1);
    u = dt.unsqueeze(-1) * v;
    const int64_t c = c_end - begin;
    const at::Tensor below = at::ones({c, c}, x.options()).tril(-1);  // i > j
    L = (a.unsqueeze(-1) * below).cumsum(-2).exp().tril();
    gamma = a.cumsum(-1).exp().unsqueeze(-1);
    tail = L.select(-2, c - 1).unsqueeze(-1);
    end = gamma.narrow(-2, c - 1, 1);
  }

  // S [b, Hs, V, K] after the chunk.
  at::Tensor advance(const at::Tensor& S) const { return end * S + at::matmul((tail * u).transpose(-1, -2), k); }

  at::Tensor scores() const { return at::matmul(q, k.unsqueeze(2).transpose(-1, -2)) * L.unsqueeze(2); }

  // [b, Hs, R, c, V], without D v.
  at::Tensor readout(const at::Tensor& S) const {
    return at::matmul(scores(), u.unsqueeze(2)) + gamma.unsqueeze(2) * at::matmul(q, S.unsqueeze(2).transpose(-1, -2));
  }
};

bool chunk_wanted(const SsdSizes& s, const Batch& b, int64_t begin, int64_t end) {
  for (int64_t r = b.first_row; r < b.first_row + b.rows; ++r) {
    if (s.wants_any(r, b.begin + begin, b.begin + end)) return true;
  }
  return false;
}

// [B, T, 1, 1] of ones and zeros, or undefined when everything is wanted.
at::Tensor wanted_mask(const SsdSizes& s, const at::TensorOptions& options) {
  if (s.wanted.empty()) return {};
  at::Tensor mask = at::empty({s.B, s.T, 1, 1}, at::kByte);
  std::copy(s.wanted.begin(), s.wanted.end(), mask.mutable_data_ptr<uint8_t>());
  return mask.to(options.device(), c10::typeMetaToScalarType(options.dtype()));
}

at::Tensor states(const SsdInputs& in, const SsdSizes& s) {
  return in.initial_state.defined() ? in.initial_state : at::zeros({s.count(), s.Hs, s.V, s.K}, in.v.options());
}

}  // namespace

SsdResult ssd_chunked(const SsdInputs& in, const SsdSizes& s) {
  at::Tensor o = at::zeros({s.B, s.T, s.Ho, s.V}, in.v.options()),
             final_state = at::empty({s.count(), s.Hs, s.V, s.K}, in.v.options());
  const at::Tensor initial = states(in, s);
  for (const Batch& b : batches(in, s)) {
    at::Tensor S = initial.narrow(0, b.first_state, b.rows);
    for (int64_t begin = 0; begin < b.length; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, b.length);
      const Chunk c(in, s, b, begin, end);
      if (chunk_wanted(s, b, begin, end)) {
        const at::Tensor out = c.readout(S) + (in.D.view({-1, 1, 1}) * c.v).unsqueeze(2);
        tokens(o, b, begin, end).copy_(by_token(out.flatten(1, 2), s.Ho));
      }
      S = c.advance(S);
    }
    final_state.narrow(0, b.first_state, b.rows).copy_(S);
  }
  if (const at::Tensor mask = wanted_mask(s, o.options()); mask.defined()) o.mul_(mask);
  return {o, final_state};
}

namespace {

struct Accumulators {
  SsdGradients g;
  at::Tensor dA;  // [Hs], gradient of A
};

// Gradients of one chunk. G [b, Hs, R, c, V] is the gradient of the readout, dS that of the state after the chunk;
// returns that of the state before it. d log decay of token m: every weight L, gamma, tail whose segment contains m
// takes part, and each share is summed directly (no difference of totals, which would cancel).
at::Tensor chunk_backward(const SsdInputs& in, const SsdSizes& s, const Batch& b, int64_t begin, const Chunk& c,
                          const at::Tensor& S, const at::Tensor& G, const at::Tensor& dS, Accumulators& acc) {
  const int64_t end = begin + c.k.size(2);
  const at::Tensor P = c.scores(), dP = at::matmul(G, c.u.unsqueeze(2).transpose(-1, -2)).tril();  // [b, Hs, R, c, c]
  const at::Tensor dW = dP * c.L.unsqueeze(2), M = (dP * P).sum(2);
  const at::Tensor dq_inter = c.gamma.unsqueeze(2) * at::matmul(G, S.unsqueeze(2));  // [b, Hs, R, c, K]
  const at::Tensor dk_state = c.tail * at::matmul(c.u, dS);                          // [b, Hs, c, K]
  const at::Tensor dq = at::matmul(dW, c.k.unsqueeze(2)) + dq_inter;
  const at::Tensor dk = at::matmul(dW.transpose(-1, -2), c.q).sum(2) + dk_state;
  const at::Tensor du = at::matmul(P.transpose(-1, -2), G).sum(2) + c.tail * at::matmul(c.k, dS.transpose(-1, -2));
  const at::Tensor Gv = G.sum(2), D = in.D.view({-1, 1, 1});
  const at::Tensor dv = c.dt.unsqueeze(-1) * du + D * Gv;

  const at::Tensor d_gamma = (dq_inter * c.q).sum({2, 4});  // [b, Hs, c], times gamma: of its logarithm
  const at::Tensor d_tail = (dk_state * c.k).sum(-1);
  const at::Tensor d_end = (dS * c.end * S).sum({-1, -2}).unsqueeze(-1);
  const at::Tensor da =
      reverse_cumsum(M, -2).tril(-1).sum(-1) + reverse_cumsum(d_gamma, -1) + (d_tail.cumsum(-1) - d_tail) + d_end;
  const at::Tensor A = -at::exp(in.A_log).unsqueeze(-1);
  const at::Tensor dx = ((c.v * du).sum(-1) + A * da) * at::sigmoid(c.x);  // [b, Hs, c]

  tokens(acc.g.q, b, begin, end).copy_(by_token(dq.flatten(1, 2), s.Hq));
  tokens(acc.g.k, b, begin, end).copy_(by_token(dk, s.Hk));
  tokens(acc.g.v, b, begin, end).copy_(by_token(dv, s.Hv));
  tokens(acc.g.dt_raw, b, begin, end).copy_(dx.transpose(1, 2));
  acc.g.dt_bias += dx.sum(at::IntArrayRef({0, 2}));
  acc.g.D += (Gv * c.v).sum({0, 2, 3});
  acc.dA += (c.dt * da).sum(at::IntArrayRef({0, 2}));
  return c.end * dS + at::matmul((c.gamma.unsqueeze(2) * G).flatten(2, 3).transpose(-1, -2), c.q.flatten(2, 3));
}

}  // namespace

SsdGradients ssd_chunked_backward(const SsdInputs& in, const SsdSizes& s, const at::Tensor& d_o_all,
                                  const at::Tensor& d_final_state) {
  const at::Tensor mask = wanted_mask(s, d_o_all.options()), d_o = mask.defined() ? d_o_all * mask : d_o_all;
  const at::Tensor initial = states(in, s);
  Accumulators acc{{at::empty_like(in.q), at::empty_like(in.k), at::empty_like(in.v), at::empty_like(in.dt_raw),
                    at::zeros_like(in.dt_bias), at::Tensor(), at::zeros_like(in.D), at::empty_like(initial)},
                   at::zeros_like(in.A_log)};
  for (const Batch& b : batches(in, s)) {
    std::vector<at::Tensor> before{initial.narrow(0, b.first_state, b.rows)};
    for (int64_t begin = 0; begin + kChunk < b.length; begin += kChunk) {
      before.push_back(Chunk(in, s, b, begin, begin + kChunk).advance(before.back()));
    }
    at::Tensor dS =
        d_final_state.defined() ? d_final_state.narrow(0, b.first_state, b.rows) : at::zeros_like(before[0]);
    for (int64_t i = (b.length + kChunk - 1) / kChunk - 1; i >= 0; --i) {
      const int64_t begin = i * kChunk, end = std::min(begin + kChunk, b.length);
      const at::Tensor G = by_head(tokens(d_o, b, begin, end), s.Ho).unflatten(1, {s.Hs, s.Ho / s.Hs});
      dS = chunk_backward(in, s, b, begin, Chunk(in, s, b, begin, end), before[i], G, dS, acc);
    }
    acc.g.initial_state.narrow(0, b.first_state, b.rows).copy_(dS);
  }
  acc.g.A_log = acc.dA * -at::exp(in.A_log);
  if (!in.initial_state.defined()) acc.g.initial_state = at::Tensor();
  return acc.g;
}

}  // namespace oryx::ops
