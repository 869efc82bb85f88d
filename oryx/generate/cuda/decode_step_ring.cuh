// What the phases of the persistent decoding kernel (decode_step.cu) stand on: its shared memory and workspace, words between multiprocessors, the ring, matrix-vector products.
#pragma once

#include "oryx/generate/cuda/decode_common.cuh"
#include "oryx/generate/cuda/decode_step.h"

namespace oryx::decode_cuda {
namespace {

constexpr int kWarps = 12, kConsumers = kWarps * 32, kThreads = kConsumers + 32;
constexpr int kMixWarps = 8;            // that work on a head's state and on cached tokens
constexpr int kSlotBytes = 4096, kSlots = 51;
constexpr int kSlices = 8, kSliceRows = kWidth / kSlices;  // a head's value rows are shared out to 8 multiprocessors
constexpr int kTokens = 4;              // cached tokens of a piece
constexpr int kParts = 3;               // of a row in phase 5
constexpr int kMaxLayers = 127, kMaxGrid = 160;

struct Workspace {
  uint32_t* launch;  // steps so far, times 128
  uint2 *x, *xa, *proj, *o, *mid;  // words; mid's hold two bfloat16 values
  uint4* top;        // [grid] likeliest of a multiprocessor's logits: value and index
  uint4* part_ml;    // [grid, H] maximum (base 2) and sum
  uint2* part_o;     // [grid, H, 128]
};

__host__ __device__ inline int64_t workspace_bytes(int64_t D, int64_t F) {
  const int64_t H = D / kWidth;
  return 256 + 8 * (D + D + (4 * D + 2 * H) + D + F / 2) + 16 * (kMaxGrid + kMaxGrid * H) + 8 * kMaxGrid * H * kWidth;
}

template <int kD, int kF>
__device__ Workspace carve(void* memory) {
  constexpr int H = kD / kWidth;
  Workspace w;
  w.launch = static_cast<uint32_t*>(memory);
  uint2* p = reinterpret_cast<uint2*>(static_cast<char*>(memory) + 256);
  w.x = p, p += kD;
  w.xa = p, p += kD;
  w.proj = p, p += 4 * kD + 2 * H;
  w.o = p, p += kD;
  w.mid = p, p += kF / 2;
  w.part_o = p, p += kMaxGrid * H * kWidth;
  w.part_ml = reinterpret_cast<uint4*>(p);
  w.top = w.part_ml + kMaxGrid * H;
  return w;
}

template <int kD, int kF>
struct __align__(128) Shared {
  uint8_t ring[kSlots][kSlotBytes];
  float4 narrow[2][kD / 8];            // the vector of phases 1 and 4: first and second four of every eight columns
  union {
    float4 narrow[2][kD / 8];          // of phase 3
    uint4 wide[kF / 8];                // of phase 5, bfloat16
  } other;
  float sums[2][8];
  float red[kWarps / kParts][8][kParts];  // phase 5: trio, its row, part
  float best_value[kWarps];
  int best_index[kWarps];
  int8_t modes[kMaxLayers + 1];
  uint64_t full[kSlots], empty[kSlots];
};

// ---- words between multiprocessors
__device__ __forceinline__ void put(uint2* to, float value, uint32_t flag) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(__float_as_uint(value)), "r"(flag) : "memory");
}
__device__ __forceinline__ void put(uint2* to, uint32_t value, uint32_t flag) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(value), "r"(flag) : "memory");
}
__device__ __forceinline__ void put2(void* to, uint32_t a, uint32_t b, uint32_t flag) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(to), "r"(a), "r"(flag), "r"(b) : "memory");
}
__device__ __forceinline__ uint4 look2(const void* at) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}
__device__ __forceinline__ uint2 look(const void* at) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
  return v;
}
// N pairs of words, `stride` words from pair to pair, all under way at once; value i to x[i].
template <int N>
__device__ __forceinline__ void await(const uint2* from, int stride, uint32_t flag, uint32_t (&x)[2 * N]) {
  bool missing;
  do {
    uint4 v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = look2(from + i * stride);
    missing = false;
#pragma unroll
    for (int i = 0; i < N; ++i) missing |= v[i].y != flag || v[i].w != flag, x[2 * i] = v[i].x, x[2 * i + 1] = v[i].z;
  } while (missing);
}
template <int N>
__device__ __forceinline__ void await(const uint2* from, int stride, uint32_t flag, float (&x)[2 * N]) {
  uint32_t bits[2 * N];
  await<N>(from, stride, flag, bits);
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) x[i] = __uint_as_float(bits[i]);
}
__device__ __forceinline__ float await(const uint2* from, uint32_t flag) {
  uint2 v;
  do {
    v = look(from);
  } while (v.y != flag);
  return __uint_as_float(v.x);
}

// ---- the ring
__device__ __forceinline__ void wait_parity(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nL_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra L_DONE;\nbra L_WAIT;\nL_DONE:\n}\n" ::"r"(bar), "r"(parity)
      : "memory");
}

struct Producer {
  uint32_t base, full, empty;
  uint64_t policy;
  int slot = 0;
  uint32_t phase = 0;
  template <typename S>
  __device__ explicit Producer(S& s) : base(smem_address(s.ring)), full(smem_address(s.full)), empty(smem_address(s.empty)) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  __device__ __forceinline__ void load(const void* src, int bytes) {
    const uint32_t bar = full + 8 * slot;
    wait_parity(empty + 8 * slot, phase ^ 1);
    barrier_expect(bar, bytes);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(base + slot * kSlotBytes), "l"(src), "r"(bytes),
                 "r"(bar), "l"(policy)
                 : "memory");
    if (++slot == kSlots) slot = 0, phase ^= 1;
  }
};

struct Consumer {
  uint32_t base, full, empty;
  int first = 0;  // unit that the phase begins with
  template <typename S>
  __device__ explicit Consumer(S& s) : base(smem_address(s.ring)), full(smem_address(s.full)), empty(smem_address(s.empty)) {}
  // Unit i of the phase -> where it lies. The slot's unit before this one must have come: the wait would take the turn before it for an answer. So no warp may be a ring ahead
  // of another (product()), and warps meet between phases.
  __device__ __forceinline__ uint32_t wait(int i) const {
    const uint32_t unit = first + i, turn = unit / kSlots, slot = unit - turn * kSlots;
    wait_parity(full + 8 * slot, turn & 1);
    return base + slot * kSlotBytes;
  }
  // By every warp that takes part in a unit: kShare of its eight arrivals.
  template <int kShare>
  __device__ __forceinline__ void release(uint32_t at) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(empty + 8 * ((at - base) / kSlotBytes)), "n"(kShare) : "memory");
  }
  __device__ __forceinline__ void next_phase(int units) { first += units; }
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

__device__ __forceinline__ float dot8(uint4 w, const float* x, float acc) {
  acc = fmaf(low(w.x), x[0], acc), acc = fmaf(high(w.x), x[1], acc);
  acc = fmaf(low(w.y), x[2], acc), acc = fmaf(high(w.y), x[3], acc);
  acc = fmaf(low(w.z), x[4], acc), acc = fmaf(high(w.z), x[5], acc);
  acc = fmaf(low(w.w), x[6], acc), acc = fmaf(high(w.w), x[7], acc);
  return acc;
}

// This multiprocessor's items [begin, end) in a phase. Shares differ by at most one; `turn` moves the larger ones on from phase to phase.
struct Share {
  int begin, end;
  __device__ Share(int items, int turn) {
    const int G = gridDim.x, c = (blockIdx.x + turn * 29) % G;
    begin = static_cast<int>(static_cast<int64_t>(items) * c / G), end = static_cast<int>(static_cast<int64_t>(items) * (c + 1) / G);
  }
  __device__ int count() const { return end - begin; }
};

// ---- matrix-vector products
template <int kColumns>
constexpr int kVectors = (kColumns / 8 + 31) / 32;  // of eight columns, a lane

template <int kD>
__device__ __forceinline__ void take_vector(const float4 (&from)[2][kD / 8], float (&x)[kVectors<kD> * 8]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int v = 0; v < kVectors<kD>; ++v) {
    const float4 a = from[0][lane + 32 * v], b = from[1][lane + 32 * v];
    x[8 * v] = a.x, x[8 * v + 1] = a.y, x[8 * v + 2] = a.z, x[8 * v + 3] = a.w, x[8 * v + 4] = b.x, x[8 * v + 5] = b.y, x[8 * v + 6] = b.z, x[8 * v + 7] = b.w;
  }
}

// A lane's part of one row that lies at `at`; `vectors` of eight columns in all.
template <int kMost>
__device__ __forceinline__ float row_part(uint32_t at, int vectors, const float (&x)[kMost * 8]) {
  const int lane = threadIdx.x & 31;
  uint4 w[kMost];
#pragma unroll
  for (int v = 0; v < kMost; ++v) {
    w[v] = make_uint4(0, 0, 0, 0);
    if (lane + 32 * v < vectors) w[v] = lds128(at + (lane + 32 * v) * 16);
  }
  float a[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int v = 0; v < kMost; ++v) a[v % 4] = dot8(w[v], x + 8 * v, a[v % 4]);
  return (a[0] + a[1]) + (a[2] + a[3]);
}

// kTask consecutive rows a warp, tasks in turn to the warps: done(first row of the task, sums), in all lanes.
template <int kD, int kTask, typename Done>
__device__ __forceinline__ void product(Consumer& in, int tasks, const float (&x)[kVectors<kD> * 8], Done done) {
  constexpr int kRound = kWarps * kTask;
  static_assert(kRound <= kSlots);
  const int lane = threadIdx.x & 31;
  for (int begin = 0; begin < tasks; begin += kWarps) {
    // Units that lie a ring behind the first ones of the phase wait until all warps have read those.
    if (begin > 0 && begin * kTask + kRound > kSlots) named_barrier(1, kConsumers);
    const int task = begin + (threadIdx.x >> 5);
    if (task >= tasks) break;
    float a[kTask];
#pragma unroll
    for (int r = 0; r < kTask; ++r) {
      const uint32_t at = in.wait(task * kTask + r);
      a[r] = row_part<kVectors<kD>>(at, kD / 8, x);
      in.release<8>(at);
    }
    if constexpr (kTask == 4) {
      const bool hi = lane & 16, mid = lane & 8;
      const float s0 = __shfl_xor_sync(~0u, hi ? a[0] : a[2], 16), s1 = __shfl_xor_sync(~0u, hi ? a[1] : a[3], 16);
      const float k0 = (hi ? a[2] : a[0]) + s0, k1 = (hi ? a[3] : a[1]) + s1;
      float k = (mid ? k1 : k0) + __shfl_xor_sync(~0u, mid ? k0 : k1, 8);
      k += __shfl_xor_sync(~0u, k, 4);
      k += __shfl_xor_sync(~0u, k, 2);
      k += __shfl_xor_sync(~0u, k, 1);
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = __shfl_sync(~0u, k, (r / 2) * 16 + (r % 2) * 8);
    } else {
#pragma unroll
      for (int r = 0; r < kTask; ++r) a[r] = warp_sum(a[r]);
    }
    done(task * kTask, a);
  }
  in.next_phase(tasks * kTask);
}

// ---- vectors that all multiprocessors gather
// x * weight to shared memory and 1 / rms(x), from the words of x (or an embedding) by the first D / 8 threads. One barrier.
template <int kD, typename Read>
__device__ __forceinline__ float gather_normed(float4 (&to)[2][kD / 8], float (&sums)[8], const float* weight, float eps, Read read) {
  const int t = threadIdx.x;
  if (t < kD / 8) {
    const float4 wa = __ldg(reinterpret_cast<const float4*>(weight) + 2 * t), wb = __ldg(reinterpret_cast<const float4*>(weight) + 2 * t + 1);
    float x[8], sum = 0.0f;
    read(x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x[i], x[i], sum);
    to[0][t] = make_float4(x[0] * wa.x, x[1] * wa.y, x[2] * wa.z, x[3] * wa.w);
    to[1][t] = make_float4(x[4] * wb.x, x[5] * wb.y, x[6] * wb.z, x[7] * wb.w);
    sum = warp_sum(sum);
    if ((t & 31) == 0) sums[t >> 5] = sum;
  }
  __syncwarp();
  named_barrier(1, kConsumers);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kD / 256; ++i) total += sums[i];
  return rsqrtf(total / kD + eps);
}

}  // namespace
}  // namespace oryx::decode_cuda
