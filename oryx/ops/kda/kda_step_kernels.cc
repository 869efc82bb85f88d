// One token: the state is read and written once.
#include <cmath>

#include "oryx/ops/kda/kda_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/kda/kda_step_kernels.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <hwy/highway.h>

#include "oryx/ops/simd/small_matmul-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::kimi {
namespace HWY_NAMESPACE {

using namespace simd::HWY_NAMESPACE;

// One row of S: S = a * S + u k and o = S q, with the old row's products with a * k and a * q, which cost one reading.
HWY_INLINE void StepRow(const StepArgs& s, const float* a, float b, const float* k, const float* ak, const float* q, size_t Kp, float v,
                        float* HWY_RESTRICT S, float* HWY_RESTRICT o) {
  const Floats d;
  const size_t K = s.K;
  const auto dot_old = [&](const float* HWY_RESTRICT x) HWY_ATTR {
    Vector sum = hn::Zero(d);
    size_t j = 0;
    for (; j + kLanes <= K; j += kLanes) sum = hn::MulAdd(hn::LoadU(d, x + j), hn::LoadU(d, S + j), sum);
    float total = hn::GetLane(hn::SumOfLanes(d, sum));
    for (; j < K; ++j) total += x[j] * S[j];
    return total;
  };
  const float u = b * (v - dot_old(ak));
  for (int64_t g = 0; g < s.groups; ++g) {
    const float *aq = q + 2 * g * Kp + Kp, *kq = q + 2 * g * Kp + Kp - kPad;
    o[g * s.V] = s.scale * (dot_old(aq) + u * *kq);
  }
  const Vector vu = hn::Set(d, u);
  size_t j = 0;
  for (; j + kLanes <= K; j += kLanes) {
    hn::StoreU(hn::MulAdd(vu, hn::LoadU(d, k + j), hn::Mul(hn::LoadU(d, a + j), hn::LoadU(d, S + j))), d, S + j);
  }
  for (; j < K; ++j) S[j] = a[j] * S[j] + u * k[j];
}

// scratch: k, a, a * k, then for each query q (with k . q in its last place) and a * q.
void StepHead(const StepArgs& s, int64_t n, int64_t head, float* scratch) {
  const size_t Kp = PadLength(s.K) + kPad, K = s.K;
  const int64_t Ho = s.Hs * s.groups, at = n * s.Hs + head;
  float *k = scratch, *a = k + Kp, *ak = a + Kp, *q = ak + Kp;
  LoadUnitRow(s.k + (n * s.Hk + head / (s.Hs / s.Hk)) * s.K, s.K, s.l2_eps, k);
  for (size_t j = 0; j < K; ++j) {
    a[j] = std::exp(s.g[at * s.K + j]);
    ak[j] = a[j] * k[j];
  }
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t query = (head * s.groups + g) / (Ho / s.Hq);
    float *qg = q + 2 * g * Kp, *aq = qg + Kp;
    LoadUnitRow(s.q + (n * s.Hq + query) * s.K, s.K, s.l2_eps, qg);
    for (size_t j = 0; j < K; ++j) aq[j] = a[j] * qg[j];
    qg[Kp - kPad] = Dot(k, qg, PadLength(s.K));
  }
  const float* v = s.v + (n * s.Hv + head / (s.Hs / s.Hv)) * s.V;
  float *S = s.state + n * s.state_sequence + head * s.state_head, *o = s.o + (n * Ho + head * s.groups) * s.V;
  for (int64_t i = 0; i < s.V; ++i) StepRow(s, a, s.beta[at], k, ak, q, Kp, v[i], S + i * s.K, o + i);
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::kimi
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::kimi {

HWY_EXPORT(StepHead);

size_t step_scratch_floats(const StepArgs& a) { return static_cast<size_t>((3 + 2 * a.groups) * (a.K + 32)); }

void step_head(const StepArgs& a, int64_t n, int64_t head, float* scratch) { HWY_DYNAMIC_DISPATCH(StepHead)(a, n, head, scratch); }

}  // namespace oryx::ops::kimi
#endif
