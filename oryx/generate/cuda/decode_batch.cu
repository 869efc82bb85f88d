// Kernels of decode_batch.h: the first and the last of a batch's step, and sums behind a norm.
#include <cfloat>

#include "oryx/generate/cuda/decode_batch.h"
#include "oryx/generate/cuda/decode_common.cuh"

namespace oryx::decode_cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ void unpack8(uint4 w, float (&x)[8]) {
  x[0] = low(w.x), x[1] = high(w.x), x[2] = low(w.y), x[3] = high(w.y), x[4] = low(w.z), x[5] = high(w.z), x[6] = low(w.w), x[7] = high(w.w);
}

__device__ __forceinline__ int square_parts(int D) { return (D / 32 + 3) / 4 * 4; }

// Eight columns of x * weight, where there is one, for a product.
__device__ __forceinline__ void write_activations(void* out, int tiles, int n, int c, const float (&x)[8], const float* weight) {
  float w[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  if (weight != nullptr) {
    const float4 p = load_read_only(reinterpret_cast<const float4*>(weight + c)), q = load_read_only(reinterpret_cast<const float4*>(weight + c) + 1);
    w[0] = p.x, w[1] = p.y, w[2] = p.z, w[3] = p.w, w[4] = q.x, w[5] = q.y, w[6] = q.z, w[7] = q.w;
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2) *activation_pair(out, tiles, n, c + i) = pack(x[i] * w[i], x[i + 1] * w[i + 1]);
}

// A thread has eight columns.
__global__ void __launch_bounds__(kThreads) embed_kernel(const __grid_constant__ OryxBatchEmbed a) {
  const int64_t n = blockIdx.y;
  const int D = static_cast<int>(a.D), c = 8 * (static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x));
  launch_dependents();
  wait_for_previous();
  int token = a.tokens[n];
  if (a.places.places != nullptr && token < 0) token = n < active_of(a.places, a.N) ? max(a.likeliest[place_of(a.places, static_cast<int>(n))], 0) : 0;
  float x[8] = {}, squares = 0.0f;
  if (c < D) unpack8(__ldg(reinterpret_cast<const uint4*>(static_cast<const bf16*>(a.embed) + static_cast<int64_t>(token) * D + c)), x);
#pragma unroll
  for (int i = 0; i < 8; ++i) squares = fmaf(x[i], x[i], squares);
  squares += __shfl_xor_sync(~0u, squares, 1);
  squares += __shfl_xor_sync(~0u, squares, 2);
  if (c >= D) return;
  float4* to = reinterpret_cast<float4*>(a.x + n * D + c);
  to[0] = make_float4(x[0], x[1], x[2], x[3]), to[1] = make_float4(x[4], x[5], x[6], x[7]);
  if (c % 32 == 0) a.squares[n * square_parts(D) + c / 32] = squares;
  write_activations(a.out, a.tiles, static_cast<int>(n), c, x, a.weight);
}

constexpr int kAddNormThreads = 512;

// A block a sequence.
__global__ void __launch_bounds__(kAddNormThreads) add_norm_kernel(const __grid_constant__ OryxBatchAddNorm a) {
  __shared__ float sums[kAddNormThreads / 32];
  const int64_t n = blockIdx.x;
  const int D = static_cast<int>(a.D), t = threadIdx.x;
  launch_dependents();
  wait_for_previous();
  if (n >= active_of(a.places, a.N)) return;
  const bf16* const row = static_cast<const bf16*>(a.y) + n * D;
  float squares = 0.0f, y[8];
  for (int c = 8 * t; c < D; c += 8 * kAddNormThreads) {
    unpack8(__ldcg(reinterpret_cast<const uint4*>(row + c)), y);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(y[i], y[i], squares);
  }
  squares = warp_sum(squares);
  if (t % 32 == 0) sums[t / 32] = squares;
  __syncthreads();
  squares = 0.0f;
#pragma unroll
  for (int w = 0; w < kAddNormThreads / 32; ++w) squares += sums[w];
  const float scale = rsqrtf(squares / static_cast<float>(D) + a.eps);
  // Lanes of a warp go on together: four of them have the 32 columns of a sum.
  for (int base = 0; base < D; base += 8 * kAddNormThreads) {
    const int c = base + 8 * t;
    float x[8] = {}, sum = 0.0f;
    if (c < D) {
      unpack8(__ldcg(reinterpret_cast<const uint4*>(row + c)), y);
      float4* const to = reinterpret_cast<float4*>(a.x + n * D + c);
      const float4 lo = __ldcg(to), hi = __ldcg(to + 1);
      const float before[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = fmaf(y[i] * scale, __ldg(a.norm + c + i), before[i]), sum = fmaf(x[i], x[i], sum);
      to[0] = make_float4(x[0], x[1], x[2], x[3]), to[1] = make_float4(x[4], x[5], x[6], x[7]);
      write_activations(a.out, a.tiles, static_cast<int>(n), c, x, a.weight);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (c < D && c % 32 == 0) a.squares[n * square_parts(D) + c / 32] = sum;
  }
}

constexpr int kFinishThreads = 1024;

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ OryxBatchFinish a) {
  __shared__ float values[kFinishThreads / 32];
  __shared__ int indices[kFinishThreads / 32];
  const int n = static_cast<int>(blockIdx.x), t = threadIdx.x, lane = t % 32;
  wait_for_previous();
  if (n >= active_of(a.places, a.N)) return;
  const int below = a.below[n];
  float best = -FLT_MAX;
  int index = 0x7fffffff;
  bool bad = false;
  const auto better = [&](float y, int id) {
    if (y > best || (y == best && id < index)) best = y, index = id;
  };
  const auto look_at = [&](float y, int id) {
    bad |= !(y <= FLT_MAX);  // NaN too
    better(y, id);
  };
  const bf16* row = static_cast<const bf16*>(a.logits) + n * a.vocab;
  constexpr int kTogether = 4;  // loads of eight under way
  const int eights = a.vocab % 8 == 0 ? below / 8 : 0;
  for (int base = t; base < eights; base += kTogether * kFinishThreads) {
    uint4 w[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (base + i * kFinishThreads < eights) w[i] = __ldcg(reinterpret_cast<const uint4*>(row) + base + i * kFinishThreads);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (base + i * kFinishThreads >= eights) break;
      float x[8];
      unpack8(w[i], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) look_at(x[j], 8 * (base + i * kFinishThreads) + j);
    }
  }
  for (int i = 8 * eights + t; i < below; i += kFinishThreads) look_at(__bfloat162float(row[i]), i);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane == 0) values[t / 32] = best, indices[t / 32] = index;
  bad = __syncthreads_or(bad) != 0;
  if (t >= 32) return;
  best = values[lane], index = indices[lane];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane != 0) return;
  if (bad || index == 0x7fffffff) index = -1;
  const int position = a.positions[n];
  int32_t* const last = a.likeliest + place_of(a.places, n);
  // As the first kernel read it.
  const int token = a.places.places != nullptr && a.tokens[n] < 0 ? max(*last, 0) : a.tokens[n];
  if (a.id_rows != nullptr && position < a.capacity) a.id_rows[n * a.id_sequence + kept_row(a.places, n, position)] = token;
  *last = index;
  if (a.feed_back != nullptr && a.feed_back[0] != 0) a.tokens[n] = max(index, 0);
  a.positions[n] = position + 1;
  a.lengths[n] = position + 2;  // with the next token's own key
}

}  // namespace
}  // namespace oryx::decode_cuda

using namespace oryx::decode_cuda;

extern "C" int oryx_batch_embed(const OryxBatchEmbed* a, void* stream) {
  if (a->D % 32 != 0 || a->N > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((a->D / 8 + kThreads - 1) / kThreads), static_cast<unsigned>(a->N));
  return launch_after(embed_kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream), *a);
}

extern "C" int oryx_batch_add_norm(const OryxBatchAddNorm* a, void* stream) {
  if (a->D % 32 != 0) return cudaErrorInvalidValue;
  return launch_after(add_norm_kernel, dim3(static_cast<unsigned>(a->N)), kAddNormThreads, 0, static_cast<cudaStream_t>(stream), *a);
}

extern "C" int oryx_batch_finish(const OryxBatchFinish* a, void* stream) {
  return launch_after(finish_kernel, dim3(static_cast<unsigned>(a->N)), kFinishThreads, 0, static_cast<cudaStream_t>(stream), *a);
}
