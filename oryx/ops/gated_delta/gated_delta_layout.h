// What the chunked forms of the delta rules (this folder's and kda's) share: tokens laid out in chunks, heads spread and gathered, keys and
// queries normalised.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "oryx/ops/gated_delta/gated_delta_internal.h"

namespace oryx::ops::gated_delta {

// Tokens to chunks and back. M chunks of kChunk tokens; missing tokens are zeros, which leave the state as it is.
struct Layout {
  at::Tensor gather;   // [M * kChunk] token, or B * T where there is none
  at::Tensor scatter;  // [B * T] place in the chunks
  int64_t M;
  // Sequences advance side by side: step i works on chunks[i] (those that are i-th in their sequence), of sequences[i].
  std::vector<at::Tensor> chunks, sequences;

  Layout(const Problem& p, at::Device device) : M(static_cast<int64_t>(p.chunks.size())) {
    gather = at::full({M * kChunk}, p.B * p.T, at::kLong);
    scatter = at::empty({p.B * p.T}, at::kLong);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t i = 0; i < p.chunks[m].length; ++i) {
        gather.mutable_data_ptr<int64_t>()[m * kChunk + i] = p.chunks[m].begin + i;
        scatter.mutable_data_ptr<int64_t>()[p.chunks[m].begin + i] = m * kChunk + i;
      }
    }
    for (int64_t i = 0;; ++i) {
      std::vector<int64_t> c, n;
      for (int64_t s = 0; s < p.N; ++s) {
        if (p.first_chunk[s] + i < p.first_chunk[s + 1]) c.push_back(p.first_chunk[s] + i), n.push_back(s);
      }
      if (c.empty()) break;
      chunks.push_back(at::tensor(c, at::kLong).to(device));
      sequences.push_back(at::tensor(n, at::kLong).to(device));
    }
    gather = gather.to(device), scatter = scatter.to(device);
  }

  // [B, T, H, ...] -> [M, H, kChunk, ...]
  at::Tensor to_chunks(const at::Tensor& x) const {
    const auto flat = x.flatten(0, 1);
    auto row = flat.sizes().vec();
    row[0] = 1;
    auto y = at::cat({flat, at::zeros(row, x.options())}).index_select(0, gather);
    row[0] = kChunk;
    row.insert(row.begin(), M);
    return y.view(row).transpose(1, 2).contiguous();
  }

  // [M, H, kChunk, ...] -> [B, T, H, ...]
  at::Tensor to_tokens(const Problem& p, const at::Tensor& x) const {
    auto y = x.transpose(1, 2).flatten(0, 1).index_select(0, scatter);
    auto shape = y.sizes().vec();
    shape[0] = p.T;
    shape.insert(shape.begin(), p.B);
    return y.view(shape);
  }
};

struct Unit {
  at::Tensor x, r;  // x * r, r = rsqrt(sum x^2 + eps)
};

inline Unit normalise(const at::Tensor& x, double eps) {
  const at::Tensor r = (x.square().sum(-1, true) + eps).rsqrt();
  return {x * r, r};
}

inline at::Tensor normalise_backward(const Unit& u, const at::Tensor& d) { return u.r * (d - u.x * (u.x * d).sum(-1, true)); }

inline at::Tensor spread(const at::Tensor& x, int64_t heads) {
  return x.size(2) == heads ? x : x.repeat_interleave(heads / x.size(2), 2);
}

// [B, T, heads, ...] -> [B, T, n, ...], summing over groups of consecutive heads.
inline at::Tensor gather_heads(const at::Tensor& x, int64_t n) {
  if (x.size(2) == n) return x;
  auto shape = x.sizes().vec();
  shape[2] = n;
  shape.insert(shape.begin() + 3, x.size(2) / n);
  return x.reshape(shape).sum(3);
}

inline at::Tensor rows(const at::Tensor& c) { return c.unsqueeze(-1); }

// One token of a delta rule: `decay`, that of the state [N, Hs, V, K], of a shape that broadcasts to it; the rest as gated_delta_step.
inline at::Tensor delta_step(const Problem& p, const Inputs& x, const at::Tensor& decay, at::Tensor& state) {
  const auto heads = [](const at::Tensor& y, int64_t n) { return y.repeat_interleave(n / y.size(1), 1); };
  const at::Tensor q = heads(normalise(x.q, p.l2_eps).x, p.Ho) * p.scale;
  const at::Tensor k = heads(normalise(x.k, p.l2_eps).x, p.Hs), v = heads(x.v, p.Hs);
  state.mul_(decay);
  const at::Tensor written = rows(x.beta) * (v - at::matmul(state, rows(k)).squeeze(-1));
  state.add_(rows(written) * k.unsqueeze(-2));
  return at::matmul(state.unsqueeze(2), rows(q.unflatten(1, {p.Hs, p.groups}))).squeeze(-1).flatten(1, 2);
}

// o and its gradient hold only wanted tokens.
inline at::Tensor wanted_only(const Problem& p, const at::Tensor& o) {
  if (p.wanted.empty()) return o;
  const at::Tensor mask = at::from_blob(const_cast<uint8_t*>(p.wanted.data()), {p.B, p.T, 1, 1}, at::kByte).to(o.device());
  return at::where(mask != 0, o, at::zeros({}, o.options()));
}

inline at::Tensor start_state(const Problem& p, const Inputs& x) {
  return x.state.defined() ? x.state.clone() : at::zeros({p.N, p.Hs, p.V, p.K}, x.g.options());
}

}  // namespace oryx::ops::gated_delta
