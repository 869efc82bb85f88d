#include "oryx/ops/adamw/adamw_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/adamw/adamw_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "oryx/ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = oryx::simd::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

template <bool kPart>
HWY_INLINE void adamw_vector(const AdamwConstants& c, float* p, const float* g, float* m, float* v,
                             [[maybe_unused]] size_t n) {
  const D d;
  const auto load = [&](const float* x) HWY_ATTR {
    if constexpr (kPart) {
      return simd::load_first(d, x, n);
    } else {
      return hn::LoadU(d, x);
    }
  };
  const auto store = [&](V x, float* to) HWY_ATTR {
    if constexpr (kPart) {
      simd::store_first(x, d, to, n);
    } else {
      hn::StoreU(x, d, to);
    }
  };
  const V grad = hn::Mul(load(g), hn::Set(d, c.grad_scale));
  const V first = hn::MulAdd(hn::Set(d, c.beta1), load(m), hn::Mul(hn::Set(d, c.one_less_beta1), grad));
  const V second = hn::MulAdd(hn::Set(d, c.beta2), load(v), hn::Mul(hn::Mul(hn::Set(d, c.one_less_beta2), grad), grad));
  const V root = hn::MulAdd(hn::Sqrt(second), hn::Set(d, c.inverse_root), hn::Set(d, c.eps));
  const V kept = hn::Mul(load(p), hn::Set(d, c.keep));
  store(first, m);
  store(second, v);
  store(hn::NegMulAdd(hn::Set(d, c.step_size), hn::Div(first, root), kept), p);
}

void Adamw(const AdamwConstants& c, float* p, const float* g, float* m, float* v, int64_t count) {
  const size_t lanes = hn::Lanes(D()), n = static_cast<size_t>(count);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) adamw_vector<false>(c, p + i, g + i, m + i, v + i, lanes);
  if (i < n) adamw_vector<true>(c, p + i, g + i, m + i, v + i, n - i);
}

double SumOfSquares(const float* x, int64_t count) {
  const hn::ScalableTag<double> d;
  const hn::Rebind<float, decltype(d)> df;
  const size_t lanes = hn::Lanes(d), n = static_cast<size_t>(count);
  auto a = hn::Zero(d), b = a, c = a, e = a;
  const auto square = [&](size_t i, hn::Vec<decltype(d)> acc) HWY_ATTR {
    const auto wide = hn::PromoteTo(d, hn::LoadU(df, x + i));
    return hn::MulAdd(wide, wide, acc);
  };
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = square(i, a);
    b = square(i + lanes, b);
    c = square(i + 2 * lanes, c);
    e = square(i + 3 * lanes, e);
  }
  double sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

}  // namespace oryx::ops::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::kernels {

HWY_EXPORT(Adamw);
HWY_EXPORT(SumOfSquares);

void adamw(const AdamwConstants& c, float* p, const float* g, float* m, float* v, int64_t n) {
  HWY_DYNAMIC_DISPATCH(Adamw)(c, p, g, m, v, n);
}

double sum_of_squares(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(SumOfSquares)(x, n); }

}  // namespace oryx::ops::kernels
#endif
