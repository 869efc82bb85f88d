// What the phases of the persistent decoding kernel (decode_step.cu) stand on: shared memory and workspace, the ring, the meeting of all multiprocessors, matrix-vector products.
#pragma once

#include "oryx/generate/cuda/decode_common.cuh"
#include "oryx/generate/cuda/decode_step.h"

namespace oryx::decode_cuda {
namespace {

constexpr int kWarps = 8, kConsumers = kWarps * 32, kThreads = kConsumers + 32;
constexpr int kStageBytes = 16384, kStages = 13;
constexpr int kSlices = 8, kSliceRows = kWidth / kSlices;  // a head's value rows are shared out to 8 multiprocessors
constexpr int kTokens = 4;              // cached tokens of a piece
constexpr int kRows = 4;                // weight rows of a piece, of D columns
constexpr int kMaxRows = 512;           // rows of one multiprocessor in one phase, and seven to spare
constexpr int kRedStride = kWarps + 1;
constexpr int kMaxLayers = 128, kMaxGrid = 160;

struct Workspace {  // floats behind the counters
  uint32_t* arrived;
  uint32_t* epoch;
  float *x, *proj, *o, *mid, *top;
  float2* part_ml;  // [grid, H] maximum (base 2) and sum
  float* part_o;    // [grid, H, 128]
};

__host__ __device__ inline int64_t workspace_floats(int64_t D, int64_t F) {
  const int64_t H = D / kWidth;
  return 64 + D + (4 * D + 2 * H) + D + F + 2 * kMaxGrid + 2 * kMaxGrid * H + kMaxGrid * H * kWidth;
}

template <int kD, int kF>
__device__ Workspace carve(void* memory) {
  constexpr int H = kD / kWidth;
  float* p = static_cast<float*>(memory);
  Workspace w;
  w.arrived = reinterpret_cast<uint32_t*>(p);
  w.epoch = reinterpret_cast<uint32_t*>(p) + 32;
  p += 64;
  w.x = p, p += kD;
  w.o = p, p += kD;
  w.mid = p, p += kF;
  w.proj = p, p += 4 * kD + 2 * H;
  w.top = p, p += 2 * kMaxGrid;
  w.part_ml = reinterpret_cast<float2*>(p), p += 2 * kMaxGrid * H;
  w.part_o = p;
  return w;
}

struct __align__(128) Shared {
  uint8_t ring[kStages][kStageBytes];
  float red[kMaxRows * kRedStride];
  float sums[kWarps];
  float best_value[kWarps];
  int best_index[kWarps];
  int8_t modes[kMaxLayers];
  uint64_t full[kStages], empty[kStages];
};

// ---- the ring
struct Ring {
  uint32_t base, full, empty;
  int stage = 0;
  uint32_t phase = 0;
  __device__ explicit Ring(Shared& s) : base(smem_address(s.ring)), full(smem_address(s.full)), empty(smem_address(s.empty)) {}
  __device__ __forceinline__ uint32_t slot() const { return base + stage * kStageBytes; }
  __device__ __forceinline__ void step() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ void wait_parity(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nL_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra L_DONE;\nbra L_WAIT;\nL_DONE:\n}\n" ::"r"(bar), "r"(parity)
      : "memory");
}
__device__ __forceinline__ void stream_load(uint32_t dst, const void* src, int bytes, uint32_t bar, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar),
               "l"(policy)
               : "memory");
}

struct Producer {
  Ring ring;
  uint64_t policy;
  __device__ explicit Producer(Shared& s) : ring(s) { asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)); }
  __device__ __forceinline__ void load(const void* src, int bytes) {
    wait_parity(ring.empty + 8 * ring.stage, ring.phase ^ 1);
    barrier_expect(ring.full + 8 * ring.stage, bytes);
    stream_load(ring.slot(), src, bytes, ring.full + 8 * ring.stage, policy);
    ring.step();
  }
};

struct Consumer {
  Ring ring;
  __device__ explicit Consumer(Shared& s) : ring(s) {}
  __device__ __forceinline__ uint32_t wait() const {
    wait_parity(ring.full + 8 * ring.stage, ring.phase);
    return ring.slot();
  }
  __device__ __forceinline__ void release() {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(ring.empty + 8 * ring.stage);
    ring.step();
  }
};

__device__ __forceinline__ uint4 lds128(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
__device__ __forceinline__ uint2 lds64(uint32_t a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a));
  return v;
}
__device__ __forceinline__ float4 lds_float4(uint32_t a) {
  const uint4 v = lds128(a);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
__device__ __forceinline__ float4 read4(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }

__device__ __forceinline__ float dot8(uint4 w, const float* x, float acc) {
  acc = fmaf(low(w.x), x[0], acc), acc = fmaf(high(w.x), x[1], acc);
  acc = fmaf(low(w.y), x[2], acc), acc = fmaf(high(w.y), x[3], acc);
  acc = fmaf(low(w.z), x[4], acc), acc = fmaf(high(w.z), x[5], acc);
  acc = fmaf(low(w.w), x[6], acc), acc = fmaf(high(w.w), x[7], acc);
  return acc;
}

// This multiprocessor's pieces [begin, end) of `pieces` in a phase. Shares differ by at most one; `turn` moves the larger ones on from phase to phase.
struct Share {
  int begin, end;
  __device__ Share(int pieces, int turn) {
    const int G = gridDim.x, c = (blockIdx.x + turn * 29) % G;
    begin = static_cast<int>(static_cast<int64_t>(pieces) * c / G), end = static_cast<int>(static_cast<int64_t>(pieces) * (c + 1) / G);
  }
};

// ---- all multiprocessors
struct Grid {
  uint32_t* counter;
  uint32_t target;
  // Consumers only. Everything written before is visible to reads from L2 after.
  __device__ __forceinline__ void meet() {
    target += gridDim.x;
    named_barrier(1, kConsumers);
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      uint32_t seen;
      do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (static_cast<int32_t>(seen - target) < 0);
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    named_barrier(1, kConsumers);
  }
};

// ---- matrix-vector products: sums of rows [0, rows) to red[row * kRedStride + warp]
template <int kColumns>
constexpr int kVectors = (kColumns / 8 + kConsumers - 1) / kConsumers;

// A thread's part of the sums of a piece's rows; vectors have chains of their own.
template <int kColumns, int kPieceRows>
__device__ __forceinline__ void piece_parts(Consumer& in, const float (&x)[kVectors<kColumns> * 8], float* a) {
  const int t = threadIdx.x;
  const uint32_t at = in.wait();
  uint4 w[kVectors<kColumns>][kPieceRows];
#pragma unroll
  for (int v = 0; v < kVectors<kColumns>; ++v) {
    const int vector = t + v * kConsumers;
    const bool mine = (v + 1) * kConsumers * 8 <= kColumns || vector < kColumns / 8;
#pragma unroll
    for (int r = 0; r < kPieceRows; ++r) {
      w[v][r] = make_uint4(0, 0, 0, 0);
      if (mine) w[v][r] = lds128(at + r * (kColumns * 2) + vector * 16);
    }
  }
#pragma unroll
  for (int r = 0; r < kPieceRows; ++r) {
    a[r] = dot8(w[0][r], x, 0.0f);
#pragma unroll
    for (int v = 1; v < kVectors<kColumns>; ++v) a[r] += dot8(w[v][r], x + 8 * v, 0.0f);
  }
  in.release();
}

// Eight rows at a time go through the warp together.
template <int kColumns, int kPieceRows>
__device__ __forceinline__ void product(Consumer& in, int pieces, const float (&x)[kVectors<kColumns> * 8], float* red) {
  constexpr int kTogether = 8 / kPieceRows;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int piece = 0; piece < pieces; piece += kTogether) {
    float a[8];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (piece + i < pieces) {
        piece_parts<kColumns, kPieceRows>(in, x, a + i * kPieceRows);
      } else {
#pragma unroll
        for (int r = 0; r < kPieceRows; ++r) a[i * kPieceRows + r] = 0.0f;
      }
    }
    const float sum = warp_sum8(a);
    if (lane % 4 == 0) red[(piece * kPieceRows + lane / 4) * kRedStride + warp] = sum;  // rows behind the last piece are nobody's
  }
}

__device__ __forceinline__ float row_total(const float* red, int row) {
  float s = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) s += red[row * kRedStride + w];
  return s;
}

// The thread's columns of RMSNorm(x) * weight; x is replaced.
template <int kD>
__device__ __forceinline__ void normalise(float (&x)[8], const float* weight, float eps, Shared& s) {
  const int t = threadIdx.x;
  float w[8];
  if (t < kD / 8) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(weight) + 2 * t), b = __ldg(reinterpret_cast<const float4*>(weight) + 2 * t + 1);
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(x[i], x[i], sum);
  sum = warp_sum(sum);
  if ((t & 31) == 0) s.sums[t >> 5] = sum;
  named_barrier(1, kConsumers);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += s.sums[i];
  const float scale = rsqrtf(total / kD + eps);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = t < kD / 8 ? x[i] * scale * w[i] : 0.0f;
}

template <int kD>
__device__ __forceinline__ void read_columns(const float* from, float (&x)[8]) {
  const int t = threadIdx.x;
  if (t >= kD / 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
    return;
  }
  const float4 a = read4(from + 8 * t), b = read4(from + 8 * t + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

}  // namespace
}  // namespace oryx::decode_cuda
