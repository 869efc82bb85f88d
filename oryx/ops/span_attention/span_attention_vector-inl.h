// What the attention kernels share: exp2, loads, transposes, and products with register-blocked accumulators. Included
// once for each target.
#if defined(ORYX_SPAN_ATTENTION_VECTOR_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ORYX_SPAN_ATTENTION_VECTOR_INL
#undef ORYX_SPAN_ATTENTION_VECTOR_INL
#else
#define ORYX_SPAN_ATTENTION_VECTOR_INL
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::attention_cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::ScalableTag<float>;
using Vec = hn::Vec<D>;
constexpr D d;
constexpr int64_t kN = HWY_LANES(float);
// Accumulators of kRows x kColumns vectors: 16 of 32 registers, or 12 of 16.
constexpr int kRows = 4;
constexpr int kColumns = (kN == 16 || HWY_ARCH_ARM_A64) ? 4 : 3;
// Queries of a tile: 128 with 16-lane vectors, 96 with narrower ones (a multiple of kColumns vectors). Half of that
// reads keys and values twice as often: 1.1 times the time at 4,096 tokens (Zen 4); the length of the key blocks, 32 to
// 128, made no difference.
constexpr int64_t kLanes = kN == 16 ? 128 : 96;
constexpr int64_t kVectors = kLanes / kN;

HWY_INLINE int64_t RoundUp(int64_t n) { return (n + kN - 1) / kN * kN; }

// 2^x for x <= about 1; zero below -126 (and at -infinity), NaN for NaN. Relative error about 1e-7.
// Adding 1.5 * 2^23 rounds to an integer n, which then stands in the low bits. 2^f = 1 + f p(f) on [-1/2, 1/2]:
// interpolation in Chebyshev nodes, error 5e-9.
HWY_INLINE Vec Exp2(Vec x) {
  const hn::RebindToSigned<D> di;
  const Vec shifted = hn::Add(x, hn::Set(d, 12582912.0f));
  const Vec f = hn::Sub(x, hn::Sub(shifted, hn::Set(d, 12582912.0f)));
  const Vec power =
      hn::BitCast(d, hn::Add(hn::ShiftLeft<23>(hn::BitCast(di, shifted)), hn::Set(di, 127 << 23)));  // 2^n
  Vec p = hn::MulAdd(hn::Set(d, 1.5453162e-4f), f, hn::Set(d, 1.3390864e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.6180826e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.5503571e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4022651e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.9314719e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::Mul(p, power));
}

HWY_INLINE float ToFloat(float x) { return x; }
HWY_INLINE float ToFloat(hwy::bfloat16_t x) {
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}
HWY_INLINE void FromFloat(float x, float* out) { *out = x; }
HWY_INLINE void FromFloat(float x, hwy::bfloat16_t* out) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t rounded = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  std::memcpy(out, &rounded, 2);
}

HWY_INLINE Vec LoadFloats(const float* p) { return hn::LoadU(d, p); }
HWY_INLINE Vec LoadFloats(const hwy::bfloat16_t* p) {
  const hn::Rebind<hwy::bfloat16_t, D> db;
  return hn::PromoteTo(d, hn::LoadU(db, p));
}

// dst[0 .. RoundUp(n)) = factor * src, zeros behind n.
template <typename T>
HWY_INLINE void CopyRow(const T* HWY_RESTRICT src, int64_t n, float factor, float* HWY_RESTRICT dst) {
  const Vec f = hn::Set(d, factor);
  int64_t i = 0;
  for (; i + kN <= n; i += kN) hn::StoreU(hn::Mul(f, LoadFloats(src + i)), d, dst + i);
  for (; i < n; ++i) dst[i] = factor * ToFloat(src[i]);
  for (; i % kN != 0; ++i) dst[i] = 0;
}

// dst[c][r] = src[r][c]; rows and columns multiples of 4 (of 1 without vectors).
HWY_INLINE void Transpose(const float* HWY_RESTRICT src, int64_t src_stride, int64_t rows, int64_t columns,
                          float* HWY_RESTRICT dst, int64_t dst_stride) {
#if HWY_TARGET == HWY_SCALAR
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
#else
  const hn::FixedTag<float, 4> d4;
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t c = 0; c < columns; c += 4) {
      const float* s = src + r * src_stride + c;
      const auto r0 = hn::LoadU(d4, s), r1 = hn::LoadU(d4, s + src_stride);
      const auto r2 = hn::LoadU(d4, s + 2 * src_stride), r3 = hn::LoadU(d4, s + 3 * src_stride);
      const auto a = hn::InterleaveLower(d4, r0, r2), b = hn::InterleaveLower(d4, r1, r3);
      const auto e = hn::InterleaveUpper(d4, r0, r2), f = hn::InterleaveUpper(d4, r1, r3);
      float* t = dst + c * dst_stride + r;
      hn::StoreU(hn::InterleaveLower(d4, a, b), d4, t);
      hn::StoreU(hn::InterleaveUpper(d4, a, b), d4, t + dst_stride);
      hn::StoreU(hn::InterleaveLower(d4, e, f), d4, t + 2 * dst_stride);
      hn::StoreU(hn::InterleaveUpper(d4, e, f), d4, t + 3 * dst_stride);
    }
  }
#endif
}

// c[r][:] (+)= sum_k a[r * a_row + k * a_k] b[k][:], R rows, C vectors.
template <int R, int C, bool kAdd>
HWY_INLINE void ProductTile(int64_t depth, const float* HWY_RESTRICT a, int64_t a_row, int64_t a_k,
                            const float* HWY_RESTRICT b, int64_t b_stride, float* HWY_RESTRICT c, int64_t c_stride) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) acc[r][j] = kAdd ? hn::LoadU(d, c + r * c_stride + j * kN) : hn::Zero(d);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec bv[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) bv[j] = hn::LoadU(d, b + k * b_stride + j * kN);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x = hn::Set(d, a[r * a_row + k * a_k]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) acc[r][j] = hn::MulAdd(x, bv[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) hn::StoreU(acc[r][j], d, c + r * c_stride + j * kN);
  }
}

template <int C, bool kAdd>
HWY_INLINE void ProductColumns(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_k, const float* b,
                               int64_t b_stride, float* c, int64_t c_stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    ProductTile<kRows, C, kAdd>(depth, a + r * a_row, a_row, a_k, b, b_stride, c + r * c_stride, c_stride);
  }
  for (; r < rows; ++r)
    ProductTile<1, C, kAdd>(depth, a + r * a_row, a_row, a_k, b, b_stride, c + r * c_stride, c_stride);
}

// c [rows, vectors * kN] (+)= A b with A[r][k] at a[r * a_row + k * a_k] and b [depth, vectors * kN].
template <bool kAdd>
HWY_NOINLINE void Product(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t a_row, int64_t a_k,
                          const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  for (int64_t j = 0; j < vectors; j += kColumns) {
    const float* bj = b + j * kN;
    float* cj = c + j * kN;
    switch (std::min<int64_t>(kColumns, vectors - j)) {
      case 1:
        ProductColumns<1, kAdd>(rows, depth, a, a_row, a_k, bj, b_stride, cj, c_stride);
        break;
      case 2:
        ProductColumns<2, kAdd>(rows, depth, a, a_row, a_k, bj, b_stride, cj, c_stride);
        break;
      case 3:
        ProductColumns<3, kAdd>(rows, depth, a, a_row, a_k, bj, b_stride, cj, c_stride);
        break;
      default:
        ProductColumns<kColumns, kAdd>(rows, depth, a, a_row, a_k, bj, b_stride, cj, c_stride);
        break;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::attention_cpu
HWY_AFTER_NAMESPACE();

#endif
