// One query a sequence: bound by reading keys and values once. Lanes run over the width of a head.
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

// Scores of the key at `key` for every query head: score of head h to scores[h * kDecodeKeys].
template <typename T>
HWY_INLINE void ScoreKey(const DecodeShape& s, const float* HWY_RESTRICT q, const T* HWY_RESTRICT key, int64_t j,
                         float* HWY_RESTRICT scores, float* HWY_RESTRICT rotated) {
  const int64_t group = s.query_heads / s.key_heads;
  for (int64_t h = 0; h < s.query_heads; ++h) {
    const T* k = key + h / group * s.key_head_stride;
    if (s.cosine == nullptr) {
      scores[h * kDecodeKeys] = Dot(q + h * s.key, k, s.key);
      continue;
    }
    if (h % group == 0) RotateKey(k, s.cosine + j * s.half, s.sine + j * s.half, s.half, s.key, rotated);
    scores[h * kDecodeKeys] = Dot(q + h * s.key, rotated, s.key);
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
void Decode(const DecodeShape& s, const float* q, const T* k, const T* v, int64_t begin, int64_t end, float* max,
            float* sum, float* acc, float* scores) {
  const int64_t group = s.query_heads / s.key_heads;
  float* rotated = scores + s.query_heads * kDecodeKeys;
  std::fill(max, max + s.query_heads, -1e30f);
  std::fill(sum, sum + s.query_heads, 0.0f);
  std::fill(acc, acc + s.query_heads * s.value, 0.0f);
  for (int64_t j = begin; j < end; j += kDecodeKeys) {
    const int64_t keys = std::min(kDecodeKeys, end - j);
    for (int64_t t = 0; t < keys; ++t) ScoreKey(s, q, k + (j + t) * s.key_stride, j + t, scores + t, rotated);
    for (int64_t h = 0; h < s.query_heads; ++h) {
      DecodeSoftmax(keys, scores + h * kDecodeKeys, max + h, sum + h, acc + h * s.value, s.value);
    }
    for (int64_t t = 0; t < keys; ++t) {
      for (int64_t h = 0; h < s.query_heads; ++h) {
        const T* value = v + (j + t) * s.value_stride + h / group * s.value_head_stride;
        AddScaled(scores[h * kDecodeKeys + t], value, acc + h * s.value, s.value);
      }
    }
  }
}

void DecodePart(Element element, const DecodeShape& s, const float* q, const void* k, const void* v, int64_t begin,
                int64_t end, float* max, float* sum, float* acc, float* scratch) {
  const auto run = [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    Decode(s, q, static_cast<const T*>(k), static_cast<const T*>(v), begin, end, max, sum, acc, scratch);
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

int64_t decode_scratch(int64_t query_heads, int64_t key_width) { return query_heads * 32 + key_width; }

void decode_part(Element element, const DecodeShape& s, const float* q, const void* k, const void* v, int64_t begin,
                 int64_t end, float* max, float* sum, float* acc, float* scratch) {
  HWY_DYNAMIC_DISPATCH(DecodePart)(element, s, q, k, v, begin, end, max, sum, acc, scratch);
}

void decode_merge(const DecodeShape& s, int64_t parts, const float* max, const float* sum, const float* acc, float* o,
                  float* lse) {
  HWY_DYNAMIC_DISPATCH(DecodeMerge)(s, parts, max, sum, acc, o, lse);
}
}  // namespace oryx::ops::attention_cpu
#endif
