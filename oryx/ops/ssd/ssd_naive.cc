// The formula, token by token: differentiable by autograd, any dtype, the oracle of the tests.
#include "oryx/ops/ssd/ssd_internal.h"

namespace oryx::ops {
namespace {

at::Tensor given(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }

// [h, d] -> [heads, d]; consecutive heads share a source head.
at::Tensor spread(const at::Tensor& x, int64_t heads) { return x.repeat_interleave(heads / x.size(0), 0); }

}  // namespace

SsdResult ssd_naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                    const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
                    const std::optional<at::Tensor>& spans) {
  const SsdInputs in{
      q, k, v, dt_raw, dt_bias, A_log, D, given(initial_state), given(cu_seqlens), given(spans)};
  const SsdSizes s = ssd_sizes("ssd_naive", in);
  const auto dtype = ssd_compute_dtype(in);
  const auto options = v.options().dtype(dtype);
  const at::Tensor qc = q.to(dtype), kc = k.to(dtype), vc = v.to(dtype), D_head = D.to(dtype).unsqueeze(-1);
  const at::Tensor x = dt_raw.to(dtype) + dt_bias.to(dtype);
  const at::Tensor dt = at::logaddexp(x, at::zeros_like(x));         // [B, T, Hs]
  const at::Tensor decay = at::exp(-dt * at::exp(A_log.to(dtype)));  // [B, T, Hs]
  std::vector<std::vector<at::Tensor>> rows(s.B);
  std::vector<at::Tensor> finals;
  for (int64_t n = 0; n < s.count(); ++n) {
    const Sequence& seq = s.sequences[n];
    at::Tensor S = in.initial_state.defined() ? in.initial_state[n].to(dtype) : at::zeros({s.Hs, s.V, s.K}, options);
    for (int64_t t = seq.begin; t < seq.begin + seq.length; ++t) {
      const at::Tensor vt = spread(vc[seq.row][t], s.Hs), kt = spread(kc[seq.row][t], s.Hs);
      const at::Tensor u = dt[seq.row][t].unsqueeze(-1) * vt;
      S = decay[seq.row][t].view({s.Hs, 1, 1}) * S + u.unsqueeze(-1) * kt.unsqueeze(-2);
      if (!s.wants_any(seq.row, t, t + 1)) {
        rows[seq.row].push_back(at::zeros({s.Ho, s.V}, options));
        continue;
      }
      const at::Tensor readout = (spread(S, s.Ho) * spread(qc[seq.row][t], s.Ho).unsqueeze(-2)).sum(-1);
      rows[seq.row].push_back(readout + spread(D_head * vt, s.Ho));
    }
    finals.push_back(S);
  }
  std::vector<at::Tensor> stacked;
  for (const auto& row : rows) stacked.push_back(row.empty() ? at::zeros({0, s.Ho, s.V}, options) : at::stack(row));
  const at::Tensor o = stacked.empty() ? at::zeros({0, s.T, s.Ho, s.V}, options) : at::stack(stacked);
  return {o.to(v.scalar_type()), finals.empty() ? at::zeros({0, s.Hs, s.V, s.K}, options) : at::stack(finals)};
}

}  // namespace oryx::ops
