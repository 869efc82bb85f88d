// What the kernels of captured_step.h share: a token's channels and scalars of a layer.
#pragma once

#include "oryx/generate/cuda/captured_step.h"
#include "oryx/generate/cuda/decode_common.cuh"

namespace oryx::decode_cuda {

__device__ __forceinline__ float activated(float x, int on) { return on ? silu(x) : x; }

// Any number of taps: the inputs move up one by one.
__device__ inline float slide(const OryxCapturedChannels& g, bf16* tail, int64_t channel, float x) {
  const float* filter = g.filter + channel * g.taps;
  float y = filter[g.taps - 1] * x;
  for (int j = 0; j + 1 < g.taps; ++j) {
    const bf16 was = tail[j];
    y = fmaf(filter[j], __bfloat162float(was), y);
    if (j > 0) tail[j - 1] = was;
  }
  if (g.taps > 1) tail[g.taps - 2] = __float2bfloat16_rn(x);
  return y;
}

// -> the pair as bfloat16
__device__ __forceinline__ uint32_t channel_pair(const OryxCapturedPrepare& a, const OryxCapturedChannels& g, int64_t n, int64_t channel, int position) {
  const int64_t place = place_of(a.places, static_cast<int>(n));
  const uint32_t x = __ldcg(reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(a.projected) + n * a.row + g.column + channel));
  uint32_t out = x;
  if (g.filter != nullptr) {
    float y0, y1;
    if (g.taps == 4) {
      uint32_t* tail = reinterpret_cast<uint32_t*>(static_cast<bf16*>(g.tail) + 3 * (place * g.channels + channel));
      const uint32_t t0 = tail[0], t1 = tail[1], t2 = tail[2];
      const float4 f = __ldg(reinterpret_cast<const float4*>(g.filter) + channel), h = __ldg(reinterpret_cast<const float4*>(g.filter) + channel + 1);
      y0 = fmaf(f.w, low(x), fmaf(f.z, low(t1), fmaf(f.y, high(t0), f.x * low(t0))));
      y1 = fmaf(h.w, high(x), fmaf(h.z, high(t2), fmaf(h.y, low(t2), h.x * high(t1))));
      tail[0] = t0 >> 16 | t1 << 16, tail[1] = (x & 0xffffu) | t2 << 16, tail[2] = t2 >> 16 | (x & 0xffff0000u);
    } else {
      bf16* tail = static_cast<bf16*>(g.tail) + (g.taps - 1) * (place * g.channels + channel);
      y0 = slide(g, tail, channel, low(x));
      y1 = slide(g, tail + g.taps - 1, channel + 1, high(x));
    }
    if (g.bias != nullptr) y0 += __ldg(g.bias + channel), y1 += __ldg(g.bias + channel + 1);
    out = pack(activated(y0, g.silu), activated(y1, g.silu));
  }
  if (g.out != nullptr) *reinterpret_cast<uint32_t*>(static_cast<bf16*>(g.out) + n * g.channels + channel) = out;
  if (g.rows != nullptr && position < a.capacity) {
    *reinterpret_cast<uint32_t*>(static_cast<bf16*>(g.rows) + n * g.sequence + kept_row(a.places, static_cast<int>(n), position) * g.channels + channel) = out;
  }
  return out;
}

// log(1 + e^x) without overflow.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__device__ __forceinline__ float scalar(const OryxCapturedPrepare& a, const OryxCapturedScalars& g, int64_t n, int64_t h, int position) {
  float x = __ldcg(a.narrow + n * a.narrow_row + g.column + h);
  if (g.kind == kOryxCapturedWrite) x = g.strength / (1.0f + expf(-x));
  if (g.kind == kOryxCapturedDecay) x = -expf(g.A_log[h]) * softplus(x + g.dt_bias[h]);
  if (g.out != nullptr) g.out[n * g.heads + h] = x;
  if (g.rows != nullptr && position < a.capacity) g.rows[n * g.sequence + kept_row(a.places, static_cast<int>(n), position) * g.heads + h] = x;
  return x;
}

__device__ __forceinline__ void keep_mode(const OryxCapturedPrepare& a, int64_t n, int position) {
  if (a.mode_rows != nullptr && position < a.capacity) a.mode_rows[n * a.mode_sequence + kept_row(a.places, static_cast<int>(n), position)] = static_cast<int8_t>(a.modes[n]);
}

struct Two {
  float x, y;
};
__device__ __forceinline__ Two two(const void* p, int64_t at) {
  const uint32_t w = __ldcg(reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(p) + at));
  return {low(w), high(w)};
}

// The gate's factors at columns c and c + 1; without a gate 1.
__device__ __forceinline__ Two gate_at(const OryxCapturedReadout& a, int64_t n, int64_t c) {
  if (a.gate == nullptr) return {1.0f, 1.0f};
  const Two g = two(a.gate, n * a.gate_row + c);
  return a.sigmoid ? Two{sigmoid(g.x), sigmoid(g.y)} : Two{silu(g.x), silu(g.y)};
}

}  // namespace oryx::decode_cuda
