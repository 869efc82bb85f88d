// One query head a key head. A *slot* is the K / 8 lanes that work on one key head and four tokens of a piece: every slot has its own maximum, sum and output, and adds a
// partial result. It is the query that is turned, by the distance to the key: R(p) q . R(j) k = R(p - j) q . k. Angles come from a table once a piece and go on by one position
// a token.
#pragma once

#include "oryx/ops/decode_attention/cuda/decode_attention_parts.cuh"

namespace oryx::decode_attention_cuda {
namespace {

constexpr int kSingleTokens = 4, kSingleStageBytes = 16384;
template <int K>
constexpr int kLanes = K / 8;
template <int K>
constexpr int kSlots = kSingleWarps * 32 / kLanes<K>;

struct Angles {
  float c[4], s[4];
};
template <int K>
__device__ __forceinline__ Angles angles_of(const float* rope, int64_t position, int l) {
  Angles x;
  const float4 c = __ldg(reinterpret_cast<const float4*>(rope + position * K) + l), s = __ldg(reinterpret_cast<const float4*>(rope + position * K + K / 2) + l);
  x.c[0] = c.x, x.c[1] = c.y, x.c[2] = c.z, x.c[3] = c.w, x.s[0] = s.x, x.s[1] = s.y, x.s[2] = s.z, x.s[3] = s.w;
  return x;
}
template <int kSign>
__device__ __forceinline__ void turn(float (&lo)[4], float (&hi)[4], const Angles& by) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = lo[i], y = hi[i];
    lo[i] = fmaf(-kSign * y, by.s[i], x * by.c[i]), hi[i] = fmaf(kSign * x, by.s[i], y * by.c[i]);
  }
}

// Sums of the four tokens' partial scores over a slot's lanes: lane l has the sum of token 2 (l / (L / 2)) + l / (L / 4) % 2.
template <int kSlotLanes>
__device__ __forceinline__ float slot_sum(const float (&x)[4], int l) {
  constexpr int kUp = kSlotLanes / 2, kRight = kSlotLanes / 4;
  const bool up = l & kUp, right = l & kRight;
  const float s0 = __shfl_xor_sync(~0u, up ? x[0] : x[2], kUp), s1 = __shfl_xor_sync(~0u, up ? x[1] : x[3], kUp);
  const float k0 = (up ? x[2] : x[0]) + s0, k1 = (up ? x[3] : x[1]) + s1;
  float k = (right ? k1 : k0) + __shfl_xor_sync(~0u, right ? k0 : k1, kRight);
#pragma unroll
  for (int d = kRight / 2; d > 0; d /= 2) k += __shfl_xor_sync(~0u, k, d);
  return k;
}

template <int K>
__device__ void consume_single(const OryxDecodeAttention& a, Shared& s, const Layout& layout, float2* part_ml, float* part_o) {
  constexpr int L = kLanes<K>;
  const int lane = threadIdx.x & 31, l = threadIdx.x % L, slot = threadIdx.x / L;
  const int local = slot % layout.heads, side = slot / layout.heads, head = blockIdx.y * layout.heads + local;
  const int heads = min(layout.heads, static_cast<int>(a.Hk) - static_cast<int>(blockIdx.y) * layout.heads);
  const bool works = side < layout.side && local < heads;
  const bool turns = a.rope != nullptr;
  const int row_bytes = heads * K * 2, piece = layout.piece;
  const bool up = l & (L / 2), right = l & (L / 4);
  const int mine = (up ? 2 : 0) + (right ? 1 : 0);
  Angles one{};
  if (turns) one = angles_of<K>(a.rope, 1 < a.capacity ? 1 : 0, l);
  Ring<kSingleStageBytes> in(s);
  for_each_part(a, s, piece, [&](int n, Range r, int from, int to) {
    float q_lo[4] = {}, q_hi[4] = {}, acc[8] = {}, m = kLowest, sum = 0.0f;
    const int position = r.end - 1;
    if (works) {
      const bf16* q = static_cast<const bf16*>(a.q) + n * a.q_row + head * K + 4 * l;
      const uint2 x = __ldg(reinterpret_cast<const uint2*>(q)), y = __ldg(reinterpret_cast<const uint2*>(q + K / 2));
      const float scale = a.scale * kLog2e;
      q_lo[0] = low(x.x) * scale, q_lo[1] = high(x.x) * scale, q_lo[2] = low(x.y) * scale, q_lo[3] = high(x.y) * scale;
      q_hi[0] = low(y.x) * scale, q_hi[1] = high(y.x) * scale, q_hi[2] = low(y.y) * scale, q_hi[3] = high(y.y) * scale;
    }
    // The angle at this slot's first token of a piece is fetched a piece ahead.
    const auto angle_at = [&](int i) { return angles_of<K>(a.rope, position - min(r.first_of(i, piece) + side * kSingleTokens, position), l); };
    Angles next{};
    if (turns) next = angle_at(from);
    for (int i = from; i < to; ++i) {
      const int first = r.first_of(i, piece) + side * kSingleTokens, tokens = works ? min(max(r.end_of(i, piece) - first, 0), kSingleTokens) : 0;
      const Angles angle = next;
      if (turns && i + 1 < to) next = angle_at(i + 1);
      float lo[4], hi[4], score[kSingleTokens];
#pragma unroll
      for (int e = 0; e < 4; ++e) lo[e] = q_lo[e], hi[e] = q_hi[e];
      if (turns) turn<1>(lo, hi, angle);
      uint32_t at = in.wait() + (side * kSingleTokens * heads + local) * (K * 2);
#pragma unroll
      for (int t = 0; t < kSingleTokens; ++t) {
        uint2 ka = make_uint2(0, 0), kb = ka;
        if (t < tokens) ka = lds64(at + t * row_bytes + l * 8), kb = lds64(at + t * row_bytes + K + l * 8);
        const float k_lo[4] = {low(ka.x), high(ka.x), low(ka.y), high(ka.y)}, k_hi[4] = {low(kb.x), high(kb.x), low(kb.y), high(kb.y)};
        float p = k_lo[0] * lo[0];
#pragma unroll
        for (int e = 1; e < 4; ++e) p = fmaf(k_lo[e], lo[e], p);
#pragma unroll
        for (int e = 0; e < 4; ++e) p = fmaf(k_hi[e], hi[e], p);
        score[t] = p;
        if (turns && t + 1 < kSingleTokens) turn<-1>(lo, hi, one);
      }
      in.release();
      float k = slot_sum<L>(score, l);
      if (mine >= tokens) k = kLowest;
      float top = fmaxf(k, __shfl_xor_sync(~0u, k, L / 2));
      top = fmaxf(m, fmaxf(top, __shfl_xor_sync(~0u, top, L / 4)));
      const float shrink = exp2f(m - top), p = mine < tokens ? exp2f(k - top) : 0.0f;
      sum = fmaf(sum, shrink, p);
      m = top;
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[e] *= shrink;
      at = in.wait() + (side * kSingleTokens * heads + local) * (K * 2);
#pragma unroll
      for (int t = 0; t < kSingleTokens; ++t) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (t < tokens) v = lds128(at + t * row_bytes + l * 16);
        const int source = (lane & ~(L - 1)) | (t >> 1) * (L / 2) | (t & 1) * (L / 4);
        const float pt = __shfl_sync(~0u, p, source);
        acc[0] = fmaf(low(v.x), pt, acc[0]), acc[1] = fmaf(high(v.x), pt, acc[1]);
        acc[2] = fmaf(low(v.y), pt, acc[2]), acc[3] = fmaf(high(v.y), pt, acc[3]);
        acc[4] = fmaf(low(v.z), pt, acc[4]), acc[5] = fmaf(high(v.z), pt, acc[5]);
        acc[6] = fmaf(low(v.w), pt, acc[6]), acc[7] = fmaf(high(v.w), pt, acc[7]);
      }
      in.release();
    }
    float total = sum + __shfl_xor_sync(~0u, sum, L / 2);
    total += __shfl_xor_sync(~0u, total, L / 4);
    if (!works) return;
    const int64_t part = ((static_cast<int64_t>(blockIdx.x) + n) * a.Hq + head) * layout.side + side;
    if (l == 0) part_ml[part] = make_float2(m, total);
    float4* out = reinterpret_cast<float4*>(part_o + part * K + 8 * l);
    out[0] = make_float4(acc[0], acc[1], acc[2], acc[3]);
    out[1] = make_float4(acc[4], acc[5], acc[6], acc[7]);
  });
}

}  // namespace
}  // namespace oryx::decode_attention_cuda
