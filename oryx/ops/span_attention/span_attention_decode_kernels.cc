// One query a sequence, or a few: bound by reading keys and values once. Lanes run over the width of a head.
#include <cmath>
#include <type_traits>

#include "oryx/ops/span_attention/span_attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/span_attention/span_attention_decode_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "oryx/ops/span_attention/span_attention_vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::attention_cpu {
namespace HWY_NAMESPACE {

constexpr int64_t kDecodeKeys = 32;  // keys of a block; a multiple of every vector's lanes

template <typename T>
HWY_INLINE float Dot(const float* HWY_RESTRICT q, const T* HWY_RESTRICT k, int64_t width) {
  Vec a = hn::Zero(d), b = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * kN <= width; i += 2 * kN) {
    a = hn::MulAdd(hn::LoadU(d, q + i), LoadFloats(k + i), a);
    b = hn::MulAdd(hn::LoadU(d, q + i + kN), LoadFloats(k + i + kN), b);
  }
  for (; i + kN <= width; i += kN) a = hn::MulAdd(hn::LoadU(d, q + i), LoadFloats(k + i), a);
  float total = hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b)));
  for (; i < width; ++i) total += q[i] * ToFloat(k[i]);
  return total;
}

template <typename T>
HWY_INLINE void AddScaled(float p, const T* HWY_RESTRICT v, float* HWY_RESTRICT acc, int64_t width) {
  const Vec pv = hn::Set(d, p);
  int64_t i = 0;
  for (; i + kN <= width; i += kN) hn::StoreU(hn::MulAdd(pv, LoadFloats(v + i), hn::LoadU(d, acc + i)), d, acc + i);
  for (; i < width; ++i) acc[i] += p * ToFloat(v[i]);
}

// A key of `width` values rotated into `out`, its first 2 * half of them in pairs (i, i + half): rope_kernels.cc for a key that lies in a cache.
template <typename T>
HWY_INLINE void RotateKey(const T* HWY_RESTRICT k, const float* HWY_RESTRICT cosine, const float* HWY_RESTRICT sine, int64_t half,
                          int64_t width, float* HWY_RESTRICT out) {
  int64_t m = 0;
  for (; m + kN <= half; m += kN) {
    const Vec c = hn::LoadU(d, cosine + m), s = hn::LoadU(d, sine + m);
    const Vec a = LoadFloats(k + m), b = LoadFloats(k + half + m);
    hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, out + m);
    hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, out + half + m);
  }
  for (; m < half; ++m) {
    const float a = ToFloat(k[m]), b = ToFloat(k[half + m]);
    out[m] = a * cosine[m] - b * sine[m];
    out[half + m] = b * cosine[m] + a * sine[m];
  }
  for (m = 2 * half; m < width; ++m) out[m] = ToFloat(k[m]);
}

// x [width] * norm / sqrt(mean square + eps) of `heads` heads together, into `out` [heads, width].
template <typename T>
HWY_INLINE void NormKey(const T* HWY_RESTRICT k, int64_t heads, int64_t stride, int64_t width, const float* HWY_RESTRICT norm,
                        float eps, float* HWY_RESTRICT out) {
  Vec squares = hn::Zero(d);
  float rest = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const T* x = k + h * stride;
    int64_t i = 0;
    for (; i + kN <= width; i += kN) {
      const Vec v = LoadFloats(x + i);
      squares = hn::MulAdd(v, v, squares);
    }
    for (; i < width; ++i) rest += ToFloat(x[i]) * ToFloat(x[i]);
  }
  const float total = hn::GetLane(hn::SumOfLanes(d, squares)) + rest;
  const float r = 1.0f / std::sqrt(total / static_cast<float>(heads * width) + eps);
  const Vec rv = hn::Set(d, r);
  for (int64_t h = 0; h < heads; ++h) {
    const T* x = k + h * stride;
    const float* n = norm + h * width;
    float* y = out + h * width;
    int64_t i = 0;
    for (; i + kN <= width; i += kN) hn::StoreU(hn::Mul(hn::Mul(LoadFloats(x + i), rv), hn::LoadU(d, n + i)), d, y + i);
    for (; i < width; ++i) y[i] = ToFloat(x[i]) * r * n[i];
  }
}

// Scores of the key in row `row`, at `position`, for every query and head: that of query i, head h to scores[(i * query_heads + h) * kDecodeKeys].
template <typename T>
HWY_INLINE void ScoreKey(const DecodeShape& s, const DecodeQuery* HWY_RESTRICT queries, int64_t count, const T* HWY_RESTRICT row, const int32_t* position,
                         float* HWY_RESTRICT scores, float* HWY_RESTRICT rotated, float* HWY_RESTRICT normed) {
  const int64_t group = s.query_heads / s.key_heads;
  const int64_t angles = s.cosine != nullptr ? *position * s.half : 0;
  if (s.norm != nullptr && s.norm_over_heads) NormKey(row, s.key_heads, s.key_head_stride, s.key, s.norm, s.norm_eps, normed);
  for (int64_t g = 0; g < s.key_heads; ++g) {
    const T* k = row + g * s.key_head_stride;
    const float* n = normed + (s.norm_over_heads ? g * s.key : 0);
    if (s.norm != nullptr && !s.norm_over_heads) NormKey(k, 1, 0, s.key, s.norm, s.norm_eps, normed);
    const float* turned = rotated;
    if (s.cosine == nullptr) {
      turned = s.norm != nullptr ? n : nullptr;
    } else if (s.norm != nullptr) {
      RotateKey(n, s.cosine + angles, s.sine + angles, s.half, s.key, rotated);
    } else {
      RotateKey(k, s.cosine + angles, s.sine + angles, s.half, s.key, rotated);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* q = queries[i].q;
      for (int64_t h = g * group; h < (g + 1) * group; ++h)
        scores[(i * s.query_heads + h) * kDecodeKeys] = turned != nullptr ? Dot(q + h * s.key, turned, s.key) : Dot(q + h * s.key, k, s.key);
    }
  }
}

// Scores s[keys] of one head to probabilities under the running maximum; the accumulator follows it.
HWY_INLINE void DecodeSoftmax(int64_t keys, float* HWY_RESTRICT s, float* max, float* sum, float* HWY_RESTRICT acc,
                              int64_t width) {
  for (int64_t t = keys; t < kDecodeKeys; ++t)
    s[t] = -1e38f;  // not infinite: its difference with the maximum is still a number
  Vec m = hn::Set(d, *max);
  for (int64_t t = 0; t < kDecodeKeys; t += kN) m = hn::Max(m, hn::LoadU(d, s + t));
  m = hn::MaxOfLanes(d, m);
  const float shrink = hn::GetLane(Exp2(hn::Sub(hn::Set(d, *max), m)));
  Vec total = hn::Zero(d);
  for (int64_t t = 0; t < kDecodeKeys; t += kN) {
    const Vec p = Exp2(hn::Sub(hn::LoadU(d, s + t), m));
    hn::StoreU(p, d, s + t);
    total = hn::Add(total, p);
  }
  *max = hn::GetLane(m);
  *sum = *sum * shrink + hn::GetLane(hn::SumOfLanes(d, total));
  if (shrink != 1.0f) {
    for (int64_t i = 0; i < width; ++i) acc[i] *= shrink;
  }
}

template <typename T>
void Decode(const DecodeShape& s, const DecodeQuery* queries, int64_t count, const DecodeKeys& rows, float* scores) {
  const int64_t group = s.query_heads / s.key_heads, one = s.query_heads * kDecodeKeys;
  float* rotated = scores + count * one;
  float* normed = rotated + s.key;
  for (int64_t i = 0; i < count; ++i) {
    std::fill(queries[i].max, queries[i].max + s.query_heads, -1e30f);
    std::fill(queries[i].sum, queries[i].sum + s.query_heads, 0.0f);
    std::fill(queries[i].acc, queries[i].acc + s.query_heads * s.value, 0.0f);
  }
  int64_t first = 0;  // the first query that sees key j + t
  for (int64_t j = 0; j < rows.count; j += kDecodeKeys) {
    const int64_t keys = std::min(kDecodeKeys, rows.count - j), before = first;
    for (int64_t t = 0; t < keys; ++t) {
      while (queries[first].keys <= j + t) ++first;
      ScoreKey(s, queries + first, count - first, static_cast<const T*>(rows.keys[j + t]), rows.positions + j + t, scores + first * one + t, rotated, normed);
    }
    for (int64_t i = before; i < count; ++i) {
      const DecodeQuery& query = queries[i];
      const int64_t seen = std::min(keys, query.keys - j);
      if (seen <= 0) continue;
      for (int64_t h = 0; h < s.query_heads; ++h) DecodeSoftmax(seen, scores + i * one + h * kDecodeKeys, query.max + h, query.sum + h, query.acc + h * s.value, s.value);
    }
    int64_t sees = before;
    for (int64_t t = 0; t < keys; ++t) {
      while (queries[sees].keys <= j + t) ++sees;
      const T* row = static_cast<const T*>(rows.values[j + t]);
      for (int64_t i = sees; i < count; ++i) {
        for (int64_t h = 0; h < s.query_heads; ++h)
          AddScaled(scores[i * one + h * kDecodeKeys + t], row + h / group * s.value_head_stride, queries[i].acc + h * s.value, s.value);
      }
    }
  }
}

void DecodePart(Element element, const DecodeShape& s, const DecodeQuery* queries, int64_t count, const DecodeKeys& keys, float* scratch) {
  const auto run = [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    Decode<T>(s, queries, count, keys, scratch);
  };
  element == Element::kFloat32 ? run(static_cast<float*>(nullptr)) : run(static_cast<hwy::bfloat16_t*>(nullptr));
}

void DecodeMerge(const DecodeShape& s, int64_t parts, const float* max, const float* sum, const float* acc, float* o,
                 float* lse) {
  for (int64_t h = 0; h < s.query_heads; ++h) {
    float m = max[h];
    for (int64_t p = 1; p < parts; ++p) m = std::max(m, max[p * s.query_heads + h]);
    float* out = o + h * s.value;
    std::fill(out, out + s.value, 0.0f);
    float total = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t row = p * s.query_heads + h;
      const float weight = std::exp2(max[row] - m);
      total += weight * sum[row];
      AddScaled(weight, acc + row * s.value, out, s.value);
    }
    for (int64_t i = 0; i < s.value; ++i) out[i] /= total;
    if (lse != nullptr) lse[h] = m + std::log2(total);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops::attention_cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::attention_cpu {
HWY_EXPORT(DecodePart);
HWY_EXPORT(DecodeMerge);

int64_t decode_scratch(const DecodeShape& s, int64_t queries) { return queries * s.query_heads * 32 + s.key + s.key * (s.norm_over_heads ? s.key_heads : 1); }

void decode_part(Element element, const DecodeShape& s, const DecodeQuery* queries, int64_t count, const DecodeKeys& keys, float* scratch) {
  HWY_DYNAMIC_DISPATCH(DecodePart)(element, s, queries, count, keys, scratch);
}

void decode_merge(const DecodeShape& s, int64_t parts, const float* max, const float* sum, const float* acc, float* o,
                  float* lse) {
  HWY_DYNAMIC_DISPATCH(DecodeMerge)(s, parts, max, sum, acc, o, lse);
}
}  // namespace oryx::ops::attention_cpu
#endif
