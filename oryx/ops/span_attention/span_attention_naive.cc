#include <ATen/ATen.h>

#include <limits>

#include "oryx/ops/span_attention/span_attention.h"
#include "oryx/ops/span_attention/span_attention_plan.h"

namespace oryx::ops {
namespace {

// [queries, keys] of one sequence: true where the query sees the key.
at::Tensor visibility(const AttentionPlan& plan, const AttentionSequence& s) {
  const at::Tensor position = at::arange(s.keys - s.queries, s.keys, at::kLong).unsqueeze(1);
  const at::Tensor key = at::arange(s.keys, at::kLong).unsqueeze(0);
  at::Tensor seen = key <= position;
  if (plan.window > 0) seen = seen & (key > position - plan.window);
  return seen;
}

// q [Tq, Hq, K], k [Tk, Hq, K], v [Tk, Hq, V]: [Tq, Hq, V]
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& seen, double scale) {
  const at::Tensor scores = at::einsum("ihk,jhk->hij", {q, k}) * scale;
  const at::Tensor p = at::softmax(scores.masked_fill(~seen, -std::numeric_limits<double>::infinity()), -1);
  return at::einsum("hij,jhv->ihv", {p, v});
}

}  // namespace

at::Tensor span_attention_naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>& cu_seqlens,
                                const std::optional<at::Tensor>& cu_seqlens_k,
                                const std::optional<at::Tensor>& key_lengths, int64_t window,
                                std::optional<double> scale) {
  const AttentionPlan plan = make_attention_plan(q, k, v, spans, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  const int64_t group = q.size(2) / k.size(2);
  const auto inner = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor kx = k.to(inner).repeat_interleave(group, 2), vx = v.to(inner).repeat_interleave(group, 2);
  const bool by_row = !cu_seqlens;
  std::vector<at::Tensor> parts;
  for (const AttentionSequence& s : plan.sequences) {
    const at::Tensor o =
        attend(q[s.row].narrow(0, s.q_begin, s.queries).to(inner), kx[s.row].narrow(0, s.k_begin, s.keys),
               vx[s.row].narrow(0, s.k_begin, s.keys), visibility(plan, s).to(q.device()), plan.scale);
    const at::Tensor computed = at::zeros({s.queries, 1, 1}, at::kBool);
    for (const int64_t i : plan.computed_queries(s)) computed[i].fill_(true);
    parts.push_back(at::where(computed.to(q.device()), o, at::zeros({}, o.options())));
  }
  if (parts.empty()) return at::zeros({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  const at::Tensor o = by_row ? at::stack(parts) : at::cat(parts).unsqueeze(0);
  return o.to(q.scalar_type());
}

}  // namespace oryx::ops
