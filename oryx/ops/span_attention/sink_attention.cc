#include "oryx/ops/span_attention/sink_attention.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "oryx/ops/span_attention/span_attention.h"
#include "oryx/ops/span_attention/span_attention_internal.h"

namespace oryx::ops {

namespace {

struct Part {
  at::Tensor o, lse;  // [N, T, Hq, V], [N, T, Hq]
};

// q [N, T, Hq, K] over keys [N, F, Hk, K or V], but for those that are `hidden` [N, T, F] to it; where it sees none, o is 0 and lse -inf.
Part over_keys(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& hidden, const SinkAttention& a) {
  const int64_t Hk = k.size(2);
  const double scale = a.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor grouped = q.to(wide).unflatten(2, {Hk, -1}).permute({0, 2, 3, 1, 4});                        // [N, Hk, G, T, K]
  at::Tensor scores = at::matmul(grouped, k.to(wide).permute({0, 2, 3, 1}).unsqueeze(2)) * scale;               // [N, Hk, G, T, F]
  scores = scores.masked_fill(hidden.unsqueeze(1).unsqueeze(1), -std::numeric_limits<double>::infinity());
  const at::Tensor lse = scores.logsumexp(-1, true);                                                            // [N, Hk, G, T, 1]
  const at::Tensor p = (scores - lse.masked_fill(lse.isinf(), 0)).exp();
  const at::Tensor o = at::matmul(p, v.to(wide).transpose(1, 2).unsqueeze(2));                                  // [N, Hk, G, T, V]
  return {o.permute({0, 3, 1, 2, 4}).flatten(2, 3), lse.squeeze(-1).permute({0, 3, 1, 2}).flatten(2, 3)};
}

Part joined(const Part& a, const Part& b) {
  const at::Tensor all = at::logaddexp(a.lse, b.lse), base = all.masked_fill(all.isinf(), 0);
  return {a.o * (a.lse - base).exp().unsqueeze(-1) + b.o * (b.lse - base).exp().unsqueeze(-1), all};
}

// Queries [begin, begin + count) of each row over the keys of sequences [n, n + sequences) outside of the window.
Part over_far(const SinkAttention& a, int64_t n, int64_t sequences, int64_t begin, int64_t count) {
  const at::Tensor q = a.q.narrow(1, begin, count), t = a.positions.narrow(1, begin, count).unsqueeze(-1);  // [N, T, 1]
  const auto of = [&](const at::Tensor& x) { return x.narrow(0, n, sequences); };
  std::optional<Part> part;
  if (a.sink_k.size(1) > 0) {
    const at::Tensor s = at::arange(a.sink_k.size(1), t.options());
    at::Tensor hidden = s > t - a.window;  // those are the window's
    if (a.reach > 0) hidden = hidden | (s <= t - a.reach);
    part = over_keys(q, of(a.sink_k), of(a.sink_v), hidden, a);
  }
  if (a.between) {
    const KeysBetween& b = *a.between;
    const auto ints = [&](const at::Tensor& x) { return of(x).to(q.device()).unsqueeze(1); };
    at::Tensor hidden = (ints(b.from) > t) | (ints(b.until) <= t);
    if (a.reach > 0) hidden = hidden | (ints(b.positions) <= t - a.reach);
    const Part more = over_keys(q, of(b.k), of(b.v), hidden, a);
    part = part ? joined(*part, more) : more;
  }
  return *part;
}

// Tokens that are wanted: those of some span, and the range that holds them all in every row.
struct Wanted {
  int64_t begin, end;
  at::Tensor mask;   // [B, Tq] bool; undefined: all
  at::Tensor spans;  // on the CPU; undefined: all
};

Wanted wanted_queries(const SinkAttention& a) {
  Wanted w{0, a.q.size(1), {}, {}};
  if (!a.spans) return w;
  w.spans = a.spans->cpu();
  w.mask = at::zeros({a.q.size(0), a.q.size(1)}, at::kBool);
  const auto span = w.spans.accessor<int32_t, 2>();
  std::swap(w.begin, w.end);
  for (int64_t i = 0; i < w.spans.size(0); ++i) {
    w.mask[span[i][0]].narrow(0, span[i][1], span[i][2] - span[i][1]).fill_(true);
    w.begin = std::min<int64_t>(w.begin, span[i][1]);
    w.end = std::max<int64_t>(w.end, span[i][2]);
  }
  w.mask = w.mask.to(a.q.device());
  return w;
}

// The range of a packed row's queries [begin, end) that holds those wanted.
std::pair<int64_t, int64_t> wanted_between(const Wanted& w, int64_t begin, int64_t end) {
  if (!w.spans.defined()) return {begin, end};
  int64_t lo = end, hi = begin;
  const auto span = w.spans.accessor<int32_t, 2>();
  for (int64_t i = 0; i < w.spans.size(0); ++i) {
    const int64_t from = std::max<int64_t>(begin, span[i][1]), to = std::min<int64_t>(end, span[i][2]);
    if (from >= to) continue;
    lo = std::min(lo, from);
    hi = std::max(hi, to);
  }
  return {lo, hi};
}

// The queries of w of each row, which may hold several sequences: those that nobody wants, far from the others of their sequence, see nothing.
Part over_far(const SinkAttention& a, const Wanted& w) {
  const int64_t count = w.end - w.begin;
  if (!a.cu_seqlens) return over_far(a, 0, a.q.size(0), w.begin, count);
  const at::Tensor bounds = a.cu_seqlens->to(at::kLong).cpu();
  const auto options = a.q.options().dtype(a.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Part all{at::zeros({a.q.size(0), count, a.q.size(2), a.v.size(3)}, options), at::full({a.q.size(0), count, a.q.size(2)}, -std::numeric_limits<double>::infinity(), options)};
  for (int64_t n = 0; n + 1 < bounds.numel(); ++n) {
    const auto [lo, hi] = wanted_between(w, bounds[n].item<int64_t>(), bounds[n + 1].item<int64_t>());
    if (lo >= hi) continue;
    const Part part = over_far(a, n, 1, lo, hi - lo);
    all.o.narrow(1, lo - w.begin, hi - lo).copy_(part.o);
    all.lse.narrow(1, lo - w.begin, hi - lo).copy_(part.lse);
  }
  return all;
}

// As the dispatcher knows the operator.
at::Tensor sink_attention_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& sink_k, const at::Tensor& sink_v, const at::Tensor& positions,
                             const std::optional<at::Tensor>& between_k, const std::optional<at::Tensor>& between_v, const std::optional<at::Tensor>& between_positions,
                             const std::optional<at::Tensor>& between_from, const std::optional<at::Tensor>& between_until, const std::optional<at::Tensor>& spans,
                             const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k, const std::optional<at::Tensor>& key_lengths,
                             int64_t window, int64_t reach, std::optional<double> scale) {
  return sink_attention_any(sink_arguments(q, k, v, sink_k, sink_v, positions, between_k, between_v, between_positions, between_from, between_until, spans, cu_seqlens,
                                           cu_seqlens_k, key_lengths, window, reach, scale));
}

}  // namespace

SinkAttention sink_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& sink_k, const at::Tensor& sink_v, const at::Tensor& positions,
                             const std::optional<at::Tensor>& between_k, const std::optional<at::Tensor>& between_v, const std::optional<at::Tensor>& between_positions,
                             const std::optional<at::Tensor>& between_from, const std::optional<at::Tensor>& between_until, const std::optional<at::Tensor>& spans,
                             const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k, const std::optional<at::Tensor>& key_lengths,
                             int64_t window, int64_t reach, std::optional<double> scale) {
  SinkAttention a{.q = q, .k = k, .v = v, .sink_k = sink_k, .sink_v = sink_v, .positions = positions};
  if (between_k) a.between = KeysBetween{*between_k, between_v.value(), between_positions.value(), between_from.value(), between_until.value()};
  a.spans = spans, a.cu_seqlens = cu_seqlens, a.cu_seqlens_k = cu_seqlens_k, a.key_lengths = key_lengths;
  a.window = window, a.reach = reach, a.scale = scale;
  return a;
}

at::Tensor sink_attention(const SinkAttention& a) {
  TORCH_CHECK(a.window > 0 && a.reach >= 0, "sink_attention: a window of ", a.window, ", a reach of ", a.reach);
  const bool inside = a.reach > 0 && a.reach <= a.window;  // what a query sees lies in the window
  const bool between = a.between && a.between->k.size(1) > 0;
  if (inside || (a.sink_k.size(1) == 0 && !between)) {
    return span_attention(a.q, a.k, a.v, a.spans, a.cu_seqlens, a.cu_seqlens_k, a.key_lengths, inside ? a.reach : a.window, a.scale);
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::sink_attention", "").typed<decltype(sink_attention_op)>();
  const auto of = [&](at::Tensor KeysBetween::*x) { return between ? std::optional<at::Tensor>((*a.between).*x) : std::nullopt; };
  return op.call(a.q, a.k, a.v, a.sink_k, a.sink_v, a.positions, of(&KeysBetween::k), of(&KeysBetween::v), of(&KeysBetween::positions), of(&KeysBetween::from),
                 of(&KeysBetween::until), a.spans, a.cu_seqlens, a.cu_seqlens_k, a.key_lengths, a.window, a.reach, a.scale);
}

at::Tensor sink_attention_any(const SinkAttention& a) {
  const auto [o, lse] = span_attention_with_denominators(a.q, a.k, a.v, a.spans, a.cu_seqlens, a.cu_seqlens_k, a.key_lengths, a.window, a.scale);
  const Wanted wanted = wanted_queries(a);
  const int64_t count = wanted.end - wanted.begin;
  if (count <= 0) return o;  // zeros
  const Part far = over_far(a, wanted);
  const at::Tensor near = lse.narrow(1, wanted.begin, count), all = at::logaddexp(near, far.lse);
  at::Tensor both = o.narrow(1, wanted.begin, count).to(far.o.scalar_type()) * (near - all).exp().unsqueeze(-1) + far.o * (far.lse - all).exp().unsqueeze(-1);
  if (!wanted.mask.defined()) return both.to(a.q.scalar_type());
  both = both.masked_fill(wanted.mask.narrow(1, wanted.begin, count).logical_not().unsqueeze(-1).unsqueeze(-1), 0);
  if (count == a.q.size(1)) return both.to(a.q.scalar_type());
  at::Tensor out = at::zeros_like(o);
  out.narrow(1, wanted.begin, count).copy_(both);
  return out;
}

}  // namespace oryx::ops

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "sink_attention(Tensor q, Tensor k, Tensor v, Tensor sink_k, Tensor sink_v, Tensor positions, Tensor? between_k=None, Tensor? between_v=None, "
      "Tensor? between_positions=None, Tensor? between_from=None, Tensor? between_until=None, Tensor? spans=None, Tensor? cu_seqlens=None, Tensor? cu_seqlens_k=None, "
      "Tensor? key_lengths=None, int window=1, int reach=0, float? scale=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(oryx, CPU, m) { m.impl("sink_attention", oryx::ops::sink_attention_op); }
