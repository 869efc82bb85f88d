// Matrix products whose operands lie in L1 or L2 (dimensions up to about 256), for the vector kernels of the operators.
// Included once for each instruction set, after HWY_TARGET_INCLUDE and foreach_target.h, like every "-inl.h" of
// Highway.
//
//   MatMul:       C[m, n] = beta C + A B          A[m, k], B[k, n] row-major
//   MatMul<kT>:   C[m, n] = beta C + A^T B        A stored [k, m]
//   Transpose                                     for A B^T: transpose B first; O(n k) beside O(m n k)
//
// Rows are `ld` floats apart. n is rounded up to whole vectors: rows of B must be readable and rows of C writable up to
// PadLength(n) columns. Buffers whose padding columns are zero keep it zero. Sums run over k in order, whatever the
// blocking: results depend only on the instruction set.
//
// Triangles: kLowerOut computes only the tiles of C that meet j <= i (tiles above are left alone); kLowerA takes A(i,
// k) as zero, and does not read it, beyond the tile of the diagonal (k < tile's last row); kUpperA likewise before (k
// >= tile's first row). The elements on the wrong side within a tile of the diagonal must be there, as zeros.
//
// The tile of C lives in registers: kTileRows x 2 vectors; per step of k two loads from B and kTileRows broadcasts from
// A.

#if defined(ORYX_OPS_SIMD_SMALL_MATMUL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORYX_OPS_SIMD_SMALL_MATMUL_INL_H_
#undef ORYX_OPS_SIMD_SMALL_MATMUL_INL_H_
#else
#define ORYX_OPS_SIMD_SMALL_MATMUL_INL_H_
#endif

#undef ORYX_TILE_LAMBDA

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::simd {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Floats = hn::ScalableTag<float>;
using Vector = hn::Vec<Floats>;

constexpr size_t kLanes = HWY_LANES(float);
constexpr size_t kTileRows = HWY_MAX_BYTES >= 64 ? 8 : 6;  // 16 of 32 registers, or 12 of 16
constexpr size_t kPad = 16;  // the longest vector: paddings do not depend on the instruction set

enum class Order { kPlain, kT };
enum class Triangle { kFull, kLowerOut, kLowerA, kUpperA };

// Floats that a row of n takes.
HWY_INLINE constexpr size_t PadLength(size_t n) { return (n + kPad - 1) / kPad * kPad; }
// The distance of rows of n: an odd number of cache lines, so that a column's lines spread over all sets of the cache.
HWY_INLINE constexpr size_t PadStride(size_t n) { return (PadLength(n) / kPad | 1) * kPad; }

// f(0), .. f(n - 1) with indices that are constants from the start: tiles that are indexed by a loop variable, even of
// a loop that is unrolled later, travel through the stack.
#define ORYX_TILE_LAMBDA HWY_ATTR __attribute__((always_inline))
template <class F, size_t... kI>
HWY_INLINE void UnrollOver(const F& f, std::index_sequence<kI...>) {
  (f(std::integral_constant<size_t, kI>()), ...);
}
template <size_t kN, class F>
HWY_INLINE void Unroll(const F& f) {
  UnrollOver(f, std::make_index_sequence<kN>());
}

template <Order kOrder>
HWY_INLINE Vector BroadcastA(const float* HWY_RESTRICT a, size_t lda, size_t i, size_t k) {
  return hn::Set(Floats(), kOrder == Order::kPlain ? a[i * lda + k] : a[k * lda + i]);
}

// acc = beta C, or zero without reading C.
template <bool kZero, size_t kRows, size_t kVectors>
HWY_INLINE void InitTile(const float* HWY_RESTRICT c, size_t ldc, float beta, Vector (&acc)[kRows][kVectors]) {
  Unroll<kRows>([&](auto i) ORYX_TILE_LAMBDA {
    Unroll<kVectors>([&](auto v) ORYX_TILE_LAMBDA {
      const Floats d;
      acc[i][v] = kZero ? hn::Zero(d) : hn::Mul(hn::Set(d, beta), hn::LoadU(d, c + i * ldc + v * kLanes));
    });
  });
}

// acc += A[:, k0:k1] B[k0:k1, :], A and B already at the tile's first row and column.
template <Order kOrder, size_t kRows, size_t kVectors>
HWY_INLINE void AccumulateTile(const float* HWY_RESTRICT a, size_t lda, const float* HWY_RESTRICT b, size_t ldb,
                               size_t k0, size_t k1, Vector (&acc)[kRows][kVectors]) {
  for (size_t k = k0; k < k1; ++k) {
    Vector bk[kVectors];
    Unroll<kVectors>([&](auto v) ORYX_TILE_LAMBDA { bk[v] = hn::LoadU(Floats(), b + k * ldb + v * kLanes); });
    Unroll<kRows>([&](auto i) ORYX_TILE_LAMBDA {
      const Vector ai = BroadcastA<kOrder>(a, lda, i, k);
      Unroll<kVectors>([&](auto v) ORYX_TILE_LAMBDA { acc[i][v] = hn::MulAdd(ai, bk[v], acc[i][v]); });
    });
  }
}

template <size_t kRows, size_t kVectors>
HWY_INLINE void StoreTile(const Vector (&acc)[kRows][kVectors], float* HWY_RESTRICT c, size_t ldc) {
  Unroll<kRows>([&](auto i) ORYX_TILE_LAMBDA {
    Unroll<kVectors>([&](auto v) ORYX_TILE_LAMBDA { hn::StoreU(acc[i][v], Floats(), c + i * ldc + v * kLanes); });
  });
}

template <Order kOrder, bool kZero, size_t kRows, size_t kVectors>
HWY_NOINLINE void Tile(const float* a, size_t lda, const float* b, size_t ldb, float beta, float* c, size_t ldc,
                       size_t k0, size_t k1) {
  Vector acc[kRows][kVectors];
  InitTile<kZero>(c, ldc, beta, acc);
  AccumulateTile<kOrder>(a, lda, b, ldb, k0, k1, acc);
  StoreTile(acc, c, ldc);
}

// Rows [i, i + kRows) of C.
template <Order kOrder, Triangle kTriangle, bool kZero, size_t kRows>
HWY_INLINE void RowBlock(size_t i, size_t n, size_t k0, size_t k1, const float* a, size_t lda, const float* b,
                         size_t ldb, float beta, float* c, size_t ldc) {
  if (kTriangle == Triangle::kLowerOut) n = std::min(n, i + kRows);
  if (kTriangle == Triangle::kLowerA) k1 = std::min(k1, i + kRows);
  if (kTriangle == Triangle::kUpperA) k0 = std::max(k0, i);
  const float* ai = kOrder == Order::kPlain ? a + i * lda : a + i;
  float* ci = c + i * ldc;
  size_t j = 0;
  for (; j + kLanes < n; j += 2 * kLanes) Tile<kOrder, kZero, kRows, 2>(ai, lda, b + j, ldb, beta, ci + j, ldc, k0, k1);
  if (j < n) Tile<kOrder, kZero, kRows, 1>(ai, lda, b + j, ldb, beta, ci + j, ldc, k0, k1);
}

template <Order kOrder, Triangle kTriangle, bool kZero>
HWY_INLINE void AllRows(size_t m0, size_t m1, size_t n, size_t k0, size_t k1, const float* a, size_t lda,
                        const float* b, size_t ldb, float beta, float* c, size_t ldc) {
  size_t i = m0;
  for (; i + kTileRows <= m1; i += kTileRows) {
    RowBlock<kOrder, kTriangle, kZero, kTileRows>(i, n, k0, k1, a, lda, b, ldb, beta, c, ldc);
  }
  if (i + 4 <= m1) {
    RowBlock<kOrder, kTriangle, kZero, 4>(i, n, k0, k1, a, lda, b, ldb, beta, c, ldc);
    i += 4;
  }
  if (i + 2 <= m1) {
    RowBlock<kOrder, kTriangle, kZero, 2>(i, n, k0, k1, a, lda, b, ldb, beta, c, ldc);
    i += 2;
  }
  if (i < m1) RowBlock<kOrder, kTriangle, kZero, 1>(i, n, k0, k1, a, lda, b, ldb, beta, c, ldc);
}

// Rows [m0, m1) of C = beta C + op(A)[:, k0:k1] B[k0:k1, :]; C is not read when beta is 0. Pointers stand at row and
// column 0 of the whole matrices, so that triangles are meant by absolute row and column.
template <Order kOrder = Order::kPlain, Triangle kTriangle = Triangle::kFull>
HWY_INLINE void MatMulRange(size_t m0, size_t m1, size_t n, size_t k0, size_t k1, const float* a, size_t lda,
                            const float* b, size_t ldb, float beta, float* c, size_t ldc) {
  if (beta == 0) {
    AllRows<kOrder, kTriangle, true>(m0, m1, n, k0, k1, a, lda, b, ldb, beta, c, ldc);
  } else {
    AllRows<kOrder, kTriangle, false>(m0, m1, n, k0, k1, a, lda, b, ldb, beta, c, ldc);
  }
}

template <Order kOrder = Order::kPlain, Triangle kTriangle = Triangle::kFull>
HWY_INLINE void MatMul(size_t m, size_t n, size_t k, const float* a, size_t lda, const float* b, size_t ldb, float beta,
                       float* c, size_t ldc) {
  MatMulRange<kOrder, kTriangle>(0, m, n, 0, k, a, lda, b, ldb, beta, c, ldc);
}

// to[c, r] = from[r, c], in blocks of 4 x 4: rows and columns are rounded up to multiples of 4, which both buffers must
// hold.
HWY_INLINE void Transpose(size_t rows, size_t columns, const float* HWY_RESTRICT from, size_t ld_from,
                          float* HWY_RESTRICT to, size_t ld_to) {
#if HWY_TARGET == HWY_SCALAR
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < columns; ++c) to[c * ld_to + r] = from[r * ld_from + c];
  }
#else
  const hn::FixedTag<float, 4> d;
  const hn::RepartitionToWide<decltype(d)> dw;
  for (size_t r = 0; r < rows; r += 4) {
    for (size_t c = 0; c < columns; c += 4) {
      const float* f = from + r * ld_from + c;
      const auto r0 = hn::LoadU(d, f), r1 = hn::LoadU(d, f + ld_from), r2 = hn::LoadU(d, f + 2 * ld_from),
                 r3 = hn::LoadU(d, f + 3 * ld_from);
      const auto a = hn::BitCast(dw, hn::InterleaveLower(d, r0, r1)),
                 b = hn::BitCast(dw, hn::InterleaveLower(d, r2, r3)),
                 e = hn::BitCast(dw, hn::InterleaveUpper(d, r0, r1)),
                 g = hn::BitCast(dw, hn::InterleaveUpper(d, r2, r3));
      float* t = to + c * ld_to + r;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dw, a, b)), d, t);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dw, a, b)), d, t + ld_to);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dw, e, g)), d, t + 2 * ld_to);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dw, e, g)), d, t + 3 * ld_to);
    }
  }
#endif
}

// x . y over whole vectors (n rounded up; the padding is zero in one of them).
HWY_INLINE float Dot(const float* HWY_RESTRICT x, const float* HWY_RESTRICT y, size_t n) {
  const Floats d;
  Vector s = hn::Zero(d);
  for (size_t i = 0; i < n; i += kLanes) s = hn::MulAdd(hn::LoadU(d, x + i), hn::LoadU(d, y + i), s);
  return hn::GetLane(hn::SumOfLanes(d, s));
}

// y = a x over whole vectors; y may be x.
HWY_INLINE void ScaleTo(float a, const float* x, size_t n, float* y) {
  const Floats d;
  const Vector va = hn::Set(d, a);
  for (size_t i = 0; i < n; i += kLanes) hn::StoreU(hn::Mul(va, hn::LoadU(d, x + i)), d, y + i);
}

// to = a from, n floats exactly read; zeros up to PadLength(n).
HWY_INLINE void LoadRow(float a, const float* HWY_RESTRICT from, size_t n, float* HWY_RESTRICT to) {
  const Floats d;
  const Vector va = hn::Set(d, a);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::Mul(va, hn::LoadU(d, from + i)), d, to + i);
  for (; i < n; ++i) to[i] = a * from[i];
  for (; i < PadLength(n); ++i) to[i] = 0;
}

// to = a from, n floats exactly written.
HWY_INLINE void StoreRow(float a, const float* HWY_RESTRICT from, size_t n, float* HWY_RESTRICT to) {
  const Floats d;
  const Vector va = hn::Set(d, a);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::Mul(va, hn::LoadU(d, from + i)), d, to + i);
  for (; i < n; ++i) to[i] = a * from[i];
}

// to = from * rsqrt(sum from^2 + eps); returns the factor.
HWY_INLINE float LoadUnitRow(const float* HWY_RESTRICT from, size_t n, float eps, float* HWY_RESTRICT to) {
  LoadRow(1, from, n, to);
  const float r = 1 / std::sqrt(Dot(to, to, n) + eps);
  ScaleTo(r, to, PadLength(n), to);
  return r;
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::simd
HWY_AFTER_NAMESPACE();

#endif  // ORYX_OPS_SIMD_SMALL_MATMUL_INL_H_
