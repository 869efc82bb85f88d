#include "oryx/ops/cross_entropy/cross_entropy_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/cross_entropy/cross_entropy_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "oryx/ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = oryx::simd::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

constexpr size_t kMaxLanes = HWY_MAX_BYTES / sizeof(float);
constexpr size_t kStretch = 2048;  // elements between two looks at the maximum; stays in the first-level cache

HWY_INLINE V load(const float* p) { return hn::LoadU(D(), p); }
HWY_INLINE V load(const uint16_t* p) { return simd::load_bf16(D(), p); }
HWY_INLINE void store(V v, float* p) { hn::StoreU(v, D(), p); }
HWY_INLINE void store(V v, uint16_t* p) { simd::store_bf16(v, D(), p); }

HWY_INLINE float value(float x) { return x; }
HWY_INLINE float value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// n elements at x, minus infinity behind them.
template <class T>
HWY_INLINE V load_padded(const T* x, size_t n) {
  float lanes[kMaxLanes];
  for (size_t i = 0; i < kMaxLanes; ++i) lanes[i] = i < n ? value(x[i]) : kLowest;
  return hn::LoadU(D(), lanes);
}

template <class T>
HWY_INLINE float max_of(const T* x, size_t n) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V a = hn::Set(d, kLowest), b = a, c = a, e = a;
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = hn::Max(a, load(x + i));
    b = hn::Max(b, load(x + i + lanes));
    c = hn::Max(c, load(x + i + 2 * lanes));
    e = hn::Max(e, load(x + i + 3 * lanes));
  }
  for (; i + lanes <= n; i += lanes) a = hn::Max(a, load(x + i));
  if (i < n) b = hn::Max(b, load_padded(x + i, n - i));
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(a, b), hn::Max(c, e))));
}

template <class T>
HWY_INLINE float sum_of_exp(const T* x, size_t n, float max) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V m = hn::Set(d, max);
  V a = hn::Zero(d), b = a;
  size_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    a = hn::Add(a, simd::exp_nonpositive(d, hn::Sub(load(x + i), m)));
    b = hn::Add(b, simd::exp_nonpositive(d, hn::Sub(load(x + i + lanes), m)));
  }
  for (; i + lanes <= n; i += lanes) a = hn::Add(a, simd::exp_nonpositive(d, hn::Sub(load(x + i), m)));
  if (i < n) b = hn::Add(b, simd::exp_nonpositive(d, hn::Sub(load_padded(x + i, n - i), m)));
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b)));
}

template <class T>
HWY_INLINE void forward_row(const SoftmaxRows& rows, const T* x, int64_t r) {
  const size_t classes = static_cast<size_t>(rows.classes);
  float max = kLowest;
  double sum = 0;
  for (size_t i = 0; i < classes; i += kStretch) {
    const size_t n = std::min(kStretch, classes - i);
    const float here = max_of(x + i, n);
    if (here > max) {
      sum *= std::exp(static_cast<double>(max) - here);
      max = here;
    }
    sum += sum_of_exp(x + i, n, max);
  }
  const double log_sum = std::log(sum);
  rows.max[r] = max;
  rows.inverse_sum[r] = static_cast<float>(1 / sum);
  rows.lse[r] = static_cast<float>(max + log_sum);
  const int64_t target = rows.targets[r];
  rows.nll[r] =
      target == rows.ignore_index ? 0.0f : static_cast<float>((static_cast<double>(max) - value(x[target])) + log_sum);
}

template <class T>
HWY_INLINE void backward_row(const SoftmaxRows& rows, const T* x, T* d_x, float scale, float z_coef, int64_t r) {
  const D d;
  const size_t lanes = hn::Lanes(d), classes = static_cast<size_t>(rows.classes);
  const int64_t target = rows.targets[r];
  if (target == rows.ignore_index) {
    std::memset(d_x, 0, classes * sizeof(T));
    return;
  }
  const float z_slope = 2 * z_coef * rows.lse[r];
  const float factor = scale * (1 + z_slope) * rows.inverse_sum[r];
  // d_x may overwrite x. p - 1 apart from the z term, which must not be rounded against 1.
  const float p = std::exp(value(x[target]) - rows.max[r]) * rows.inverse_sum[r];
  const float at_target = scale * ((p - 1) + p * z_slope);
  const V m = hn::Set(d, rows.max[r]), f = hn::Set(d, factor);
  size_t i = 0;
  for (; i + lanes <= classes; i += lanes) {
    store(hn::Mul(simd::exp_nonpositive(d, hn::Sub(load(x + i), m)), f), d_x + i);
  }
  if (i < classes) {
    T rest[kMaxLanes];
    store(hn::Mul(simd::exp_nonpositive(d, hn::Sub(load_padded(x + i, classes - i), m)), f), rest);
    std::copy(rest, rest + (classes - i), d_x + i);
  }
  T one[kMaxLanes];
  store(hn::Set(d, at_target), one);
  d_x[target] = one[0];
}

template <class T>
HWY_INLINE void forward_rows(const SoftmaxRows& rows, const T* logits, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) forward_row(rows, logits + r * rows.classes, r);
}

template <class T>
HWY_INLINE void backward_rows(const SoftmaxRows& rows, const T* logits, T* d_logits, float scale, float z_coef,
                              int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    backward_row(rows, logits + r * rows.classes, d_logits + r * rows.classes, scale, z_coef, r);
  }
}

void ForwardF32(const SoftmaxRows& rows, const float* logits, int64_t begin, int64_t end) {
  forward_rows(rows, logits, begin, end);
}
void ForwardBf16(const SoftmaxRows& rows, const uint16_t* logits, int64_t begin, int64_t end) {
  forward_rows(rows, logits, begin, end);
}
void BackwardF32(const SoftmaxRows& rows, const float* logits, float* d_logits, float scale, float z_coef,
                 int64_t begin, int64_t end) {
  backward_rows(rows, logits, d_logits, scale, z_coef, begin, end);
}
void BackwardBf16(const SoftmaxRows& rows, const uint16_t* logits, uint16_t* d_logits, float scale, float z_coef,
                  int64_t begin, int64_t end) {
  backward_rows(rows, logits, d_logits, scale, z_coef, begin, end);
}

}  // namespace oryx::ops::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::kernels {

HWY_EXPORT(ForwardF32);
HWY_EXPORT(ForwardBf16);
HWY_EXPORT(BackwardF32);
HWY_EXPORT(BackwardBf16);

void softmax_forward(const SoftmaxRows& rows, const float* logits, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(ForwardF32)(rows, logits, begin, end);
}
void softmax_forward(const SoftmaxRows& rows, const uint16_t* logits, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(ForwardBf16)(rows, logits, begin, end);
}
void softmax_backward(const SoftmaxRows& rows, const float* logits, float* d_logits, float scale, float z_coef,
                      int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(BackwardF32)(rows, logits, d_logits, scale, z_coef, begin, end);
}
void softmax_backward(const SoftmaxRows& rows, const uint16_t* logits, uint16_t* d_logits, float scale, float z_coef,
                      int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(BackwardBf16)(rows, logits, d_logits, scale, z_coef, begin, end);
}

}  // namespace oryx::ops::kernels
#endif
