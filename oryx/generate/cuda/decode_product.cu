// Products of decode_product.h. A block has 32 rows of weights; its warps share out K and add up in shared memory at the end. Every weight is read once, by one lane, straight into
// the register where the tensor core wants it, three steps ahead; activations come from L1 and L2. Where rows are few two blocks, a cluster, share out K.
#include "oryx/generate/cuda/decode_common.cuh"
#include "oryx/generate/cuda/decode_product.h"

namespace oryx::decode_cuda {
namespace {

constexpr int kBlockRows = 32, kRowStride = kBlockRows + 4;

__device__ __forceinline__ uint4 stream_load(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// To shared memory of another block of the cluster.
__device__ __forceinline__ void store_there(uint32_t address, uint32_t rank, float4 x) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

// sums: [warps][8 kTiles][kRowStride]. Four rows of sequence n from row r on, added up over the warps.
template <int kTiles, int kWarps>
__device__ __forceinline__ float4 sum_of_warps(const float* sums, int n, int r) {
  float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int v = 0; v < kWarps; ++v) {
    const float4 y = *reinterpret_cast<const float4*>(sums + (v * 8 * kTiles + n) * kRowStride + r);
    total.x += y.x, total.y += y.y, total.z += y.z, total.w += y.w;
  }
  return total;
}

template <int kTiles, int kWarps, int kForm>
__global__ void __launch_bounds__(kWarps * 32, kWarps == 4 ? 3 : 1) product_kernel(const __grid_constant__ OryxProduct a) {
  // Steps that weights and activations are ahead. Where sequences are few, registers are many.
  constexpr int kAhead = kTiles == 8 ? 3 : kTiles == 4 ? 4 : 6, kNear = kTiles == 8 ? 1 : kTiles == 4 ? 2 : 3;
  constexpr bool kNext = kTiles < 8;  // else a step's own activations
  static_assert(kAhead % kNear == 0);
  constexpr int kN = 8 * kTiles, kThreads = 32 * kWarps, kItems = kBlockRows / 4;  // items: four rows of one sequence
  extern __shared__ __align__(16) float sums[];  // [warps][kN][kRowStride], then squares or what the other block sends
  float* const more = sums + kWarps * kN * kRowStride;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = static_cast<int>(a.K / 32);
  const int64_t K16 = a.K / 16;
  const int part = blockIdx.y * kWarps + warp, parts = gridDim.y * kWarps;
  const int begin = steps * part / parts, end = steps * (part + 1) / parts;
  const int narrow_blocks = kForm == kOryxProductRows ? static_cast<int>(a.narrow_rows / kBlockRows) : 0;
  const bool narrow = static_cast<int>(blockIdx.x) < narrow_blocks;
  const int block = static_cast<int>(blockIdx.x) - (narrow ? 0 : narrow_blocks);
  const uint4* w = static_cast<const uint4*>(narrow ? a.narrow_weight : a.weight) + (block * 2 * K16 + 2 * begin) * 32 + lane;
  const uint4* x = static_cast<const uint4*>(a.x) + static_cast<int64_t>(begin) * kTiles * 32 + lane;
  const int count = end - begin;
  if constexpr (kForm == kOryxProductResidual) cluster_arrive();
  if (!narrow && a.needed != nullptr && static_cast<int64_t>(block) * kBlockRows >= a.optional) {
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
  const bool normed = kForm != kOryxProductResidual && a.squares != nullptr;
  const int square_parts = (steps + 3) / 4 * 4;  // of a sequence
  if (normed) {
    for (int i = threadIdx.x; i < square_parts * kN / 4; i += kThreads) copy16(smem_address(more + 4 * i), a.squares + 4 * i, true);
  }
  const int64_t first = static_cast<int64_t>(block) * kBlockRows;
  // Form residual: the blocks of the cluster finish half of the sequences each, a thread four rows of one.
  constexpr int kHalf = kN / 2;
  const int rank = static_cast<int>(blockIdx.y), at = threadIdx.x / kItems, row4 = threadIdx.x % kItems * 4, own_n = rank * kHalf + at;
  const bool works = kForm == kOryxProductResidual && threadIdx.x < kHalf * kItems, writes = works && own_n < a.N;
  float4 before = make_float4(0, 0, 0, 0), factor = make_float4(1, 1, 1, 1);
  float* const x_out = kForm == kOryxProductResidual ? a.sum + own_n * a.rows + first + row4 : nullptr;
  if (writes) before = __ldcg(reinterpret_cast<const float4*>(x_out));
  if (writes && a.norm_weight != nullptr) factor = load_read_only(reinterpret_cast<const float4*>(a.norm_weight + first + row4));
  float acc[2][kTiles][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) acc[m][j][0] = acc[m][j][1] = acc[m][j][2] = acc[m][j][3] = 0.0f;
  }
  uint4 b[kNear][kTiles];
#pragma unroll
  for (int i = 0; i < kNear; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) b[i][j] = kNext && i < count ? x[(i * kTiles + j) * 32] : make_uint4(0, 0, 0, 0);
  }
  for (int base = 0; base < count; base += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int step = base + u;
      if (step >= count) break;
      uint32_t frag[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) frag[i][0] = ring[u][i].x, frag[i][1] = ring[u][i].y, frag[i][2] = ring[u][i].z, frag[i][3] = ring[u][i].w;
      const bool more_steps = kNext && step + kNear < count;
      if constexpr (!kNext) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) b[0][j] = x[(step * kTiles + j) * 32];
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        uint4& now = b[u % kNear][j];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_bf16(acc[m][j], frag[2 * m], now.x, now.y);
          mma_bf16(acc[m][j], frag[2 * m + 1], now.z, now.w);
        }
        if (more_steps) now = x[((step + kNear) * kTiles + j) * 32];
      }
      fetch(step + kAhead, ring[u]);
    }
  }
  float* own = sums + warp * (kN * kRowStride);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) own[(8 * j + 2 * t + i % 2) * kRowStride + 16 * m + g + 8 * (i / 2)] = acc[m][j][i];
    }
  }
  if (normed) copy_wait();
  __syncthreads();
  if constexpr (kForm == kOryxProductResidual) {
    static_assert(kHalf * kItems <= kThreads);
    float4 total = make_float4(0, 0, 0, 0);
    cluster_wait();  // the other block has begun
    if (works) store_there(smem_address(more + 4 * threadIdx.x), 1 - rank, sum_of_warps<kTiles, kWarps>(sums, (1 - rank) * kHalf + at, row4));
    cluster_arrive();
    if (works) total = sum_of_warps<kTiles, kWarps>(sums, own_n, row4);
    cluster_wait();
    const float4 other = works ? *reinterpret_cast<const float4*>(more + 4 * threadIdx.x) : total;
    // The same sum whichever of the two blocks finishes the sequence.
    total.x = (total.x + other.x) + before.x, total.y = (total.y + other.y) + before.y, total.z = (total.z + other.z) + before.z, total.w = (total.w + other.w) + before.w;
    float squares = total.x * total.x + total.y * total.y + total.z * total.z + total.w * total.w;
#pragma unroll
    for (int d = kItems / 2; d > 0; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
    if (!writes) return;
    *reinterpret_cast<float4*>(x_out) = total;
    const int column = static_cast<int>(first) + row4;
    *activation_pair(a.out, kTiles, own_n, column) = pack(total.x * factor.x, total.y * factor.y);
    *activation_pair(a.out, kTiles, own_n, column + 2) = pack(total.z * factor.z, total.w * factor.w);
    if (row4 == 0) a.sum_squares[own_n * ((a.rows / kBlockRows + 3) / 4 * 4) + block] = squares;
  } else {
    for (int i = threadIdx.x; i < kN * kItems; i += kThreads) {
      const int n = i / kItems, r = i % kItems * 4;
      float4 total = sum_of_warps<kTiles, kWarps>(sums, n, r);
      if (normed) {  // the threads of a sequence share out its sums of squares
        float squares = 0.0f;
        for (int c = r; c < square_parts; c += kBlockRows) {
          const float4 y = *reinterpret_cast<const float4*>(more + n * square_parts + c);
          squares += (y.x + y.y) + (y.z + y.w);
        }
#pragma unroll
        for (int d = kItems / 2; d > 0; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
        const float scale = rsqrtf(squares / static_cast<float>(a.K) + a.eps);
        total.x *= scale, total.y *= scale, total.z *= scale, total.w *= scale;
      }
      if (n >= a.N) continue;
      if constexpr (kForm == kOryxProductRows) {
        if (narrow) {
          const int64_t row = (first + r) / 2;
          if (row < a.narrow) a.narrow_out[n * a.narrow + row] = total.x + total.y;
          if (row + 1 < a.narrow) a.narrow_out[n * a.narrow + row + 1] = total.z + total.w;
        } else {
          *reinterpret_cast<uint2*>(static_cast<bf16*>(a.out) + n * a.rows + first + r) = make_uint2(pack(total.x, total.y), pack(total.z, total.w));
        }
      } else {
        *activation_pair(a.out, kTiles, n, static_cast<int>(first + r) / 2) = pack(silu(total.x) * total.y, silu(total.z) * total.w);
      }
    }
  }
}

template <int kTiles, int kWarps, int kForm>
int run(const OryxProduct& a, cudaStream_t stream) {
  const auto kernel = product_kernel<kTiles, kWarps, kForm>;
  const bool residual = kForm == kOryxProductResidual;
  const int bytes = (kWarps * 8 * kTiles * kRowStride + (residual ? 4 * kTiles * kBlockRows : a.squares != nullptr ? static_cast<int>((a.K / 32 + 3) / 4 * 4) * 8 * kTiles : 0)) * 4;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = 1, attributes[1].val.clusterDim.y = 2, attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((a.rows + (a.narrow_weight != nullptr ? a.narrow_rows : 0)) / kBlockRows), residual ? 2 : 1);
  config.blockDim = dim3(kWarps * 32), config.dynamicSmemBytes = static_cast<size_t>(bytes), config.stream = stream;
  config.attrs = attributes, config.numAttrs = residual ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <int kTiles>
int by_form(const OryxProduct& a, cudaStream_t stream) {
  switch (a.form) {
    case kOryxProductRows: return run<kTiles, 4, kOryxProductRows>(a, stream);
    case kOryxProductResidual: return run<kTiles, 8, kOryxProductResidual>(a, stream);
    case kOryxProductSwiglu: return run<kTiles, 4, kOryxProductSwiglu>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace oryx::decode_cuda

extern "C" int64_t oryx_product_tiles(int64_t N) { return N <= 8 ? 1 : N <= 16 ? 2 : N <= 32 ? 4 : 8; }

extern "C" int oryx_product(const OryxProduct* a, void* stream) {
  using namespace oryx::decode_cuda;
  const int64_t narrow_rows = a->narrow_weight != nullptr ? a->narrow_rows : 0;
  if (a->N < 1 || a->N > 64 || a->rows % 32 != 0 || a->K % 32 != 0 || narrow_rows % 32 != 0 || (narrow_rows > 0 && a->form != kOryxProductRows)) return cudaErrorInvalidValue;
  switch (oryx_product_tiles(a->N)) {
    case 1: return by_form<1>(*a, static_cast<cudaStream_t>(stream));
    case 2: return by_form<2>(*a, static_cast<cudaStream_t>(stream));
    case 4: return by_form<4>(*a, static_cast<cudaStream_t>(stream));
    default: return by_form<8>(*a, static_cast<cudaStream_t>(stream));
  }
}
