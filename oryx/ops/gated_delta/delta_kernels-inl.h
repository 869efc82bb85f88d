// What the vector kernels of the delta rules (gated_delta_kernels.cc, and those of oryx/ops/kda/) share: scratch memory, the triangular system of a
// chunk, the state in and out. Included once for each instruction set, after HWY_TARGET_INCLUDE and foreach_target.h, like every "-inl.h" of Highway.

#if defined(ORYX_OPS_GATED_DELTA_DELTA_KERNELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORYX_OPS_GATED_DELTA_DELTA_KERNELS_INL_H_
#undef ORYX_OPS_GATED_DELTA_DELTA_KERNELS_INL_H_
#else
#define ORYX_OPS_GATED_DELTA_DELTA_KERNELS_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <cmath>
#include <cstring>

#include "oryx/ops/gated_delta/gated_delta_kernels.h"
#include "oryx/ops/simd/small_matmul-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::gated_delta {
namespace HWY_NAMESPACE {

using namespace simd::HWY_NAMESPACE;

constexpr size_t kC = 64;               // tokens of a chunk: kChunk of gated_delta_internal.h
constexpr size_t kLdc = PadStride(kC);  // row distance of [C, C] matrices

// Hands out pieces of the scratch memory; with a null base it only counts.
struct Arena {
  float* base;
  size_t used = 0;
  float* take(size_t floats) {
    float* p = base == nullptr ? nullptr : base + used;
    used += PadLength(floats);
    return p;
  }
};

struct Sizes {
  size_t K, V, Kp, Vp, ldk, ldv;
  explicit Sizes(const KernelArgs& a)
      : K(a.K), V(a.V), Kp(PadLength(K)), Vp(PadLength(V)), ldk(PadStride(K)), ldv(PadStride(V)) {}
};

HWY_INLINE Vector ExpOf(Vector x) {
  // Highway's Exp gives 0 for NaN.
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(Floats(), x));
}

// Gradient of a row before normalisation, in place: r (d - x^ (x^ . d)).
HWY_INLINE void UnitRowBackward(const float* HWY_RESTRICT unit, float r, size_t n, float* HWY_RESTRICT d) {
  const Floats tag;
  const Vector s = hn::Set(tag, Dot(unit, d, n)), vr = hn::Set(tag, r);
  for (size_t i = 0; i < n; i += kLanes) {
    const Vector x = hn::LoadU(tag, unit + i);
    hn::StoreU(hn::Mul(vr, hn::NegMulAdd(x, s, hn::LoadU(tag, d + i))), tag, d + i);
  }
}

HWY_INLINE void ZeroRows(float* x, size_t ld, size_t from, size_t to) {
  for (size_t i = from; i < to; ++i) std::memset(x + i * ld, 0, ld * sizeof(float));
}

// Rows [i, i + kRows) of the triangular system, the tile in registers throughout.
//   forward:   x_i += sum_{j<i} N_ij y_j, y_i = b_i x_i        backward:  x_i += sum_{j>i} N_ji y_j, y_i = b_i x_i
template <bool kBackward, size_t kRows, size_t kVectors>
HWY_NOINLINE void SolveTile(size_t i, size_t L, const float* N, const float* b, float* x, float* y, size_t ldv) {
  const Floats d;
  Vector acc[kRows][kVectors];
  InitTile<false>(x + i * ldv, ldv, 1, acc);
  if (kBackward) {
    AccumulateTile<Order::kT>(N + i, kLdc, y, ldv, i + kRows, L, acc);
  } else {
    AccumulateTile<Order::kPlain>(N + i * kLdc, kLdc, y, ldv, 0, i, acc);
  }
  Unroll<kRows>([&](auto step) ORYX_TILE_LAMBDA {
    constexpr size_t r = kBackward ? kRows - 1 - step : step;
    const Vector br = hn::Set(d, b[i + r]);
    Vector yr[kVectors];
    Unroll<kVectors>([&](auto v) ORYX_TILE_LAMBDA {
      yr[v] = hn::Mul(br, acc[r][v]);
      hn::StoreU(yr[v], d, y + (i + r) * ldv + v * kLanes);
    });
    Unroll<kRows - 1 - step>([&](auto later) ORYX_TILE_LAMBDA {
      constexpr size_t o = kBackward ? later : r + 1 + later;
      const Vector n = hn::Set(d, kBackward ? N[(i + r) * kLdc + i + o] : N[(i + o) * kLdc + i + r]);
      Unroll<kVectors>([&](auto v) ORYX_TILE_LAMBDA { acc[o][v] = hn::MulAdd(n, yr[v], acc[o][v]); });
    });
  });
  StoreTile(acc, x + i * ldv, ldv);
}

template <bool kBackward, size_t kRows>
HWY_INLINE void SolveRows(size_t i, size_t L, size_t Vp, const float* N, const float* b, float* x, float* y,
                          size_t ldv) {
  size_t j = 0;
  for (; j + kLanes < Vp; j += 2 * kLanes) SolveTile<kBackward, kRows, 2>(i, L, N, b, x + j, y + j, ldv);
  if (j < Vp) SolveTile<kBackward, kRows, 1>(i, L, N, b, x + j, y + j, ldv);
}

// x holds the right-hand side, then the solution; y = diag(b) x.
template <bool kBackward>
HWY_NOINLINE void Solve(size_t L, size_t Vp, const float* N, const float* b, float* x, float* y, size_t ldv) {
  size_t left = L;
  while (left > 0) {
    const size_t n = left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const size_t i = kBackward ? left - n : L - left;
    if (n == kTileRows) {
      SolveRows<kBackward, kTileRows>(i, L, Vp, N, b, x, y, ldv);
    } else if (n == 4) {
      SolveRows<kBackward, 4>(i, L, Vp, N, b, x, y, ldv);
    } else if (n == 2) {
      SolveRows<kBackward, 2>(i, L, Vp, N, b, x, y, ldv);
    } else {
      SolveRows<kBackward, 1>(i, L, Vp, N, b, x, y, ldv);
    }
    left -= n;
  }
}

// St [Kp, ldv] = transpose of a dense [V, K] (zeros when null), by way of tmp [Vp, ldk].
HWY_INLINE void LoadState(const Sizes& z, const float* from, float* tmp, float* St) {
  ZeroRows(tmp, z.ldk, 0, z.Vp);
  if (from != nullptr) {
    for (size_t v = 0; v < z.V; ++v) LoadRow(1, from + v * z.K, z.K, tmp + v * z.ldk);
  }
  Transpose(z.Vp, z.Kp, tmp, z.ldk, St, z.ldv);
}

HWY_INLINE void StoreState(const Sizes& z, const float* St, float* tmp, float* to) {
  Transpose(z.Kp, z.Vp, St, z.ldv, tmp, z.ldk);
  for (size_t v = 0; v < z.V; ++v) StoreRow(1, tmp + v * z.ldk, z.K, to + v * z.K);
}

// The wanted rows of a chunk lie in [lo, hi); empty when none is.
HWY_INLINE void WantedRows(const KernelArgs& a, int64_t begin, size_t L, size_t* lo, size_t* hi) {
  *lo = 0, *hi = L;
  if (a.wanted == nullptr) return;
  while (*hi > 0 && a.wanted[begin + *hi - 1] == 0) --*hi;
  while (*lo < *hi && a.wanted[begin + *lo] == 0) ++*lo;
}

// Row i of o [C, V], times scale, to where out_head's output stands; zeros where no readout is wanted, whatever o holds there.
HWY_INLINE void StoreOutputs(const KernelArgs& a, const Sizes& z, int64_t begin, size_t L, int64_t out_head, const float* o) {
  for (size_t i = 0; i < L; ++i) {
    const int64_t t = begin + static_cast<int64_t>(i);
    float* to = a.o + (t * a.Hs * a.groups + out_head) * a.V;
    if (a.wanted != nullptr && a.wanted[t] == 0) {
      std::memset(to, 0, z.V * sizeof(float));
    } else {
      StoreRow(a.scale, o + i * z.ldv, z.V, to);
    }
  }
}

// scale * do of the rows [lo, hi), zeros where no readout is wanted.
HWY_INLINE void LoadUpstream(const KernelArgs& a, const Sizes& z, const float* d_o, int64_t begin, size_t lo,
                               size_t hi, int64_t out_head, float* to) {
  const int64_t Ho = a.Hs * a.groups;
  for (size_t i = lo; i < hi; ++i) {
    const int64_t t = begin + static_cast<int64_t>(i);
    if (a.wanted != nullptr && a.wanted[t] == 0) {
      ZeroRows(to, z.ldv, i, i + 1);
    } else {
      LoadRow(a.scale, d_o + (t * Ho + out_head) * a.V, z.V, to + i * z.ldv);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::gated_delta
HWY_AFTER_NAMESPACE();

#endif  // ORYX_OPS_GATED_DELTA_DELTA_KERNELS_INL_H_
