#include "oryx/ops/span_attention/span_attention_kernels.h"

#include <cmath>
#include <limits>

// Scalable vectors cannot stand in arrays of accumulators; Arm machines take the NEON target.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/span_attention/span_attention_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "oryx/ops/span_attention/span_attention_vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::attention_cpu {
namespace HWY_NAMESPACE {

constexpr int64_t kKeys = 64;  // keys of a block that every query of it sees
constexpr int64_t kEdgeKeys =
    16;  // keys of a block at the causal edge (or a window's): masked, and fewer queries take part
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLowest = -1e30f;  // running maximum before the first key; finite, so that differences are never NaN

// The visible ranges of a tile's lanes; unused lanes repeat the last one.
struct Ranges {
  alignas(64) int32_t begin[kLanes], end[kLanes];
  int64_t vectors;

  int64_t first_begin(int64_t c) const { return begin[c * kN]; }
  int64_t last_begin(int64_t c) const { return begin[c * kN + kN - 1]; }
  int64_t first_end(int64_t c) const { return end[c * kN]; }
  int64_t last_end(int64_t c) const { return end[c * kN + kN - 1]; }
};

void FillRanges(const Lane* lanes, int64_t n, Ranges& r) {
  r.vectors = RoundUp(n) / kN;
  for (int64_t l = 0; l < r.vectors * kN; ++l) {
    r.begin[l] = static_cast<int32_t>(lanes[std::min(l, n - 1)].begin);
    r.end[l] = static_cast<int32_t>(lanes[std::min(l, n - 1)].end);
  }
}

// Calls block(j, keys, c0, c1, masked) for runs of keys [j, j + keys) that vectors [c0, c1) of the tile see at least in
// part; together they cover all that is visible, keys rising.
template <typename Block>
HWY_INLINE void ForEachBlock(const Ranges& r, const Block& block) {
  int64_t c0 = 0, j = r.first_begin(0);
  const int64_t last = r.last_end(r.vectors - 1);
  while (j < last) {
    while (r.last_end(c0) <= j) ++c0;
    j = std::max(j, r.first_begin(c0));
    int64_t c1 = c0 + 1, keys = std::min(kKeys, r.first_end(c0) - j);
    while (c1 < r.vectors && r.first_begin(c1) <= j) ++c1;
    if (c1 < r.vectors) keys = std::min(keys, r.first_begin(c1) - j);
    const bool masked = keys < kEdgeKeys || r.last_begin(c1 - 1) > j;
    if (masked) {
      keys = std::min(kEdgeKeys, last - j);
      while (c1 < r.vectors && r.first_begin(c1) < j + keys) ++c1;
    }
    block(j, keys, c0, c1, masked);
    j += keys;
  }
}

// True where lanes of vector c see key j.
HWY_INLINE hn::Mask<D> Seen(const Ranges& r, int64_t c, int64_t j) {
  const hn::RebindToSigned<D> di;
  const auto key = hn::Set(di, static_cast<int32_t>(j));
  const auto inside = hn::AndNot(hn::VecFromMask(di, hn::Gt(hn::Load(di, r.begin + c * kN), key)),
                                 hn::VecFromMask(di, hn::Gt(hn::Load(di, r.end + c * kN), key)));
  return hn::MaskFromVec(hn::BitCast(d, inside));
}

// s [keys][kLanes], vectors c .. c + C: scores to probabilities under the running maximum, whose change is `shrink`.
template <int C, bool kMasked>
HWY_INLINE void SoftmaxVectors(const Ranges& r, int64_t j, int64_t keys, int64_t c, float* HWY_RESTRICT s,
                               float* HWY_RESTRICT max, float* HWY_RESTRICT sum, float* HWY_RESTRICT shrink) {
  Vec m[C], total[C];
#pragma GCC unroll 4
  for (int i = 0; i < C; ++i) m[i] = hn::Load(d, max + (c + i) * kN);
  for (int64_t t = 0; t < keys; ++t) {
    float* row = s + t * kLanes + c * kN;
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      Vec x = hn::Load(d, row + i * kN);
      if (kMasked) {
        x = hn::IfThenElse(Seen(r, c + i, j + t), x, hn::Set(d, -std::numeric_limits<float>::infinity()));
        hn::Store(x, d, row + i * kN);
      }
      m[i] = hn::Max(m[i], x);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < C; ++i) {
    const Vec factor = Exp2(hn::Sub(hn::Load(d, max + (c + i) * kN), m[i]));
    hn::Store(factor, d, shrink + (c + i) * kN);
    hn::Store(m[i], d, max + (c + i) * kN);
    total[i] = hn::Mul(factor, hn::Load(d, sum + (c + i) * kN));
  }
  for (int64_t t = 0; t < keys; ++t) {
    float* row = s + t * kLanes + c * kN;
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      const Vec p = Exp2(hn::Sub(hn::Load(d, row + i * kN), m[i]));
      hn::Store(p, d, row + i * kN);
      total[i] = hn::Add(total[i], p);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < C; ++i) hn::Store(total[i], d, sum + (c + i) * kN);
}

template <bool kMasked>
HWY_INLINE void SoftmaxBlock(const Ranges& r, int64_t j, int64_t keys, int64_t c0, int64_t c1, float* s, float* max,
                             float* sum, float* shrink) {
  int64_t c = c0;
  for (; c + 4 <= c1; c += 4) SoftmaxVectors<4, kMasked>(r, j, keys, c, s, max, sum, shrink);
  for (; c < c1; ++c) SoftmaxVectors<1, kMasked>(r, j, keys, c, s, max, sum, shrink);
}

// o[v][lanes of c0 .. c1) *= shrink, unless no maximum moved.
HWY_INLINE void Rescale(int64_t width, int64_t c0, int64_t c1, const float* shrink, float* HWY_RESTRICT o) {
  const Vec one = hn::Set(d, 1.0f);
  for (int64_t c = c0; c < c1; ++c) {
    const Vec f = hn::Load(d, shrink + c * kN);
    if (hn::AllTrue(d, hn::Eq(f, one))) continue;
    for (int64_t v = 0; v < width; ++v) {
      float* p = o + v * kLanes + c * kN;
      hn::Store(hn::Mul(f, hn::Load(d, p)), d, p);
    }
  }
}

// Rows of a block of keys (or values) as float32: the caller's own memory, or a copy where it is of another type.
HWY_INLINE const float* BlockRows(const float* base, int64_t stride, int64_t, int64_t, float*, int64_t* row_stride) {
  *row_stride = stride;
  return base;
}
HWY_INLINE const float* BlockRows(const hwy::bfloat16_t* base, int64_t stride, int64_t rows, int64_t width, float* copy,
                                  int64_t* row_stride) {
  *row_stride = RoundUp(width);
  for (int64_t r = 0; r < rows; ++r) CopyRow(base + r * stride, width, 1.0f, copy + r * *row_stride);
  return copy;
}

// Rows of x [rows, width] named by the lanes, times factor, into packed [kLanes][RoundUp(width)]; unused lanes are
// zero.
template <typename T>
HWY_INLINE void GatherRows(const Lane* lanes, int64_t n, int64_t vectors, const T* x, int64_t width, float factor,
                           float* packed) {
  const int64_t w = RoundUp(width);
  for (int64_t l = 0; l < n; ++l) CopyRow(x + lanes[l].row * width, width, factor, packed + l * w);
  std::fill(packed + n * w, packed + vectors * kN * w, 0.0f);
}

struct Scratch {
  float* next;
  float* take(int64_t n) {
    float* p = next;
    next += (n + 15) / 16 * 16;
    return p;
  }
};

template <typename T>
void Forward(const Widths& w, const Lane* lanes, int64_t n, const T* q, const T* k, const T* v, T* o, float* lse,
             float* memory) {
  Scratch scratch{memory};
  const int64_t kp = RoundUp(w.key), vp = RoundUp(w.value);
  float* rows = scratch.take(kLanes * std::max(kp, vp));
  float* qt = scratch.take(kp * kLanes);
  float* ot = scratch.take(vp * kLanes);
  float* s = scratch.take(kKeys * kLanes);
  float* copy = scratch.take(kKeys * std::max(kp, vp));
  float* max = scratch.take(kLanes);
  float* sum = scratch.take(kLanes);
  float* shrink = scratch.take(kLanes);
  Ranges ranges;
  FillRanges(lanes, n, ranges);
  const int64_t used = ranges.vectors * kN;
  GatherRows(lanes, n, ranges.vectors, q, w.key, w.scale * kLog2e, rows);
  Transpose(rows, kp, used, kp, qt, kLanes);
  std::fill(ot, ot + vp * kLanes, 0.0f);
  std::fill(max, max + kLanes, kLowest);
  std::fill(sum, sum + kLanes, 0.0f);

  ForEachBlock(ranges, [&](int64_t j, int64_t keys, int64_t c0, int64_t c1, bool masked) HWY_ATTR {
    const int64_t at = c0 * kN;
    int64_t stride;
    const float* kb = BlockRows(k + j * w.key_stride, w.key_stride, keys, w.key, copy, &stride);
    Product<false>(keys, c1 - c0, w.key, kb, stride, 1, qt + at, kLanes, s + at, kLanes);
    if (masked) {
      SoftmaxBlock<true>(ranges, j, keys, c0, c1, s, max, sum, shrink);
    } else {
      SoftmaxBlock<false>(ranges, j, keys, c0, c1, s, max, sum, shrink);
    }
    Rescale(w.value, c0, c1, shrink, ot);
    const float* vb = BlockRows(v + j * w.value_stride, w.value_stride, keys, w.value, copy, &stride);
    Product<true>(w.value, c1 - c0, keys, vb, 1, stride, s + at, kLanes, ot + at, kLanes);
  });

  Transpose(ot, kLanes, vp, used, rows, vp);
  for (int64_t l = 0; l < n; ++l) {
    const float inverse = 1.0f / sum[l];
    T* out = o + lanes[l].row * w.value;
    for (int64_t c = 0; c < w.value; ++c) FromFloat(rows[l * vp + c] * inverse, out + c);
    if (lse != nullptr) lse[lanes[l].row] = max[l] + std::log2(sum[l]);
  }
}

// s: scores to probabilities p = 2^(s - lse); dp: to p (dp - delta). Hidden keys give zero whatever their values are.
template <bool kMasked>
HWY_INLINE void ScoreGradients(const Ranges& r, int64_t j, int64_t keys, int64_t c0, int64_t c1, const float* lse,
                               const float* delta, float* HWY_RESTRICT s, float* HWY_RESTRICT dp) {
  for (int64_t t = 0; t < keys; ++t) {
    for (int64_t c = c0; c < c1; ++c) {
      float* sp = s + t * kLanes + c * kN;
      float* dpp = dp + t * kLanes + c * kN;
      Vec p = Exp2(hn::Sub(hn::Load(d, sp), hn::Load(d, lse + c * kN)));
      Vec ds = hn::Mul(p, hn::Sub(hn::Load(d, dpp), hn::Load(d, delta + c * kN)));
      if (kMasked) {
        const auto seen = Seen(r, c, j + t);
        p = hn::IfThenElseZero(seen, p);
        ds = hn::IfThenElseZero(seen, ds);
      }
      hn::Store(p, d, sp);
      hn::Store(ds, d, dpp);
    }
  }
}

// delta[lane] = sum_v o do, in the order in which Product sums dp = v do: where a query sees one key, o = v, and its
// score's gradient p (dp - delta) is exactly zero.
HWY_INLINE void RowDots(int64_t vectors, int64_t width, const float* HWY_RESTRICT ot, const float* HWY_RESTRICT dot,
                        float* HWY_RESTRICT delta) {
  for (int64_t c = 0; c < vectors; ++c) {
    Vec acc = hn::Zero(d);
    for (int64_t v = 0; v < width; ++v) {
      acc = hn::MulAdd(hn::Load(d, ot + v * kLanes + c * kN), hn::Load(d, dot + v * kLanes + c * kN), acc);
    }
    hn::Store(acc, d, delta + c * kN);
  }
}

template <typename T>
void Backward(const Widths& w, const Lane* lanes, int64_t n, const T* q, const T* k, const T* v, const T* o,
              const T* d_o, const float* lse_rows, float* dq, float* dk, float* dv, float* memory) {
  Scratch scratch{memory};
  const int64_t kp = RoundUp(w.key), vp = RoundUp(w.value);
  float* qr = scratch.take(kLanes * kp);
  float* qt = scratch.take(kp * kLanes);
  float* dor = scratch.take(kLanes * vp);
  float* dot = scratch.take(vp * kLanes);
  float* dqt = scratch.take(kp * kLanes);
  float* rows = scratch.take(kLanes * vp);
  float* ot = scratch.take(vp * kLanes);
  float* s = scratch.take(kKeys * kLanes);
  float* dp = scratch.take(kKeys * kLanes);
  float* k_copy = scratch.take(kKeys * kp);
  float* v_copy = scratch.take(kKeys * vp);
  float* lse = scratch.take(kLanes);
  float* delta = scratch.take(kLanes);
  Ranges ranges;
  FillRanges(lanes, n, ranges);
  const int64_t used = ranges.vectors * kN;
  GatherRows(lanes, n, ranges.vectors, q, w.key, w.scale * kLog2e, qr);
  Transpose(qr, kp, used, kp, qt, kLanes);
  GatherRows(lanes, n, ranges.vectors, d_o, w.value, 1.0f, dor);
  Transpose(dor, vp, used, vp, dot, kLanes);
  std::fill(dqt, dqt + kp * kLanes, 0.0f);
  GatherRows(lanes, n, ranges.vectors, o, w.value, 1.0f, rows);
  Transpose(rows, vp, used, vp, ot, kLanes);
  RowDots(ranges.vectors, w.value, ot, dot, delta);
  for (int64_t l = 0; l < used; ++l) lse[l] = l < n ? lse_rows[lanes[l].row] : std::numeric_limits<float>::infinity();

  ForEachBlock(ranges, [&](int64_t j, int64_t keys, int64_t c0, int64_t c1, bool masked) HWY_ATTR {
    const int64_t at = c0 * kN, lanes_used = (c1 - c0) * kN;
    int64_t k_stride, v_stride;
    const float* kb = BlockRows(k + j * w.key_stride, w.key_stride, keys, w.key, k_copy, &k_stride);
    const float* vb = BlockRows(v + j * w.value_stride, w.value_stride, keys, w.value, v_copy, &v_stride);
    Product<false>(keys, c1 - c0, w.key, kb, k_stride, 1, qt + at, kLanes, s + at, kLanes);
    Product<false>(keys, c1 - c0, w.value, vb, v_stride, 1, dot + at, kLanes, dp + at, kLanes);
    if (masked) {
      ScoreGradients<true>(ranges, j, keys, c0, c1, lse, delta, s, dp);
    } else {
      ScoreGradients<false>(ranges, j, keys, c0, c1, lse, delta, s, dp);
    }
    Product<true>(keys, vp / kN, lanes_used, s + at, kLanes, 1, dor + at * vp, vp, dv + j * vp, vp);
    Product<true>(keys, kp / kN, lanes_used, dp + at, kLanes, 1, qr + at * kp, kp, dk + j * kp, kp);
    Product<true>(w.key, c1 - c0, keys, kb, 1, k_stride, dp + at, kLanes, dqt + at, kLanes);
  });

  Transpose(dqt, kLanes, kp, used, qr, kp);
  for (int64_t l = 0; l < n; ++l) {
    float* out = dq + lanes[l].row * w.key;
    for (int64_t c = 0; c < w.key; ++c) out[c] = qr[l * kp + c] * w.scale;
  }
}

void ForwardTile(Element element, const Widths& w, const Lane* lanes, int64_t n, const void* q, const void* k,
                 const void* v, void* o, float* lse, float* scratch) {
  const auto run = [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    Forward(w, lanes, n, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
            static_cast<T*>(o), lse, scratch);
  };
  element == Element::kFloat32 ? run(static_cast<float*>(nullptr)) : run(static_cast<hwy::bfloat16_t*>(nullptr));
}

void BackwardTile(Element element, const Widths& w, const Lane* lanes, int64_t n, const void* q, const void* k,
                  const void* v, const void* o, const void* d_o, const float* lse, float* dq, float* dk, float* dv,
                  float* scratch) {
  const auto run = [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    Backward(w, lanes, n, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
             static_cast<const T*>(o), static_cast<const T*>(d_o), lse, dq, dk, dv, scratch);
  };
  element == Element::kFloat32 ? run(static_cast<float*>(nullptr)) : run(static_cast<hwy::bfloat16_t*>(nullptr));
}

int64_t MaxLanes() { return kLanes; }
int64_t Padded(int64_t width) { return RoundUp(width); }
int64_t ForwardScratch(int64_t key, int64_t value) {
  const int64_t kp = RoundUp(key), vp = RoundUp(value);
  return kLanes * (2 * std::max(kp, vp) + kp + vp + kKeys + 3) + kKeys * std::max(kp, vp) + 128;
}
int64_t BackwardScratch(int64_t key, int64_t value) {
  const int64_t kp = RoundUp(key), vp = RoundUp(value);
  return kLanes * (3 * kp + 4 * vp + 2 * kKeys + 2) + kKeys * (kp + vp) + 256;
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::attention_cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::attention_cpu {
HWY_EXPORT(ForwardTile);
HWY_EXPORT(BackwardTile);
HWY_EXPORT(MaxLanes);
HWY_EXPORT(Padded);
HWY_EXPORT(ForwardScratch);
HWY_EXPORT(BackwardScratch);

int64_t max_lanes() { return HWY_DYNAMIC_DISPATCH(MaxLanes)(); }
int64_t padded(int64_t width) { return HWY_DYNAMIC_DISPATCH(Padded)(width); }
int64_t forward_scratch(int64_t key, int64_t value) { return HWY_DYNAMIC_DISPATCH(ForwardScratch)(key, value); }
int64_t backward_scratch(int64_t key, int64_t value) { return HWY_DYNAMIC_DISPATCH(BackwardScratch)(key, value); }

void forward_tile(Element element, const Widths& w, const Lane* lanes, int64_t n, const void* q, const void* k,
                  const void* v, void* o, float* lse, float* scratch) {
  HWY_DYNAMIC_DISPATCH(ForwardTile)(element, w, lanes, n, q, k, v, o, lse, scratch);
}

void backward_tile(Element element, const Widths& w, const Lane* lanes, int64_t n, const void* q, const void* k,
                   const void* v, const void* o, const void* d_o, const float* lse, float* dq, float* dk, float* dv,
                   float* scratch) {
  HWY_DYNAMIC_DISPATCH(BackwardTile)(element, w, lanes, n, q, k, v, o, d_o, lse, dq, dk, dv, scratch);
}
}  // namespace oryx::ops::attention_cpu
#endif
