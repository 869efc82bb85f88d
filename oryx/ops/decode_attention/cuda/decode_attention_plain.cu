// Decode attention of any shape, float32 or bfloat16: a block for each query head of each sequence, a warp for every fourth key.
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/decode_attention/cuda/decode_attention.h"

namespace oryx::decode_attention_cuda {
namespace {

constexpr int kPlainWarps = 4, kPlainThreads = kPlainWarps * 32;
constexpr float kLog2 = 1.4426950408889634f;

// x[i] of a head, rotated (rotate-half) where i is below `rotated`.
template <typename T>
__device__ float turned(const T* x, const float* angles, int rotated, int i) {
  if (angles == nullptr || i >= rotated) return ops::cuda::to_float(x[i]);
  const int half = rotated / 2, m = i % half;
  const float c = angles[m], s = angles[half + m], a = ops::cuda::to_float(x[m]), b = ops::cuda::to_float(x[half + m]);
  return i < half ? a * c - b * s : b * c + a * s;
}

// Shared memory: q [K], and by warp: output [V], maximum, sum.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads) plain_kernel(const __grid_constant__ OryxDecodeAttention a) {
  extern __shared__ float memory[];
  const int n = blockIdx.y, h = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int K = static_cast<int>(a.K), V = static_cast<int>(a.V), rotated = static_cast<int>(a.rotated), kh = static_cast<int>(h / (a.Hq / a.Hk));
  float* q = memory;
  float* acc = memory + K + warp * V;
  float* merged = memory + K + kPlainWarps * V;  // [warps][2]
  const bool skip = a.wanted != nullptr && a.wanted[n] == 0;
  const int end = skip ? 0 : min(max(a.lengths[n], 0), static_cast<int>(a.capacity));
  const int begin = a.window > 0 && end > a.window ? end - static_cast<int>(a.window) : 0;
  T* out = static_cast<T*>(a.o) + (n * a.Hq + h) * V;
  if (end == 0) {
    for (int i = threadIdx.x; i < V; i += kPlainThreads) out[i] = ops::cuda::from_float<T>(0.0f);
    return;
  }
  const T* query = static_cast<const T*>(a.q) + n * a.q_row + h * K;
  const float* angles = a.rope != nullptr ? a.rope + static_cast<int64_t>(end - 1) * rotated : nullptr;
  for (int i = threadIdx.x; i < K; i += kPlainThreads) q[i] = turned(query, angles, rotated, i) * a.scale * kLog2;
  for (int i = lane; i < V; i += 32) acc[i] = 0.0f;
  __syncthreads();
  float m = -1e30f, sum = 0.0f;
  for (int j = begin + warp; j < end; j += kPlainWarps) {
    const int64_t row = a.blocks != nullptr ? a.blocks[n * a.most_blocks + j / a.page] : n, token = a.blocks != nullptr ? j % a.page : j;
    const T* key = static_cast<const T*>(a.keys) + row * a.key_row + token * a.key_token + kh * a.key_head;
    const T* value = static_cast<const T*>(a.values) + row * a.value_row + token * a.value_token + kh * a.value_head;
    const float* at = a.rope != nullptr ? a.rope + static_cast<int64_t>(j) * rotated : nullptr;
    float score = 0.0f;
    for (int i = lane; i < K; i += 32) score = fmaf(q[i], turned(key, at, rotated, i), score);
    score = ops::cuda::warp_sum<32>(score);
    const float top = fmaxf(m, score), shrink = exp2f(m - top), p = exp2f(score - top);
    sum = sum * shrink + p, m = top;
    for (int i = lane; i < V; i += 32) acc[i] = fmaf(p, ops::cuda::to_float(value[i]), acc[i] * shrink);
  }
  if (lane == 0) merged[2 * warp] = m, merged[2 * warp + 1] = sum;
  __syncthreads();
  float top = -1e30f, total = 0.0f;
  for (int w = 0; w < kPlainWarps; ++w) top = fmaxf(top, merged[2 * w]);
  for (int w = 0; w < kPlainWarps; ++w) total += exp2f(merged[2 * w] - top) * merged[2 * w + 1];
  for (int i = threadIdx.x; i < V; i += kPlainThreads) {
    float x = 0.0f;
    for (int w = 0; w < kPlainWarps; ++w) x += exp2f(merged[2 * w] - top) * memory[K + w * V + i];
    out[i] = ops::cuda::from_float<T>(x / total);
  }
}

}  // namespace
}  // namespace oryx::decode_attention_cuda

extern "C" int oryx_decode_attention_plain(const OryxDecodeAttention* a, int dtype, void* stream) {
  using namespace oryx::decode_attention_cuda;
  if (a->N == 0 || a->Hq == 0) return cudaSuccess;
  const int64_t bytes = 4 * (a->K + kPlainWarps * a->V + 2 * kPlainWarps);
  if (bytes > 48 * 1024 || a->N > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(a->Hq), static_cast<unsigned>(a->N));
  if (dtype == oryx::ops::cuda::kFloat32) {
    plain_kernel<float><<<grid, kPlainThreads, bytes, static_cast<cudaStream_t>(stream)>>>(*a);
  } else {
    plain_kernel<__nv_bfloat16><<<grid, kPlainThreads, bytes, static_cast<cudaStream_t>(stream)>>>(*a);
  }
  return cudaGetLastError();
}
