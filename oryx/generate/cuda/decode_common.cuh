// What the fused decoding kernels share: the convolutions' tails, gates, reductions.
#pragma once

#include "oryx/generate/cuda/decode_batch.h"
#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/cuda/fragments.cuh"
#include "oryx/ops/cuda/hopper.cuh"

namespace oryx::decode_cuda {

using namespace oryx::hopper;
using namespace oryx::ops::cuda;
using bf16 = __nv_bfloat16;

constexpr int kWidth = 128;  // K and V
constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}
__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }
__device__ __forceinline__ float round_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// Sums over a warp of eight values a lane, in 9 exchanges: lane i has the sum of value i / 4.
__device__ __forceinline__ float warp_sum8(const float (&x)[8]) {
  const int lane = threadIdx.x & 31;
  float a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = (lane & 16 ? x[i + 4] : x[i]) + __shfl_xor_sync(~0u, lane & 16 ? x[i] : x[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = (lane & 8 ? a[i + 2] : a[i]) + __shfl_xor_sync(~0u, lane & 8 ? a[i] : a[i + 2], 8);
  float c = (lane & 4 ? b[1] : b[0]) + __shfl_xor_sync(~0u, lane & 4 ? b[0] : b[1], 4);
  c += __shfl_xor_sync(~0u, c, 2);
  return c + __shfl_xor_sync(~0u, c, 1);
}

// Where the compiler may not make the load ahead of a test that does not pass.
__device__ __forceinline__ float4 load_read_only(const float4* p) {
  float4 x;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p));
  return x;
}

// Rows that count; the place of row n; the row of what is kept where token `position` of row n is, behind n * `sequence` elements.
__device__ __forceinline__ int active_of(const OryxBatchPlaces& p, int64_t N) { return p.active == nullptr ? static_cast<int>(N) : min(__ldg(p.active), static_cast<int>(N)); }
__device__ __forceinline__ int place_of(const OryxBatchPlaces& p, int n) { return p.places == nullptr ? n : __ldg(p.places + n); }
__device__ __forceinline__ int64_t kept_row(const OryxBatchPlaces& p, int n, int position) {
  if (p.blocks == nullptr) return position;
  const int page = static_cast<int>(p.page), lasting = static_cast<int>(p.lasting), i = position / page;
  const int entry = lasting == 0 || i < lasting ? i : lasting + (i - lasting) % (static_cast<int>(p.most_blocks) - lasting);
  return __ldg(p.blocks + n * p.most_blocks + entry) * p.page + position % page;
}

// Inputs of the convolutions of four channels: three a channel, oldest first.
struct Tail4 {
  uint2 raw[3];
  __device__ __forceinline__ float at(int channel, int j) const {
    const int i = 3 * channel + j;
    const uint2 two = raw[i / 4];
    const uint32_t word = (i % 4) / 2 ? two.y : two.x;
    return i % 2 ? high(word) : low(word);
  }
  __device__ __forceinline__ void load(const void* tails, int64_t channel) {
    const uint2* from = reinterpret_cast<const uint2*>(static_cast<const bf16*>(tails) + 3 * channel);
#pragma unroll
    for (int i = 0; i < 3; ++i) raw[i] = __ldcg(from + i);
  }
  __device__ __forceinline__ void store(void* tails, int64_t channel) const {
    uint2* to = reinterpret_cast<uint2*>(static_cast<bf16*>(tails) + 3 * channel);
#pragma unroll
    for (int i = 0; i < 3; ++i) to[i] = raw[i];
  }
  // The oldest input of each channel gives way to x.
  __device__ __forceinline__ Tail4 shifted(const float (&x)[4]) const {
    uint32_t words[6];
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      const auto item = [&](int n) { return n % 3 < 2 ? at(n / 3, n % 3 + 1) : x[n / 3]; };
      words[i] = pack(item(2 * i), item(2 * i + 1));
    }
    Tail4 t;
#pragma unroll
    for (int i = 0; i < 3; ++i) t.raw[i] = make_uint2(words[2 * i], words[2 * i + 1]);
    return t;
  }
};

// SiLU of the convolution at x, rounded as the cache keeps it. filter: oldest tap first.
__device__ __forceinline__ float convolved(float4 filter, float t0, float t1, float t2, float x) {
  return round_bf16(silu(fmaf(filter.w, x, fmaf(filter.z, t2, fmaf(filter.y, t1, filter.x * t0)))));
}

// The log decay of the gated delta rule.
__device__ __forceinline__ float log_decay(float A_log, float pre) { return -__expf(A_log) * (pre > 20.0f ? pre + __expf(-pre) : log1pf(__expf(pre))); }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

}  // namespace oryx::decode_cuda
