// One token: the state is read and written once.
#include <cmath>

#include "oryx/ops/gated_delta/gated_delta_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/gated_delta/gated_delta_step_kernels.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <hwy/highway.h>

#include "oryx/ops/simd/small_matmul-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::gated_delta {
namespace HWY_NAMESPACE {

using namespace simd::HWY_NAMESPACE;

// dot[r] = row r . x for kRows rows of n floats.
template <size_t kRows>
HWY_INLINE void DotRows(const float* HWY_RESTRICT rows, const float* HWY_RESTRICT x, size_t n,
                        float* HWY_RESTRICT dot) {
  const Floats d;
  Vector acc[kRows];
  for (size_t r = 0; r < kRows; ++r) acc[r] = hn::Zero(d);
  size_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vector xj = hn::LoadU(d, x + j);
    for (size_t r = 0; r < kRows; ++r) acc[r] = hn::MulAdd(xj, hn::LoadU(d, rows + r * n + j), acc[r]);
  }
  for (size_t r = 0; r < kRows; ++r) {
    dot[r] = hn::GetLane(hn::SumOfLanes(d, acc[r]));
    for (size_t i = j; i < n; ++i) dot[r] += x[i] * rows[r * n + i];
  }
}

// S = a S + u k^T and o = S q for kRows rows; q, k [., Kp]. Products with q are taken of the old rows, while they are
// read anyway.
template <size_t kRows>
HWY_INLINE void StepRows(const StepArgs& s, float a, float b, const float* k, const float* q, size_t Kp,
                         const float* kq, const float* v, float* S, float* o) {
  const Floats d;
  const size_t K = s.K;
  float predicted[kRows], u[kRows], read[kRows];
  DotRows<kRows>(S, k, K, predicted);
  for (size_t r = 0; r < kRows; ++r) u[r] = b * (v[r] - a * predicted[r]);
  for (int64_t g = 0; g < s.groups; ++g) {
    DotRows<kRows>(S, q + g * Kp, K, read);
    for (size_t r = 0; r < kRows; ++r) o[g * s.V + r] = s.scale * (a * read[r] + u[r] * kq[g * Kp]);
  }
  const Vector va = hn::Set(d, a);
  size_t j = 0;
  for (; j + kLanes <= K; j += kLanes) {
    const Vector kj = hn::LoadU(d, k + j);
    for (size_t r = 0; r < kRows; ++r) {
      float* at = S + r * K + j;
      hn::StoreU(hn::MulAdd(hn::Set(d, u[r]), kj, hn::Mul(va, hn::LoadU(d, at))), d, at);
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t i = j; i < K; ++i) S[r * K + i] = a * S[r * K + i] + u[r] * k[i];
  }
}

void StepHead(const StepArgs& s, int64_t n, int64_t head, float* scratch) {
  const size_t Kp = PadLength(s.K) + kPad;  // one more vector behind each q^ holds k^ . q^
  const int64_t Ho = s.Hs * s.groups, at = n * s.Hs + head;
  float *k = scratch, *q = scratch + Kp;
  LoadUnitRow(s.k + (n * s.Hk + head / (s.Hs / s.Hk)) * s.K, s.K, s.l2_eps, k);
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t query = (head * s.groups + g) / (Ho / s.Hq);
    LoadUnitRow(s.q + (n * s.Hq + query) * s.K, s.K, s.l2_eps, q + g * Kp);
    q[g * Kp + Kp - kPad] = Dot(k, q + g * Kp, PadLength(s.K));
  }
  const float *kq = q + Kp - kPad, *v = s.v + (n * s.Hv + head / (s.Hs / s.Hv)) * s.V;
  const float a = std::exp(s.g[at]), b = s.beta[at];
  float *S = s.state + n * s.state_sequence + head * s.state_head, *o = s.o + (n * Ho + head * s.groups) * s.V;
  int64_t i = 0;
  for (; i + 4 <= s.V; i += 4) StepRows<4>(s, a, b, k, q, Kp, kq, v + i, S + i * s.K, o + i);
  for (; i < s.V; ++i) StepRows<1>(s, a, b, k, q, Kp, kq, v + i, S + i * s.K, o + i);
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::gated_delta
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::gated_delta {

HWY_EXPORT(StepHead);

void step_head(const StepArgs& a, int64_t n, int64_t head, float* scratch) {
  HWY_DYNAMIC_DISPATCH(StepHead)(a, n, head, scratch);
}

}  // namespace oryx::ops::gated_delta
#endif
