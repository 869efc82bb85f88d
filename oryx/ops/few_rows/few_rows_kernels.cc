#include "oryx/ops/few_rows/few_rows_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/few_rows/few_rows_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// Rows of x in a tile: with four rows of w their sums fill the registers.
constexpr int64_t kTileRows = HWY_MAX_BYTES >= 64 ? 4 : 2;

// R rows of x times C rows of w. Each sum has one accumulator, which takes the vectors of k in order, whatever the
// tile.
template <int R, int C>
HWY_INLINE void tile(const float* HWY_RESTRICT x, int64_t x_stride, const float* HWY_RESTRICT w, int64_t w_stride,
                     int64_t K, float* HWY_RESTRICT y, int64_t y_stride) {
  const D d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  V sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = hn::Zero(d);
  }
  int64_t k = 0;
  for (; k + lanes <= K; k += lanes) {
    V xs[R];
    for (int r = 0; r < R; ++r) xs[r] = hn::LoadU(d, x + r * x_stride + k);
    for (int c = 0; c < C; ++c) {
      const V wc = hn::LoadU(d, w + c * w_stride + k);
      for (int r = 0; r < R; ++r) sums[r][c] = hn::MulAdd(xs[r], wc, sums[r][c]);
    }
  }
  if (k < K) {
    const auto rest = hn::FirstN(d, static_cast<size_t>(K - k));
    V xs[R];
    for (int r = 0; r < R; ++r) xs[r] = hn::MaskedLoad(rest, d, x + r * x_stride + k);
    for (int c = 0; c < C; ++c) {
      const V wc = hn::MaskedLoad(rest, d, w + c * w_stride + k);
      for (int r = 0; r < R; ++r) sums[r][c] = hn::MulAdd(xs[r], wc, sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) y[r * y_stride + c] = hn::GetLane(hn::SumOfLanes(d, sums[r][c]));
  }
}

template <int C>
HWY_INLINE void columns(const float* x, int64_t M, int64_t K, int64_t x_stride, const float* w, int64_t w_stride,
                        float* y, int64_t y_stride) {
  int64_t m = 0;
  for (; m + kTileRows <= M; m += kTileRows)
    tile<kTileRows, C>(x + m * x_stride, x_stride, w, w_stride, K, y + m * y_stride, y_stride);
  for (; m < M; ++m) tile<1, C>(x + m * x_stride, x_stride, w, w_stride, K, y + m * y_stride, y_stride);
}

void FewRows(const float* x, int64_t M, int64_t K, int64_t x_stride, const float* w, int64_t w_stride, int64_t begin,
             int64_t end, float* y, int64_t y_stride) {
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) columns<4>(x, M, K, x_stride, w + n * w_stride, w_stride, y + n, y_stride);
  for (; n < end; ++n) columns<1>(x, M, K, x_stride, w + n * w_stride, w_stride, y + n, y_stride);
}

}  // namespace oryx::ops::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::kernels {

HWY_EXPORT(FewRows);

void few_rows_product(const float* x, int64_t M, int64_t K, int64_t x_stride, const float* w, int64_t w_stride,
                      int64_t begin, int64_t end, float* y, int64_t y_stride) {
  HWY_DYNAMIC_DISPATCH(FewRows)(x, M, K, x_stride, w, w_stride, begin, end, y, y_stride);
}

}  // namespace oryx::ops::kernels
#endif
