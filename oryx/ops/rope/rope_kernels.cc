#include "oryx/ops/rope/rope_kernels.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/rope/rope_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::rope_cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

void RotateToken(const float* HWY_RESTRICT cosine, const float* HWY_RESTRICT sine, float sign,
                 const float* HWY_RESTRICT x, float* HWY_RESTRICT y, int64_t heads, int64_t x_head_stride,
                 int64_t y_head_stride, int64_t half, int64_t dim) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto sign_v = hn::Set(d, sign);
  for (int64_t h = 0; h < heads; ++h) {
    const float* low = x + h * x_head_stride;
    const float* high = low + half;
    float* y_low = y + h * y_head_stride;
    float* y_high = y_low + half;
    int64_t m = 0;
    for (; m + lanes <= half; m += lanes) {
      const auto c = hn::LoadU(d, cosine + m);
      const auto s = hn::Mul(sign_v, hn::LoadU(d, sine + m));
      const auto a = hn::LoadU(d, low + m);
      const auto b = hn::LoadU(d, high + m);
      hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, y_low + m);
      hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, y_high + m);
    }
    for (; m < half; ++m) {
      const float s = sign * sine[m], a = low[m], b = high[m];
      y_low[m] = a * cosine[m] - b * s;
      y_high[m] = b * cosine[m] + a * s;
    }
    if (dim > 2 * half)
      std::memcpy(y_low + 2 * half, low + 2 * half, static_cast<size_t>(dim - 2 * half) * sizeof(float));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::rope_cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::rope_cpu {
HWY_EXPORT(RotateToken);

void rotate_token(const float* cosine, const float* sine, float sign, const float* x, float* y, int64_t heads,
                  int64_t x_head_stride, int64_t y_head_stride, int64_t half, int64_t dim) {
  HWY_DYNAMIC_DISPATCH(RotateToken)(cosine, sine, sign, x, y, heads, x_head_stride, y_head_stride, half, dim);
}
}  // namespace oryx::ops::rope_cpu
#endif
