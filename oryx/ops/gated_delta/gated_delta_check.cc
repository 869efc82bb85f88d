#include <ATen/ATen.h>

#include <fmt/ranges.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/ops/gated_delta/gated_delta_internal.h"

namespace oryx::ops::gated_delta {

namespace {

std::string shape(const at::Tensor& x) { return fmt::format("[{}]", fmt::join(x.sizes(), ", ")); }

std::string type(const at::Tensor& x) { return at::toString(x.scalar_type()); }

void check_dtypes(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& g, const at::Tensor& beta) {
  const auto t = q.scalar_type();
  if (t != at::kFloat && t != at::kDouble && t != at::kBFloat16) {
    fail("{}: q is {}, expected Float, Double or BFloat16", op, type(q));
  }
  if (k.scalar_type() != t || v.scalar_type() != t) {
    fail("{}: q is {}, k {}, v {}, expected one dtype for all three", op, type(q), type(k), type(v));
  }
  const auto wide = t == at::kDouble ? at::kDouble : at::kFloat;
  if (g.scalar_type() != wide || beta.scalar_type() != wide) {
    fail("{}: g is {} and beta {}, expected {} with q of {}", op, type(g), type(beta), at::toString(wide), type(q));
  }
}

// Shapes from the head axis on, after `lead` leading axes that all five share.
void check_heads(std::string_view op, Problem& p, int64_t lead, const at::Tensor& q, const at::Tensor& k,
                 const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta) {
  if (q.dim() != lead + 2 || k.dim() != lead + 2 || v.dim() != lead + 2 || g.dim() != lead + 1 ||
      beta.dim() != lead + 1) {
    fail("{}: q {}, k {}, v {}, g {}, beta {} must have {}, {}, {}, {}, {} dimensions", op, shape(q), shape(k),
         shape(v), shape(g), shape(beta), lead + 2, lead + 2, lead + 2, lead + 1, lead + 1);
  }
  const auto front = q.sizes().slice(0, lead);
  for (const auto& [name, x] : {std::pair{"k", k}, {"v", v}, {"g", g}, {"beta", beta}}) {
    if (x.sizes().slice(0, lead) != front) {
      fail("{}: {} is {} but q is {}; batch and length must agree", op, name, shape(x), shape(q));
    }
    if (x.device() != q.device()) fail("{}: {} is on {} but q on {}", op, name, x.device().str(), q.device().str());
  }
  p.Hq = q.size(lead), p.Hk = k.size(lead), p.Hv = v.size(lead);
  p.K = k.size(lead + 1), p.V = v.size(lead + 1);
  if (q.size(lead + 1) != p.K) fail("{}: q has {} key dimensions but k has {}", op, q.size(lead + 1), p.K);
  if (p.Hq < 1 || p.Hk < 1 || p.Hv < 1 || p.K < 1 || p.V < 1) {
    fail("{}: q {}, k {}, v {} have an empty head axis", op, shape(q), shape(k), shape(v));
  }
  p.Hs = std::max(p.Hk, p.Hv), p.Ho = std::max(p.Hq, p.Hs), p.groups = p.Ho / p.Hs;
  if (p.Hs % p.Hk != 0 || p.Hs % p.Hv != 0 || p.Ho % p.Hq != 0 || p.Ho % p.Hs != 0) {
    fail("{}: {} query, {} key and {} value heads do not divide one another", op, p.Hq, p.Hk, p.Hv);
  }
  for (const auto& [name, x] : {std::pair{"g", g}, {"beta", beta}}) {
    if (x.size(lead) != p.Hs)
      fail("{}: {} is {}, expected {} state heads (max of k's and v's)", op, name, shape(x), p.Hs);
  }
}

void check_state(std::string_view op, const Problem& p, const at::Tensor& q, const at::Tensor& state) {
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (state.sizes() != at::IntArrayRef({p.N, p.Hs, p.V, p.K}) || state.scalar_type() != wide) {
    fail("{}: the state is {} {}, expected {} [{}, {}, {}, {}] (sequences, state heads, V, K)", op, type(state),
         shape(state), at::toString(wide), p.N, p.Hs, p.V, p.K);
  }
  if (state.device() != q.device())
    fail("{}: the state is on {} but q on {}", op, state.device().str(), q.device().str());
}

void set_scale(std::string_view op, Problem& p, std::optional<double> scale, double l2_eps) {
  p.scale = scale.value_or(1 / std::sqrt(static_cast<double>(p.K)));
  p.l2_eps = l2_eps;
  if (!std::isfinite(p.scale)) fail("{}: scale is {}, expected a finite number", op, p.scale);
  if (!(l2_eps >= 0)) fail("{}: l2_eps is {}, expected 0 or more", op, l2_eps);
}

// Sets N.
void check_sequences(std::string_view op, Problem& p, const std::optional<at::Tensor>& cu_seqlens) {
  p.N = p.B;
  if (!cu_seqlens.has_value() || !cu_seqlens->defined()) return;
  const at::Tensor& cu = *cu_seqlens;
  if (cu.dim() != 1 || cu.scalar_type() != at::kInt || cu.numel() < 2) {
    fail("{}: cu_seqlens is {} {}, expected Int [sequences + 1]", op, type(cu), shape(cu));
  }
  if (p.B != 1) fail("{}: cu_seqlens packs documents in one row, but there are {} rows", op, p.B);
  p.N = cu.numel() - 1;
}

void check_spans(std::string_view op, const std::optional<at::Tensor>& spans) {
  if (!spans.has_value() || !spans->defined()) return;
  if (spans->dim() != 2 || spans->size(1) != 3 || spans->scalar_type() != at::kInt) {
    fail("{}: spans is {} {}, expected Int [n, 3] (row, begin, end)", op, type(*spans), shape(*spans));
  }
}

void set_sequences(std::string_view op, Problem& p, const std::optional<at::Tensor>& cu_seqlens) {
  if (!cu_seqlens.has_value() || !cu_seqlens->defined()) {
    for (int64_t b = 0; b < p.B; ++b) p.sequences.push_back({b * p.T, (b + 1) * p.T});
    return;
  }
  const at::Tensor host = cu_seqlens->to(at::kCPU).contiguous();
  const int32_t* c = host.const_data_ptr<int32_t>();
  const int64_t n = host.numel() - 1;
  if (c[0] != 0 || c[n] != p.T) fail("{}: cu_seqlens runs from {} to {}, expected 0 to {}", op, c[0], c[n], p.T);
  for (int64_t i = 0; i < n; ++i) {
    if (c[i] > c[i + 1]) fail("{}: cu_seqlens falls from {} to {} at index {}", op, c[i], c[i + 1], i + 1);
    p.sequences.push_back({c[i], c[i + 1]});
  }
}

void set_chunks(Problem& p) {
  p.first_chunk.push_back(0);
  for (const auto& s : p.sequences) {
    for (int64_t t = s.begin; t < s.end; t += kChunk) p.chunks.push_back({t, std::min(kChunk, s.end - t)});
    p.first_chunk.push_back(static_cast<int64_t>(p.chunks.size()));
  }
}

void set_wanted(std::string_view op, Problem& p, const std::optional<at::Tensor>& spans) {
  if (!spans.has_value() || !spans->defined()) return;
  const at::Tensor host = spans->to(at::kCPU).contiguous();
  const int32_t* s = host.const_data_ptr<int32_t>();
  // One more than B * T, so that no span at all is not taken for an absent mask.
  p.wanted.assign(p.B * p.T + 1, 0);
  for (int64_t i = 0; i < host.size(0); ++i, s += 3) {
    if (s[0] < 0 || s[0] >= p.B || s[1] < 0 || s[1] > s[2] || s[2] > p.T) {
      fail("{}: span {} is (row {}, {} to {}), outside of {} rows of {} tokens", op, i, s[0], s[1], s[2], p.B, p.T);
    }
    std::fill(p.wanted.begin() + s[0] * p.T + s[1], p.wanted.begin() + s[0] * p.T + s[2], uint8_t{1});
  }
}

}  // namespace

Problem check_shapes(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                     const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
                     const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& spans,
                     std::optional<double> scale, double l2_eps) {
  Problem p{};
  check_dtypes(op, q, k, v, g, beta);
  check_heads(op, p, 2, q, k, v, g, beta);
  p.B = q.size(0), p.T = q.size(1);
  set_scale(op, p, scale, l2_eps);
  check_sequences(op, p, cu_seqlens);
  check_spans(op, spans);
  if (initial_state.has_value() && initial_state->defined()) check_state(op, p, q, *initial_state);
  return p;
}

Problem check_arguments(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& g, const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
                        const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& spans,
                        std::optional<double> scale, double l2_eps) {
  Problem p = check_shapes(op, q, k, v, g, beta, initial_state, cu_seqlens, spans, scale, l2_eps);
  set_sequences(op, p, cu_seqlens);
  set_chunks(p);
  set_wanted(op, p, spans);
  return p;
}

Problem check_step(std::string_view op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                   const at::Tensor& beta, const at::Tensor& state, std::optional<double> scale, double l2_eps) {
  Problem p{};
  check_dtypes(op, q, k, v, g, beta);
  check_heads(op, p, 1, q, k, v, g, beta);
  p.B = p.N = q.size(0), p.T = 1;
  set_scale(op, p, scale, l2_eps);
  check_state(op, p, q, state);
  return p;
}

}  // namespace oryx::ops::gated_delta
