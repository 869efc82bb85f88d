#include "oryx/ops/span_attention/sink_attention.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "oryx/ops/span_attention/span_attention.h"

namespace oryx::ops {

namespace {

struct Part {
  at::Tensor o, lse;  // [N, T, Hq, V], [N, T, Hq]
};

// q [N, T, Hq, K] over the first keys [N, F, Hk, K or V] that each query at `positions` [N, T] sees; where it sees none, o is 0 and lse -inf.
Part over_first(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions, const SinkAttention& a) {
  const int64_t F = k.size(1), Hk = k.size(2);
  const double scale = a.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor s = at::arange(F, positions.options()), t = positions.unsqueeze(-1);  // [F], [N, T, 1]
  at::Tensor hidden = s > t - a.window;                                                   // [N, T, F]; those are the window's
  if (a.reach > 0) hidden = hidden | (s <= t - a.reach);
  const at::Tensor grouped = q.to(wide).unflatten(2, {Hk, -1}).permute({0, 2, 3, 1, 4});                        // [N, Hk, G, T, K]
  at::Tensor scores = at::matmul(grouped, k.to(wide).permute({0, 2, 3, 1}).unsqueeze(2)) * scale;               // [N, Hk, G, T, F]
  scores = scores.masked_fill(hidden.unsqueeze(1).unsqueeze(1), -std::numeric_limits<double>::infinity());
  const at::Tensor lse = scores.logsumexp(-1, true);                                                            // [N, Hk, G, T, 1]
  const at::Tensor p = (scores - lse.masked_fill(lse.isinf(), 0)).exp();
  const at::Tensor o = at::matmul(p, v.to(wide).transpose(1, 2).unsqueeze(2));                                  // [N, Hk, G, T, V]
  return {o.permute({0, 3, 1, 2, 4}).flatten(2, 3), lse.squeeze(-1).permute({0, 3, 1, 2}).flatten(2, 3)};
}

Part over_first(const SinkAttention& a) {
  if (!a.cu_seqlens) return over_first(a.q, a.sink_k, a.sink_v, a.positions, a);
  const at::Tensor bounds = a.cu_seqlens->to(at::kLong).cpu();
  std::vector<at::Tensor> o, lse;
  for (int64_t n = 0; n + 1 < bounds.numel(); ++n) {
    const int64_t begin = bounds[n].item<int64_t>(), count = bounds[n + 1].item<int64_t>() - begin;
    if (count == 0) continue;
    const Part part = over_first(a.q.narrow(1, begin, count), a.sink_k.narrow(0, n, 1), a.sink_v.narrow(0, n, 1), a.positions.narrow(1, begin, count), a);
    o.push_back(part.o);
    lse.push_back(part.lse);
  }
  return {at::cat(o, 1), at::cat(lse, 1)};
}

// [B, Tq] bool: tokens in spans.
at::Tensor in_spans(const at::Tensor& spans, const at::Tensor& q) {
  const at::Tensor s = spans.cpu();
  at::Tensor mask = at::zeros({q.size(0), q.size(1)}, at::kBool);
  const auto span = s.accessor<int32_t, 2>();
  for (int64_t i = 0; i < s.size(0); ++i) mask[span[i][0]].narrow(0, span[i][1], span[i][2] - span[i][1]).fill_(true);
  return mask.to(q.device());
}

}  // namespace

at::Tensor sink_attention(const SinkAttention& a) {
  TORCH_CHECK(a.window > 0 && a.reach >= 0, "sink_attention: a window of ", a.window, ", a reach of ", a.reach);
  const bool inside = a.reach > 0 && a.reach <= a.window;  // what a query sees lies in the window
  if (inside || a.sink_k.size(1) == 0) {
    return span_attention(a.q, a.k, a.v, a.spans, a.cu_seqlens, a.cu_seqlens_k, a.key_lengths, inside ? a.reach : a.window, a.scale);
  }
  const auto [o, lse] = span_attention_with_denominators(a.q, a.k, a.v, a.spans, a.cu_seqlens, a.cu_seqlens_k, a.key_lengths, a.window, a.scale);
  const Part first = over_first(a);
  const at::Tensor all = at::logaddexp(lse, first.lse);
  at::Tensor joined = o.to(first.o.scalar_type()) * (lse - all).exp().unsqueeze(-1) + first.o * (first.lse - all).exp().unsqueeze(-1);
  if (a.spans) joined = joined.masked_fill(in_spans(*a.spans, a.q).logical_not().unsqueeze(-1).unsqueeze(-1), 0);
  return joined.to(a.q.scalar_type());
}

}  // namespace oryx::ops
