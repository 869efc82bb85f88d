// Products of decode_product.h. A block has 32 rows of weights; its warps share out K and add up in shared memory at the end. Every weight is read once, by one lane, straight into
// the register where the tensor core wants it, three steps ahead; activations come from L1 and L2.
#include "oryx/generate/cuda/decode_common.cuh"
#include "oryx/generate/cuda/decode_product.h"

namespace oryx::decode_cuda {
namespace {

constexpr int kBlockRows = 32, kAhead = 3, kRowStride = kBlockRows + 4;

__device__ __forceinline__ uint4 stream_load(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

template <int kTiles, int kWarps, int kForm>
__global__ void __launch_bounds__(kWarps * 32, kWarps == 4 ? 3 : 1) product_kernel(const __grid_constant__ OryxProduct a) {
  extern __shared__ float sums[];  // [warps][8 kTiles][kRowStride]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = static_cast<int>(a.K / 32);
  const int64_t K16 = a.K / 16;
  const int part = blockIdx.y * kWarps + warp, parts = gridDim.y * kWarps;
  const int begin = steps * part / parts, end = steps * (part + 1) / parts;
  const uint4* w = static_cast<const uint4*>(a.weight) + (blockIdx.x * 2 * K16 + 2 * begin) * 32 + lane;
  const uint4* x = static_cast<const uint4*>(a.x) + static_cast<int64_t>(begin) * kTiles * 32 + lane;
  const int count = end - begin;
  if (a.needed != nullptr && static_cast<int64_t>(blockIdx.x) * kBlockRows >= a.optional) {
    bool any = false;
    for (int n = lane; n < a.N; n += 32) any |= a.needed[n] != 0;
    if (!__any_sync(~0u, any)) {
      launch_dependents();
      wait_for_previous();
      return;
    }
  }
  uint4 ring[kAhead][4];
  const auto fetch = [&](int step, uint4(&to)[4]) {
    if (step >= count) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = stream_load(w + ((i / 2) * K16 + 2 * step + i % 2) * 32);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch(i, ring[i]);
  launch_dependents();
  wait_for_previous();
  float acc[2][kTiles][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) acc[m][j][0] = acc[m][j][1] = acc[m][j][2] = acc[m][j][3] = 0.0f;
  }
  for (int base = 0; base < count; base += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int step = base + u;
      if (step >= count) break;
      uint4 b[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) b[j] = *(x + (step * kTiles + j) * 32);
      uint32_t frag[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) frag[i][0] = ring[u][i].x, frag[i][1] = ring[u][i].y, frag[i][2] = ring[u][i].z, frag[i][3] = ring[u][i].w;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_bf16(acc[m][j], frag[2 * m], b[j].x, b[j].y);
          mma_bf16(acc[m][j], frag[2 * m + 1], b[j].z, b[j].w);
        }
      }
      fetch(step + kAhead, ring[u]);
    }
  }
  float* own = sums + warp * (8 * kTiles * kRowStride);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) own[(8 * j + 2 * t + i % 2) * kRowStride + 16 * m + g + 8 * (i / 2)] = acc[m][j][i];
    }
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockRows;
  for (int i = threadIdx.x; i < 8 * kTiles * (kBlockRows / 4); i += kWarps * 32) {  // four rows of one sequence
    const int n = i / (kBlockRows / 4), r = i % (kBlockRows / 4) * 4;
    if (n >= a.N) break;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int v = 0; v < kWarps; ++v) {
      const float4 y = *reinterpret_cast<const float4*>(sums + (v * 8 * kTiles + n) * kRowStride + r);
      total.x += y.x, total.y += y.y, total.z += y.z, total.w += y.w;
    }
    if constexpr (kForm == kOryxProductRows) {
      *reinterpret_cast<uint2*>(static_cast<bf16*>(a.out) + n * a.rows + first + r) = make_uint2(pack(total.x, total.y), pack(total.z, total.w));
    } else if constexpr (kForm == kOryxProductParts) {
      *reinterpret_cast<float4*>(static_cast<float*>(a.out) + (blockIdx.y * a.N + n) * a.rows + first + r) = total;
    } else {
      *activation_pair(a.out, kTiles, n, static_cast<int>(first + r) / 2) = pack(silu(total.x) * total.y, silu(total.z) * total.w);
    }
  }
}

template <int kTiles, int kWarps, int kForm>
int run(const OryxProduct& a, cudaStream_t stream) {
  const auto kernel = product_kernel<kTiles, kWarps, kForm>;
  const int bytes = kWarps * 8 * kTiles * kRowStride * 4;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  return launch_after(kernel, dim3(static_cast<unsigned>(a.rows / kBlockRows), a.splits), kWarps * 32, bytes, stream, a);
}

template <int kTiles>
int by_form(const OryxProduct& a, cudaStream_t stream) {
  switch (a.form) {
    case kOryxProductRows: return run<kTiles, 4, kOryxProductRows>(a, stream);
    case kOryxProductParts: return run<kTiles, 8, kOryxProductParts>(a, stream);
    case kOryxProductSwiglu: return run<kTiles, 4, kOryxProductSwiglu>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace oryx::decode_cuda

extern "C" int64_t oryx_product_tiles(int64_t N) { return N <= 8 ? 1 : N <= 16 ? 2 : N <= 32 ? 4 : 8; }

extern "C" int oryx_product(const OryxProduct* a, void* stream) {
  using namespace oryx::decode_cuda;
  if (a->N < 1 || a->N > 64 || a->rows % 32 != 0 || a->K % 32 != 0 || a->splits < 1 || (a->splits > 1 && a->form != kOryxProductParts)) return cudaErrorInvalidValue;
  switch (oryx_product_tiles(a->N)) {
    case 1: return by_form<1>(*a, static_cast<cudaStream_t>(stream));
    case 2: return by_form<2>(*a, static_cast<cudaStream_t>(stream));
    case 4: return by_form<4>(*a, static_cast<cudaStream_t>(stream));
    default: return by_form<8>(*a, static_cast<cudaStream_t>(stream));
  }
}
