// The persistent decoding kernel of decode_step.h.
//
// The last warp is the producer: it walks through the whole step and copies units of at most 4 KB, a row of weights or of cached keys, into a ring of slots. Twelve warps walk
// through the same units and compute. For a matrix-vector product every warp holds the vector in registers and takes whole rows; the wide product of the feed-forward's
// second half splits a row among three warps.
//
// Phases of a layer:
//   1  u = norm(x):            k, v, gate, query, beta, decay
//   2  convolutions, S, readout; in attention mode this share of the cached tokens instead of the readout, then the shares together
//   3  head norm, gate, xa = x + W_out o
//   4  h = norm(xa):           silu(W_gate h) * (W_up h)
//   5  x = xa + W_down (...)
//
// There is no barrier among multiprocessors. What goes from one to another is written as words of 8 bytes, a value and the number of the step and layer it belongs to; whoever needs it reads until the
// number is right. A word is overwritten a layer later at the earliest, which every multiprocessor reaches only with the results of phases 3 and 5 of all others, so after
// they have read it. Sums are in a fixed order: the same inputs give the same bits.
#include <cfloat>

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
  do v = look(from);
  while (v.y != flag);
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
  // Unit i of the phase -> where it lies. A warp's units of a phase are at most kSlots apart.
  __device__ __forceinline__ uint32_t wait(int i) const {
    const uint32_t unit = first + i, turn = unit / kSlots, slot = unit - turn * kSlots;
    // The slot's unit before this one may be another warp's and still be under way: until it has come, a wait for the next turn would take the turn before it for an answer.
    if (i >= kSlots) wait_parity(full + 8 * slot, (turn & 1) ^ 1);
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
  const int lane = threadIdx.x & 31;
  for (int task = threadIdx.x >> 5; task < tasks; task += kWarps) {
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
  named_barrier(1, kConsumers);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kD / 256; ++i) total += sums[i];
  return rsqrtf(total / kD + eps);
}

// ---- phase 2
struct HeadWork {  // of one (head, slice): four keys a lane, two value rows a warp
  float k[4], q[4];  // after convolution and rounding; query as projected
  float v[2];
  Tail4 new_tail;
};

template <int kD>
__device__ __forceinline__ void attend_share(const OryxDecodeStep& a, const Workspace& ws, Consumer& in, int position, uint32_t flag) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, l = lane & 15, head = 2 * warp + (lane >> 4);
  const Share share((position + kTokens - 1) / kTokens, 3);
  const int units = share.count() > 0 ? 2 * (min(share.end * kTokens, position) - share.begin * kTokens) : 0;
  // Every unit has eight arrivals, however many heads there are: a warp without heads arrives too.
  const bool works = 2 * warp < H;
  // The query turned to where it stands seen from the first key, then back by one position a key: R(p)q . R(j)k = R(p - j)q . k.
  float lo[4], hi[4], c1[4], s1[4], acc[8], q_lo[4], q_hi[4];
  float m = -1e30f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.0f;
  if (works && units > 0) {
    await<2>(ws.proj + 3 * kD + head * kWidth + 4 * l, 2, flag, q_lo);
    await<2>(ws.proj + 3 * kD + head * kWidth + 64 + 4 * l, 2, flag, q_hi);
#pragma unroll
    for (int i = 0; i < 4; ++i) q_lo[i] *= a.attention_scale * kLog2e, q_hi[i] *= a.attention_scale * kLog2e;
    const float4 c = __ldg(reinterpret_cast<const float4*>(a.rope + 128) + l), s = __ldg(reinterpret_cast<const float4*>(a.rope + 192) + l);
    c1[0] = c.x, c1[1] = c.y, c1[2] = c.z, c1[3] = c.w, s1[0] = s.x, s1[1] = s.y, s1[2] = s.z, s1[3] = s.w;
  }
  int unit = 0;
  for (int piece = share.begin; piece < share.end; ++piece) {
    const int first = piece * kTokens, tokens = min(kTokens, position - first);
    float score[kTokens];
    if (works && (piece - share.begin) % 16 == 0) {  // the exact angle again, so that rounding does not build up
      const float* row = a.rope + static_cast<int64_t>(position - first) * 128;
      const float4 c = __ldg(reinterpret_cast<const float4*>(row) + l), s = __ldg(reinterpret_cast<const float4*>(row + 64) + l);
      const float cc[4] = {c.x, c.y, c.z, c.w}, ss[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) lo[i] = q_lo[i] * cc[i] - q_hi[i] * ss[i], hi[i] = q_hi[i] * cc[i] + q_lo[i] * ss[i];
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      score[t] = -1e30f;
      if (t >= tokens) break;
      const uint32_t at = in.wait(unit + t);
      if (works) {
        const uint32_t row = at + head * (kWidth * 2) + l * 8;
        const uint2 ka = lds64(row), kb = lds64(row + 128);
        float p = low(ka.x) * lo[0];
        p = fmaf(high(ka.x), lo[1], p), p = fmaf(low(ka.y), lo[2], p), p = fmaf(high(ka.y), lo[3], p);
        p = fmaf(low(kb.x), hi[0], p), p = fmaf(high(kb.x), hi[1], p), p = fmaf(low(kb.y), hi[2], p), p = fmaf(high(kb.y), hi[3], p);
        score[t] = p;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // R(-1)
          const float x = lo[i], y = hi[i];
          lo[i] = fmaf(y, s1[i], x * c1[i]), hi[i] = fmaf(-x, s1[i], y * c1[i]);
        }
      }
      in.release<1>(at);
    }
    const bool up = lane & 8, right = lane & 4;
    const int mine = (up ? 2 : 0) + (right ? 1 : 0);
    float p;
    {
      const float s0 = __shfl_xor_sync(~0u, up ? score[0] : score[2], 8), s1x = __shfl_xor_sync(~0u, up ? score[1] : score[3], 8);
      const float k0 = (up ? score[2] : score[0]) + s0, k1 = (up ? score[3] : score[1]) + s1x;
      float k = (right ? k1 : k0) + __shfl_xor_sync(~0u, right ? k0 : k1, 4);
      k += __shfl_xor_sync(~0u, k, 2);
      k += __shfl_xor_sync(~0u, k, 1);
      if (mine >= tokens) k = -1e30f;
      float top = fmaxf(k, __shfl_xor_sync(~0u, k, 8));
      top = fmaxf(m, fmaxf(top, __shfl_xor_sync(~0u, top, 4)));
      const float shrink = exp2f(m - top);
      p = mine < tokens ? exp2f(k - top) : 0.0f;
      sum = sum * shrink + p;
      m = top;
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] *= shrink;
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float pt = __shfl_sync(~0u, p, (lane & 16) | ((t >> 1) << 3) | ((t & 1) << 2));
      if (t >= tokens) break;
      const uint32_t at = in.wait(unit + tokens + t);
      if (works) {
        const uint4 v = lds128(at + head * (kWidth * 2) + l * 16);
        acc[0] = fmaf(low(v.x), pt, acc[0]), acc[1] = fmaf(high(v.x), pt, acc[1]);
        acc[2] = fmaf(low(v.y), pt, acc[2]), acc[3] = fmaf(high(v.y), pt, acc[3]);
        acc[4] = fmaf(low(v.z), pt, acc[4]), acc[5] = fmaf(high(v.z), pt, acc[5]);
        acc[6] = fmaf(low(v.w), pt, acc[6]), acc[7] = fmaf(high(v.w), pt, acc[7]);
      }
      in.release<1>(at);
    }
    unit += 2 * tokens;
  }
  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 4);
  if (!works) return;
  const int part = blockIdx.x * H + head;
  if (l == 0) put2(ws.part_ml + part, __float_as_uint(m), __float_as_uint(sum), flag);
  uint2* out = ws.part_o + static_cast<int64_t>(part) * kWidth + 8 * l;
#pragma unroll
  for (int i = 0; i < 4; ++i) put2(out + 2 * i, __float_as_uint(acc[2 * i]), __float_as_uint(acc[2 * i + 1]), flag);
}

__device__ __forceinline__ int attention_units(int position) {
  const Share share((position + kTokens - 1) / kTokens, 3);
  return share.count() > 0 ? 2 * (min(share.end * kTokens, position) - share.begin * kTokens) : 0;
}

// The shares of all multiprocessors and the new token itself, for two values of one head a warp.
template <int kD>
__device__ __forceinline__ void join_shares(const OryxDecodeStep& a, const Workspace& ws, const HeadWork& w, int head, int slice, uint32_t flag) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, G = gridDim.x;
  const int d = slice * kSliceRows + 2 * warp;
  float own = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) own = fmaf(w.q[i], w.k[i], own);
  own = warp_sum(own) * a.attention_scale * kLog2e;  // both at the same angle
  constexpr int kTurns = kMaxGrid / 32;
  uint4 ml[kTurns], value[kTurns];
  bool missing;
  do {
    missing = false;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int c = lane + 32 * i;
      ml[i] = make_uint4(__float_as_uint(-1e30f), flag, 0, flag), value[i] = make_uint4(0, flag, 0, flag);
      if (c < G) ml[i] = look2(ws.part_ml + c * H + head), value[i] = look2(ws.part_o + (static_cast<int64_t>(c) * H + head) * kWidth + d);
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) missing |= ml[i].y != flag || ml[i].w != flag || value[i].y != flag || value[i].w != flag;
  } while (missing);
  float m = own;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) m = fmaxf(m, __uint_as_float(ml[i].x));
  __syncwarp();
  m = warp_max(m);
  float total = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const float e = exp2f(__uint_as_float(ml[i].x) - m);
    total = fmaf(e, __uint_as_float(ml[i].z), total), x = fmaf(e, __uint_as_float(value[i].x), x), y = fmaf(e, __uint_as_float(value[i].z), y);
  }
  const float e = exp2f(own - m);
  total = warp_sum(total) + e;
  x = (warp_sum(x) + e * w.v[0]) / total;
  y = (warp_sum(y) + e * w.v[1]) / total;
  if (lane == 0) put2(ws.o + head * kWidth + d, __float_as_uint(x), __float_as_uint(y), flag);
}

// Convolutions, the recurrent state of one (head, slice) and, in linear mode, its readout. What does not depend on the new token is read first.
template <int kD>
__device__ __forceinline__ HeadWork advance_state(const OryxDecodeLayer& layer, const Workspace& ws, int head, int slice, int position, bool keeps, bool linear, uint32_t flag) {
  constexpr int H = kD / kWidth;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int channel = head * kWidth + 4 * lane, row = slice * kSliceRows + 2 * warp;
  float* S = layer.S + (static_cast<int64_t>(head) * kWidth + row) * kWidth + 4 * lane;
  float4 state[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) state[r] = __ldcg(reinterpret_cast<const float4*>(S + r * kWidth));
  Tail4 k_tail;
  k_tail.load(layer.k_tail, channel);
  uint32_t* v_tail = reinterpret_cast<uint32_t*>(static_cast<bf16*>(layer.v_tail) + 3 * (head * kWidth + row));
  const uint32_t t0 = __ldcg(v_tail), t1 = __ldcg(v_tail + 1), t2 = __ldcg(v_tail + 2);
  float4 k_filter[4], v_filter[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) k_filter[i] = __ldg(reinterpret_cast<const float4*>(layer.k_conv) + channel + i);
#pragma unroll
  for (int i = 0; i < 2; ++i) v_filter[i] = __ldg(reinterpret_cast<const float4*>(layer.v_conv) + head * kWidth + row + i);
  const float A_log = __ldg(layer.A_log + head), dt_bias = __ldg(layer.dt_bias + head);

  HeadWork w;
  float raw[4], v_raw[2];
  await<2>(ws.proj + channel, 2, flag, raw);
  await<2>(ws.proj + 3 * kD + channel, 2, flag, w.q);
  await<1>(ws.proj + kD + head * kWidth + row, 2, flag, v_raw);
  const float b_in = await(ws.proj + 4 * kD + head, flag), a_in = await(ws.proj + 4 * kD + H + head, flag);
  __syncwarp();
  float kk = 0.0f, qq = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    raw[i] = round_bf16(raw[i]);
    w.k[i] = convolved(k_filter[i], k_tail.at(i, 0), k_tail.at(i, 1), k_tail.at(i, 2), raw[i]);
    kk = fmaf(w.k[i], w.k[i], kk), qq = fmaf(w.q[i], w.q[i], qq);
  }
  w.new_tail = k_tail.shifted(raw);
  v_raw[0] = round_bf16(v_raw[0]), v_raw[1] = round_bf16(v_raw[1]);
  w.v[0] = convolved(v_filter[0], low(t0), high(t0), low(t1), v_raw[0]);
  w.v[1] = convolved(v_filter[1], high(t1), low(t2), high(t2), v_raw[1]);
  const float g = log_decay(A_log, a_in + dt_bias), beta = sigmoid(b_in), decay = __expf(g);
  float predicted[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) predicted[r] = fmaf(state[r].x, w.k[0], fmaf(state[r].y, w.k[1], fmaf(state[r].z, w.k[2], state[r].w * w.k[3])));
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {  // four sums side by side
    kk += __shfl_xor_sync(~0u, kk, d), qq += __shfl_xor_sync(~0u, qq, d);
    predicted[0] += __shfl_xor_sync(~0u, predicted[0], d), predicted[1] += __shfl_xor_sync(~0u, predicted[1], d);
  }
  kk = rsqrtf(kk + 1e-6f), qq = rsqrtf(qq + 1e-6f) * 0.08838834764831845f;
  float out[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float write = beta * (w.v[r] - decay * predicted[r] * kk) * kk;
    float4& s = state[r];
    s.x = fmaf(write, w.k[0], decay * s.x), s.y = fmaf(write, w.k[1], decay * s.y);
    s.z = fmaf(write, w.k[2], decay * s.z), s.w = fmaf(write, w.k[3], decay * s.w);
    out[r] = fmaf(s.x, w.q[0], fmaf(s.y, w.q[1], fmaf(s.z, w.q[2], s.w * w.q[3])));
  }
  if (linear) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) out[0] += __shfl_xor_sync(~0u, out[0], d), out[1] += __shfl_xor_sync(~0u, out[1], d);
    if (lane == 0) put2(ws.o + head * kWidth + row, __float_as_uint(out[0] * qq), __float_as_uint(out[1] * qq), flag);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) *reinterpret_cast<float4*>(S + r * kWidth) = state[r];
  if (lane == 0) {  // this warp alone reads and writes these two channels
    v_tail[0] = pack(high(t0), low(t1)), v_tail[1] = pack(v_raw[0], low(t2)), v_tail[2] = pack(high(t2), v_raw[1]);
    if (keeps) *reinterpret_cast<uint32_t*>(static_cast<bf16*>(layer.values) + static_cast<int64_t>(position) * kD + head * kWidth + row) = pack(w.v[0], w.v[1]);
  }
  if (keeps && slice == 0 && warp == 0) {
    *reinterpret_cast<uint2*>(static_cast<bf16*>(layer.keys) + static_cast<int64_t>(position) * kD + channel) = make_uint2(pack(w.k[0], w.k[1]), pack(w.k[2], w.k[3]));
    if (lane == 0) {
      layer.g_rows[static_cast<int64_t>(position) * H + head] = g;
      layer.beta_rows[static_cast<int64_t>(position) * H + head] = beta;
      if (head == 0 && layer.mode_rows != nullptr) layer.mode_rows[position] = linear ? 0 : 1;
    }
  }
  return w;
}

// ---- the step
template <int kD, int kF>
__device__ void produce(const OryxDecodeStep& a, Shared<kD, kF>& s) {
  constexpr int H = kD / kWidth;
  Producer out(s);
  const int position = __ldcg(a.position);
  const auto rows = [&](const void* w, Share share, int count) {
    const char* from = static_cast<const char*>(w) + static_cast<int64_t>(share.begin) * count * kD * 2;
    for (int i = 0; i < share.count() * count; ++i, from += kD * 2) out.load(from, kD * 2);
  };
  for (int l = 0; l < a.num_layers; ++l) {
    const OryxDecodeLayer& layer = a.layers[l];
    const bool attention = s.modes[l] != 0;
    const Share in(2 * kD, 0);
    for (int row = 2 * in.begin; row < 2 * in.end; ++row) {
      out.load(static_cast<const bf16*>(layer.w_in) + static_cast<int64_t>(row + (attention && row >= 3 * kD ? kD : 0)) * kD, kD * 2);
    }
    const int narrow = static_cast<int>(blockIdx.x) - (static_cast<int>(gridDim.x) - 2 * H);
    if (narrow >= 0) {
      for (int half = 0; half < 2; ++half) out.load(layer.w_beta_decay + static_cast<int64_t>(narrow) * kD + half * (kD / 2), kD * 2);
    }
    if (attention) {
      const Share share((position + kTokens - 1) / kTokens, 3);
      for (int i = share.begin; i < share.end; ++i) {
        const int tokens = min(kTokens, position - i * kTokens);
        for (int t = 0; t < 2 * tokens; ++t) {
          const void* from = t < tokens ? layer.keys : layer.values;
          out.load(static_cast<const bf16*>(from) + (static_cast<int64_t>(i) * kTokens + t % tokens) * kD, kD * 2);
        }
      }
    }
    rows(layer.w_out, Share(kD, 1), 1);
    rows(layer.w_gate_up, Share(kF / 2, 2), 4);
    const Share down(kD, 4);
    constexpr int kPart = (kF / 8 + kParts - 1) / kParts;  // vectors of eight columns
    for (int row = down.begin; row < down.end; ++row) {
      for (int part = 0; part < kParts; ++part) {
        const int vectors = min(kPart, kF / 8 - part * kPart);
        out.load(static_cast<const bf16*>(layer.w_down) + static_cast<int64_t>(row) * kF + part * kPart * 8, vectors * 16);
      }
    }
  }
  rows(a.head, Share(a.vocab_size / 4, 5), 4);
}

#ifdef ORYX_TRACE
#define TRACE(i) \
  if (t == 0 && a.trace != nullptr) a.trace[(blockIdx.x * 128 + l) * 16 + (i)] = clock64()
#else
#define TRACE(i)
#endif

template <int kD, int kF>
__device__ void consume(const OryxDecodeStep& a, Shared<kD, kF>& s, const Workspace& ws) {
  constexpr int H = kD / kWidth;
  static_assert(kD * 2 <= kSlotBytes && kD % 256 == 0 && kD / 8 <= kConsumers && H % 2 == 0 && H <= 2 * kMixWarps);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  Consumer in(s);
  const int position = __ldcg(a.position), token = __ldcg(a.token);
  const uint32_t launch = __ldcg(ws.launch);
  const bf16* embedding = static_cast<const bf16*>(a.embed) + static_cast<int64_t>(token) * kD;
  const int head = blockIdx.x / kSlices, slice = blockIdx.x % kSlices;
  if (blockIdx.x == 0 && t == 0 && a.id_rows != nullptr && position < a.capacity) a.id_rows[position] = token;
  float x[kVectors<kD> * 8];
  uint32_t before = 0;
  for (int l = 0; l < a.num_layers; ++l) {
    const OryxDecodeLayer& layer = a.layers[l];
    const bool attention = s.modes[l] != 0;
    const uint32_t flag = launch + l + 1;
    TRACE(0);
    // 1
    {
      const float scale = gather_normed<kD>(s.narrow, s.sums[0], layer.norm1, a.norm_eps, [&](float(&y)[8]) {
        if (l > 0) return await<4>(ws.x + 8 * t, 2, before, y);
        const uint4 e = __ldg(reinterpret_cast<const uint4*>(embedding) + t);
        y[0] = low(e.x), y[1] = high(e.x), y[2] = low(e.y), y[3] = high(e.y), y[4] = low(e.z), y[5] = high(e.z), y[6] = low(e.w), y[7] = high(e.w);
      });
      take_vector<kD>(s.narrow, x);
      TRACE(1);
      const Share share(2 * kD, 0);
      product<kD, 2>(in, share.count(), x, [&](int row, const float(&sum)[2]) {
        if (lane == 0) put2(ws.proj + 2 * share.begin + row, __float_as_uint(sum[0] * scale), __float_as_uint(sum[1] * scale), flag);
      });
      const int narrow = static_cast<int>(blockIdx.x) - (static_cast<int>(gridDim.x) - 2 * H);
      if (narrow >= 0) {
        if (warp == kWarps - 1) {
          float sum = 0.0f;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t at = in.wait(half);
#pragma unroll
            for (int v = 0; v < kVectors<kD> / 2; ++v) {
              const float4 p = lds_float4(at + (lane + 32 * v) * 32), q = lds_float4(at + (lane + 32 * v) * 32 + 16);
              const float* y = x + 8 * (v + half * (kVectors<kD> / 2));
              sum += p.x * y[0] + p.y * y[1] + p.z * y[2] + p.w * y[3] + q.x * y[4] + q.y * y[5] + q.z * y[6] + q.w * y[7];
            }
            in.release<8>(at);
          }
          sum = warp_sum(sum);
          if (lane == 0) put(ws.proj + 4 * kD + narrow, sum * scale, flag);
        }
        in.next_phase(2);
      }
    }
    TRACE(2);
    // 2
    const bool mine = head < H && warp < kMixWarps;
    HeadWork work;
    if (mine) work = advance_state<kD>(layer, ws, head, slice, position, layer.keys != nullptr && position < a.capacity, !attention, flag);
    TRACE(3);
    if (attention) {
      named_barrier(1, kConsumers);  // all of phase 1's units have been read (Consumer::wait)
      if (warp < kMixWarps) attend_share<kD>(a, ws, in, position, flag);
      in.next_phase(attention_units(position));
      if (mine) join_shares<kD>(a, ws, work, head, slice, flag);
    }
    TRACE(4);
    // 3
    {
      if (t < kD / 8) {
        float gate[8], o[8], sum = 0.0f;
        await<4>(ws.proj + 2 * kD + 8 * t, 2, flag, gate);
        const float4 n0 = __ldg(reinterpret_cast<const float4*>(layer.o_norm) + 2 * (t & 15)), n1 = __ldg(reinterpret_cast<const float4*>(layer.o_norm) + 2 * (t & 15) + 1);
        const float n[8] = {n0.x, n0.y, n0.z, n0.w, n1.x, n1.y, n1.z, n1.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) gate[i] = silu(gate[i]) * n[i];
        await<4>(ws.o + 8 * t, 2, flag, o);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(o[i], o[i], sum);
#pragma unroll
        for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        const float scale = rsqrtf(sum / kWidth + a.head_norm_eps);
#pragma unroll
        for (int i = 0; i < 8; ++i) o[i] *= scale * gate[i];
        s.other.narrow[0][t] = make_float4(o[0], o[1], o[2], o[3]);
        s.other.narrow[1][t] = make_float4(o[4], o[5], o[6], o[7]);
      }
      named_barrier(1, kConsumers);
      // Every slice has given its part of o, so it has read the old tail.
      if (mine && slice == 0 && warp == 0) work.new_tail.store(layer.k_tail, head * kWidth + 4 * lane);
      take_vector<kD>(s.other.narrow, x);
      TRACE(5);
      const Share share(kD, 1);
      product<kD, 1>(in, share.count(), x, [&](int i, const float(&sum)[1]) {
        const int row = share.begin + i;
        if (lane == 0) put(ws.xa + row, sum[0] + (l > 0 ? __uint_as_float(look(ws.x + row).x) : __bfloat162float(embedding[row])), flag);
      });
    }
    TRACE(6);
    // 4
    {
      const float scale = gather_normed<kD>(s.narrow, s.sums[1], layer.norm2, a.norm_eps, [&](float(&y)[8]) { await<4>(ws.xa + 8 * t, 2, flag, y); });
      take_vector<kD>(s.narrow, x);
      TRACE(7);
      const Share share(kF / 2, 2);
      product<kD, 4>(in, share.count(), x, [&](int row, const float(&sum)[4]) {
        if (lane == 0) put(ws.mid + share.begin + row / 4, pack(silu(sum[0] * scale) * sum[1] * scale, silu(sum[2] * scale) * sum[3] * scale), flag);
      });
    }
    TRACE(8);
    // 5
    {
      constexpr int kPairs = kF / 4, kTurns = (kPairs + kConsumers - 1) / kConsumers;  // two words each
      uint4 v[kTurns];
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          v[i] = make_uint4(0, flag, 0, flag);
          if (t + i * kConsumers < kPairs) v[i] = look2(ws.mid + 2 * (t + i * kConsumers));
        }
#pragma unroll
        for (int i = 0; i < kTurns; ++i) missing |= v[i].y != flag || v[i].w != flag;
      } while (missing);
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        if (t + i * kConsumers < kPairs) reinterpret_cast<uint2*>(s.other.wide)[t + i * kConsumers] = make_uint2(v[i].x, v[i].z);
      }
      named_barrier(1, kConsumers);
      constexpr int kPart = (kF / 8 + kParts - 1) / kParts, kMost = (kPart + 31) / 32;
      static_assert(kPart * 16 <= kSlotBytes && kMost == kVectors<kD>);
      const int part = warp % kParts, trio = warp / kParts, vectors = min(kPart, kF / 8 - part * kPart);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        uint4 w = make_uint4(0, 0, 0, 0);
        if (lane + 32 * i < vectors) w = s.other.wide[part * kPart + lane + 32 * i];
        x[8 * i] = low(w.x), x[8 * i + 1] = high(w.x), x[8 * i + 2] = low(w.y), x[8 * i + 3] = high(w.y);
        x[8 * i + 4] = low(w.z), x[8 * i + 5] = high(w.z), x[8 * i + 6] = low(w.w), x[8 * i + 7] = high(w.w);
      }
      TRACE(9);
      const Share share(kD, 4);
      constexpr int kTrios = kWarps / kParts;
      int turn = 0;
      for (int i = trio; i < share.count(); i += kTrios, ++turn) {
        const uint32_t at = in.wait(i * kParts + part);
        float sum = row_part<kMost>(at, vectors, x);
        in.release<8>(at);
        sum = warp_sum(sum);
        if (lane == 0) s.red[trio][turn][part] = sum;
      }
      in.next_phase(share.count() * kParts);
      named_barrier(2 + trio, kParts * 32);
      if (part == 0 && lane < turn) {
        const int row = share.begin + trio + lane * kTrios;
        put(ws.x + row, __uint_as_float(look(ws.xa + row).x) + (s.red[trio][lane][0] + s.red[trio][lane][1] + s.red[trio][lane][2]), flag);
      }
    }
    TRACE(10);
    before = flag;
  }
  // The head, and the likeliest token.
  const float scale = gather_normed<kD>(s.narrow, s.sums[0], a.final_norm, a.norm_eps, [&](float(&y)[8]) { await<4>(ws.x + 8 * t, 2, before, y); });
  take_vector<kD>(s.narrow, x);
  const Share share(a.vocab_size / 4, 5);
  float best = -FLT_MAX;
  int index = 0x7fffffff;
  const auto better = [&](float y, int id) {
    if (y > best || (y == best && id < index)) best = y, index = id;
  };
  product<kD, 4>(in, share.count(), x, [&](int row, const float(&sum)[4]) {
    const int id = share.begin * 4 + row;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (id + r < a.below) better(sum[r] * scale, id + r);
    }
    if (lane == 0) *reinterpret_cast<float4*>(a.logits + id) = make_float4(sum[0] * scale, sum[1] * scale, sum[2] * scale, sum[3] * scale);
  });
  if (lane == 0) s.best_value[warp] = best, s.best_index[warp] = index;
  named_barrier(1, kConsumers);
  const uint32_t flag = launch + a.num_layers + 1;
  if (t == 0) {
    for (int w = 1; w < kWarps; ++w) better(s.best_value[w], s.best_index[w]);
    put2(ws.top + blockIdx.x, __float_as_uint(best), static_cast<uint32_t>(index), flag);
  }
  if (blockIdx.x != 0 || warp != 0) return;
  best = -FLT_MAX, index = 0x7fffffff;
  for (int c = lane; c < static_cast<int>(gridDim.x); c += 32) {
    uint4 top;
    do top = look2(ws.top + c);
    while (top.y != flag || top.w != flag);
    better(__uint_as_float(top.x), static_cast<int>(top.z));
  }
  __syncwarp();
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane == 0) {
    *a.likeliest = index;
    if (__ldcg(a.feed_back) != 0) *a.token = index;
    *a.position = position + 1;
    *ws.launch = launch + 128;
  }
}

template <int kD, int kF>
__global__ void __launch_bounds__(kThreads, 1) decode_step_kernel(const __grid_constant__ OryxDecodeStep a) {
  extern __shared__ uint8_t raw[];
  auto& s = *reinterpret_cast<Shared<kD, kF>*>((reinterpret_cast<uintptr_t>(raw) + 127) & ~static_cast<uintptr_t>(127));
  for (int l = threadIdx.x; l < a.num_layers; l += kThreads) s.modes[l] = static_cast<int8_t>(__ldcg(a.modes + l));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) barrier_init(smem_address(s.full + i), 1), barrier_init(smem_address(s.empty + i), 8);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) produce<kD, kF>(a, s);
    return;
  }
  consume<kD, kF>(a, s, carve<kD, kF>(a.workspace));
}

template <int kD, int kF>
int launch(const OryxDecodeStep* step, cudaStream_t stream) {
  int device = 0, count = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device); e != cudaSuccess) return e;
  // 32 rows of phase 5 a multiprocessor at most.
  if (count < kD / kWidth * kSlices || count < kD / 32 || count > kMaxGrid || step->num_layers >= kMaxLayers || step->vocab_size % 4 != 0) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>(sizeof(Shared<kD, kF>)) + 128;
  const auto kernel = decode_step_kernel<kD, kF>;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  void* arguments[] = {const_cast<OryxDecodeStep*>(step)};
  return cudaLaunchCooperativeKernel(kernel, dim3(count), dim3(kThreads), arguments, bytes, stream);
}

}  // namespace
}  // namespace oryx::decode_cuda

extern "C" int64_t oryx_decode_workspace(int32_t hidden_size, int32_t intermediate_size) {
  return oryx::decode_cuda::workspace_bytes(hidden_size, intermediate_size);
}

extern "C" int oryx_decode_supports(int32_t hidden_size, int32_t num_heads, int32_t intermediate_size) {
  return hidden_size == 2048 && num_heads == 16 && intermediate_size == 5440;
}

extern "C" int oryx_decode_step(const OryxDecodeStep* step, int32_t hidden_size, int32_t intermediate_size, void* stream) {
  if (hidden_size == 2048 && intermediate_size == 5440) return oryx::decode_cuda::launch<2048, 5440>(step, static_cast<cudaStream_t>(stream));
  return cudaErrorInvalidValue;
}
