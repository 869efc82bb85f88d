// Products of decode_product.h. A block has 64 rows of weights, and a warp of its own that copies them into a ring in shared memory, 128 columns a piece, as far ahead as the ring
// is deep and before the kernel in front has ended; activations follow in a ring of their own when it has. Of the eight warps that multiply, two share a quarter of a piece's columns, 32 rows
// each; the quarters add up in shared memory at the end. Two blocks fit a multiprocessor: one can fill its ring while the other ends.
#include <cstddef>

#include "oryx/generate/cuda/decode_common.cuh"
#include "oryx/generate/cuda/decode_product.h"

namespace oryx::decode_cuda {
namespace {

constexpr int kWarpRows = 32, kBlockRows = 2 * kWarpRows, kQuarters = 4, kRowStride = kBlockRows + 4;
constexpr int kWarps = 2 * kQuarters, kConsumers = kWarps * 32, kThreads = kConsumers + 32;
constexpr int kWeightBytes = kBlockRows * 128 * 2, kStages = 4;  // of activations, which answer no sooner than weights
template <int kTiles>
constexpr int kWeightStages = kTiles == 8 ? 3 : kTiles == 4 ? 4 : 5;

template <int kTiles>
struct __align__(128) Shared {
  union {
    struct {
      uint8_t weights[kWeightStages<kTiles>][kWeightBytes];
      uint8_t x[kStages][kTiles * 2048];
    };
    float sums[kQuarters * 8 * kTiles * kRowStride];
  };
  uint64_t weights_full[kWeightStages<kTiles>], weights_empty[kWeightStages<kTiles>], x_full[kStages], x_empty[kStages];
};

__device__ __forceinline__ void wait_parity(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nL_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra L_DONE;\nbra L_WAIT;\nL_DONE:\n}\n" ::"r"(bar), "r"(parity)
      : "memory");
}
__device__ __forceinline__ uint4 lds128(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}

// A ring's place: stage and how often it came by.
template <int kCount>
struct Place {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void step() {
    if (++stage == kCount) stage = 0, phase ^= 1;
  }
};

// What a block works on: rows from `first` on, up to `rows`; steps of 32 columns [begin, end), four a piece, from a multiple of four on.
struct Work {
  int first, rows, begin, end;
  __device__ __forceinline__ int pieces() const { return (end - begin + 3) / 4; }
  __device__ __forceinline__ int steps(int piece) const { return min(4, end - begin - 4 * piece); }
};

template <int kTiles>
__device__ __forceinline__ void produce(const OryxProduct& a, Shared<kTiles>& s, const Work& w) {
  uint64_t once;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  const int runs = min(kBlockRows, w.rows - w.first) / 16;
  Place<kWeightStages<kTiles>> weights;
  Place<kStages> x;
  const auto load_weights = [&](int piece) {
    const uint32_t full = smem_address(s.weights_full + weights.stage), to = smem_address(s.weights[weights.stage]);
    const int run = w.steps(piece) * 1024;
    wait_parity(smem_address(s.weights_empty + weights.stage), weights.phase ^ 1);
    barrier_expect(full, runs * run);
    const char* from = static_cast<const char*>(a.weight) + static_cast<int64_t>(w.begin + 4 * piece) * 64 * a.rows + w.first / 16 * run;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(runs * run), "r"(full), "l"(once)
                 : "memory");
    weights.step();
  };
  const auto load_x = [&](int piece) {
    const uint32_t full = smem_address(s.x_full + x.stage);
    const int bytes = w.steps(piece) * kTiles * 512;
    wait_parity(smem_address(s.x_empty + x.stage), x.phase ^ 1);
    barrier_expect(full, bytes);
    bulk_load(smem_address(s.x[x.stage]), static_cast<const char*>(a.x) + static_cast<int64_t>(w.begin + 4 * piece) * kTiles * 512, bytes, full);
    x.step();
  };
  const int pieces = w.pieces();
  for (int i = 0; i < min(kWeightStages<kTiles>, pieces); ++i) load_weights(i);
  wait_for_previous();
  for (int i = 0; i < min(kStages, pieces); ++i) load_x(i);
  for (int i = 0; i < pieces; ++i) {
    if (i + kStages < pieces) load_x(i + kStages);
    if (i + kWeightStages<kTiles> < pieces) load_weights(i + kWeightStages<kTiles>);
  }
}

template <int kTiles, int kForm>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const __grid_constant__ OryxProduct a) {
  extern __shared__ uint8_t raw[];
  Shared<kTiles>& s = *reinterpret_cast<Shared<kTiles>*>((reinterpret_cast<uintptr_t>(raw) + 127) & ~static_cast<uintptr_t>(127));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = warp % 2, quarter = warp / 2, steps = static_cast<int>(a.K / 32);
  Work w;
  w.first = static_cast<int>(blockIdx.x) * kBlockRows, w.rows = static_cast<int>(a.rows);
  const int pieces = (steps + 3) / 4, splits = static_cast<int>(gridDim.y), split = static_cast<int>(blockIdx.y);
  w.begin = pieces * split / splits * 4, w.end = min(pieces * (split + 1) / splits * 4, steps);
  if (a.needed != nullptr && w.first + kBlockRows > a.optional) {
    bool any = false;
    for (int n = lane; n < a.N; n += 32) any |= a.needed[n] != 0;
    if (!__any_sync(~0u, any)) w.rows = static_cast<int>(a.optional);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWeightStages<kTiles>; ++i) barrier_init(smem_address(s.weights_full + i), 1), barrier_init(smem_address(s.weights_empty + i), kWarps);
    for (int i = 0; i < kStages; ++i) barrier_init(smem_address(s.x_full + i), 1), barrier_init(smem_address(s.x_empty + i), kWarps);
    barrier_init_fence();
  }
  __syncthreads();
  launch_dependents();
  if (w.first >= w.rows) {
    wait_for_previous();
    return;
  }
  if (warp == kWarps) {
    if (lane == 0) produce<kTiles>(a, s, w);
    return;
  }
  const bool works = w.first + half * kWarpRows < w.rows;
  float acc[2][kTiles][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) acc[m][j][0] = acc[m][j][1] = acc[m][j][2] = acc[m][j][3] = 0.0f;
  }
  // Shared memory by 32-bit addresses, and one stage counter each: registers are short.
  const uint32_t base = smem_address(&s);
  constexpr uint32_t kX = offsetof(Shared<kTiles>, x), kFull = offsetof(Shared<kTiles>, weights_full), kEmpty = offsetof(Shared<kTiles>, weights_empty),
                     kXFull = offsetof(Shared<kTiles>, x_full), kXEmpty = offsetof(Shared<kTiles>, x_empty);
  const uint32_t from = base + quarter * 1024 + lane * 16, columns = base + kX + quarter * kTiles * 512 + lane * 16;
  int stage = 0, phase = 0, left = w.end - w.begin;
  for (int piece = 0; left > 0; ++piece, left -= 4) {
    const int x = piece % kStages;
    wait_parity(base + kFull + 8 * stage, phase);
    wait_parity(base + kXFull + 8 * x, piece / kStages & 1);
    if (works && quarter < left) {
      const int run = min(left, 4) * 1024;  // bytes of 16 rows
      uint32_t frag[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 v = lds128(from + stage * kWeightBytes + (2 * half + i / 2) * run + i % 2 * 512);
        frag[i][0] = v.x, frag[i][1] = v.y, frag[i][2] = v.z, frag[i][3] = v.w;
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 b = lds128(columns + x * (kTiles * 2048) + j * 512);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_bf16(acc[m][j], frag[2 * m], b.x, b.y);
          mma_bf16(acc[m][j], frag[2 * m + 1], b.z, b.w);
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(base + kEmpty + 8 * stage), barrier_arrive(base + kXEmpty + 8 * x);
    if (++stage == kWeightStages<kTiles>) stage = 0, phase ^= 1;
  }
  wait_for_previous();           // a share of no pieces has not waited for anything yet
  named_barrier(1, kConsumers);  // the rings have been read: sums lie there now
  if (works) {
    float* to = s.sums + quarter * (8 * kTiles * kRowStride) + half * kWarpRows;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[(8 * j + 2 * t + i % 2) * kRowStride + 16 * m + g + 8 * (i / 2)] = acc[m][j][i];
      }
    }
  }
  named_barrier(1, kConsumers);
  const int quads = min(kBlockRows, w.rows - w.first) / 4;
  for (int i = threadIdx.x; i < 8 * kTiles * quads; i += kConsumers) {  // four rows of one sequence
    const int n = i / quads, r = i % quads * 4;
    if (n >= a.N) break;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int v = 0; v < kQuarters; ++v) {
      const float4 y = *reinterpret_cast<const float4*>(s.sums + (v * 8 * kTiles + n) * kRowStride + r);
      total.x += y.x, total.y += y.y, total.z += y.z, total.w += y.w;
    }
    if constexpr (kForm == kOryxProductRows) {
      *reinterpret_cast<uint2*>(static_cast<bf16*>(a.out) + n * a.rows + w.first + r) = make_uint2(pack(total.x, total.y), pack(total.z, total.w));
    } else if constexpr (kForm == kOryxProductParts) {
      *reinterpret_cast<float4*>(static_cast<float*>(a.out) + (blockIdx.y * a.N + n) * a.rows + w.first + r) = total;
    } else {
      *activation_pair(a.out, kTiles, n, (w.first + r) / 2) = pack(silu(total.x) * total.y, silu(total.z) * total.w);
    }
  }
}

template <int kTiles, int kForm>
int run(const OryxProduct& a, cudaStream_t stream) {
  const auto kernel = product_kernel<kTiles, kForm>;
  constexpr int bytes = static_cast<int>(sizeof(Shared<kTiles>)) + 128;
  static_assert(2 * (bytes + 1024) <= 228 * 1024);
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  return launch_after(kernel, dim3(static_cast<unsigned>((a.rows + kBlockRows - 1) / kBlockRows), a.splits), kThreads, bytes, stream, a);
}

template <int kTiles>
int by_form(const OryxProduct& a, cudaStream_t stream) {
  switch (a.form) {
    case kOryxProductRows: return run<kTiles, kOryxProductRows>(a, stream);
    case kOryxProductParts: return run<kTiles, kOryxProductParts>(a, stream);
    case kOryxProductSwiglu: return run<kTiles, kOryxProductSwiglu>(a, stream);
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
