#include <algorithm>

#include "oryx/ops/ssd/ssd_internal.h"

namespace oryx::ops {
namespace {

bool is_multiple(int64_t big, int64_t small) { return small > 0 && big % small == 0; }

void check_dtypes(const char* op, const SsdInputs& in) {
  const at::ScalarType t = in.v.scalar_type();
  TORCH_CHECK(t == at::kFloat || t == at::kBFloat16 || t == at::kDouble, op,
              ": v must be float32, bfloat16 or float64, got ", t);
  TORCH_CHECK(in.q.scalar_type() == t && in.k.scalar_type() == t, op, ": q, k and v must be of one dtype, got ",
              in.q.scalar_type(), ", ", in.k.scalar_type(), ", ", t);
  for (const at::Tensor* p : {&in.dt_raw, &in.dt_bias, &in.A_log, &in.D, &in.initial_state}) {
    TORCH_CHECK(!p->defined() || p->is_floating_point(), op,
                ": dt_raw, dt_bias, A_log, D and the state must be floating point");
  }
}

void check_heads(const char* op, const SsdSizes& s) {
  TORCH_CHECK(is_multiple(s.Hs, s.Hk) && is_multiple(s.Hs, s.Hv) && is_multiple(s.Ho, s.Hq) && is_multiple(s.Ho, s.Hs),
              op, ": heads must divide one another, got Hq ", s.Hq, ", Hk ", s.Hk, ", Hv ", s.Hv);
}

void check_spans(const char* op, const at::Tensor& spans) {
  TORCH_CHECK(!spans.defined() ||
                  (spans.dim() == 2 && spans.size(1) == 3 && at::isIntegralType(spans.scalar_type(), false)),
              op, ": spans must be integers [n, 3] (row, begin, end), got ", spans.scalar_type(), " ", spans.sizes());
}

// As list_sequences does, but for what they hold.
int64_t count_sequences(const char* op, int64_t B, const at::Tensor& cu) {
  if (!cu.defined()) return B;
  TORCH_CHECK(B == 1, op, ": packed documents (cu_seqlens) stand in one row, but the batch has ", B, " rows");
  TORCH_CHECK(cu.dim() == 1 && cu.numel() >= 2 && at::isIntegralType(cu.scalar_type(), false), op,
              ": cu_seqlens must be a vector of at least 2 integers, got ", cu.scalar_type(), " ", cu.sizes());
  return cu.numel() - 1;
}

std::vector<uint8_t> wanted_tokens(const char* op, const at::Tensor& spans, int64_t B, int64_t T) {
  if (!spans.defined()) return {};
  std::vector<uint8_t> wanted(B * T, 0);
  const at::Tensor host = spans.to(at::kCPU, at::kLong).contiguous();
  const int64_t* s = host.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < host.size(0); ++i, s += 3) {
    TORCH_CHECK(s[0] >= 0 && s[0] < B && s[1] >= 0 && s[1] <= s[2] && s[2] <= T, op, ": span (", s[0], ", ", s[1], ", ",
                s[2], ") lies outside [", B, ", ", T, "]");
    std::fill(wanted.begin() + s[0] * T + s[1], wanted.begin() + s[0] * T + s[2], 1);
  }
  return wanted;
}

}  // namespace

bool SsdSizes::wants_any(int64_t row, int64_t begin, int64_t end) const {
  if (wanted.empty()) return true;
  const auto first = wanted.begin() + row * T;
  return std::find(first + begin, first + end, 1) != first + end;
}

SsdSizes ssd_shapes(const char* op, const SsdInputs& in) {
  TORCH_CHECK(in.q.dim() == 4 && in.k.dim() == 4 && in.v.dim() == 4, op, ": q, k, v must be [B, T, heads, dim], got ",
              in.q.sizes(), ", ", in.k.sizes(), ", ", in.v.sizes());
  SsdSizes s;
  s.B = in.v.size(0), s.T = in.v.size(1), s.Hv = in.v.size(2), s.V = in.v.size(3);
  s.Hq = in.q.size(2), s.Hk = in.k.size(2), s.K = in.k.size(3);
  s.Hs = std::max(s.Hk, s.Hv), s.Ho = std::max(s.Hq, s.Hs);
  TORCH_CHECK(
      in.q.sizes() == at::IntArrayRef({s.B, s.T, s.Hq, s.K}) && in.k.sizes() == at::IntArrayRef({s.B, s.T, s.Hk, s.K}),
      op, ": q ", in.q.sizes(), " and k ", in.k.sizes(), " do not go with v ", in.v.sizes());
  TORCH_CHECK(s.K > 0 && s.V > 0, op, ": head dimensions must be positive, got K ", s.K, ", V ", s.V);
  check_heads(op, s);
  check_dtypes(op, in);
  TORCH_CHECK(in.dt_raw.sizes() == at::IntArrayRef({s.B, s.T, s.Hs}), op, ": dt_raw must be [", s.B, ", ", s.T, ", ",
              s.Hs, "], got ", in.dt_raw.sizes());
  for (const at::Tensor* p : {&in.dt_bias, &in.A_log, &in.D}) {
    TORCH_CHECK(p->sizes() == at::IntArrayRef({s.Hs}), op, ": dt_bias, A_log and D must be [", s.Hs, "], got ",
                p->sizes());
  }
  s.N = count_sequences(op, s.B, in.cu_seqlens);
  TORCH_CHECK(!in.initial_state.defined() || in.initial_state.sizes() == at::IntArrayRef({s.count(), s.Hs, s.V, s.K}),
              op, ": initial_state must be [", s.count(), ", ", s.Hs, ", ", s.V, ", ", s.K, "], got ",
              in.initial_state.sizes());
  check_spans(op, in.spans);
  return s;
}

SsdSizes ssd_sizes(const char* op, const SsdInputs& in) {
  SsdSizes s = ssd_shapes(op, in);
  s.sequences = list_sequences(op, s.B, s.T, in.cu_seqlens.defined() ? std::optional(in.cu_seqlens) : std::nullopt);
  s.wanted = wanted_tokens(op, in.spans, s.B, s.T);
  return s;
}

SsdInputs ssd_convert(const SsdInputs& in, at::ScalarType dtype) {
  SsdInputs out = in;
  for (at::Tensor* p : {&out.q, &out.k, &out.v, &out.dt_raw, &out.dt_bias, &out.A_log, &out.D, &out.initial_state}) {
    if (p->defined()) *p = p->detach().to(dtype);
  }
  return out;
}

}  // namespace oryx::ops
