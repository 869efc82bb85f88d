// One query a sequence over cached keys, split along the keys (flash-decoding): bound by reading keys and values once.
//
// The tokens of all sequences, cut to pieces, are shared out evenly over the multiprocessors: shares go across sequences, so that lengths need not be known to the host.
// Warp 8 copies pieces of keys and values into a ring in shared memory; warps 0 to 7 compute. A *slot* is the K / 8 lanes that work on one key head and four tokens of a
// piece: every slot has its own maximum, sum and output, and adds a partial result. A partial's place is (share + sequence), which is unique, for the pairs of a share
// and a sequence that meet form a staircase. A second kernel puts the partials of a sequence together, in order.
//
// Keys lie in the cache before RoPE. With one query head a key head it is the query that is turned, by the distance to the key: R(p) q . R(j) k = R(p - j) q . k; with
// several it is the key. Angles come from a table once a piece and go on by one position a token.
#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/cuda/fragments.cuh"
#include "oryx/ops/cuda/hopper.cuh"
#include "oryx/ops/decode_attention/cuda/decode_attention.h"

namespace oryx::decode_attention_cuda {
namespace {

using namespace oryx::hopper;
using namespace oryx::ops::cuda;
using bf16 = __nv_bfloat16;

constexpr int kWarps = 8, kConsumers = kWarps * 32, kThreads = kConsumers + 32;
constexpr int kStageBytes = 16384, kStages = 12;
constexpr int kTokens = 4;  // of a slot in a piece
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLowest = -1e30f;

struct __align__(128) Shared {
  uint8_t ring[kStages][kStageBytes];
  uint64_t full[kStages], empty[kStages];
  int64_t pieces_before;  // of the sequences before this share's first
  int64_t pieces;         // of all
  int first;              // sequence
};

template <int K>
constexpr int kLanes = K / 8;
template <int K>
constexpr int kSlots = kConsumers / kLanes<K>;

struct Layout {  // of slots: heads of a block, and how many groups of four tokens of a piece go side by side
  int heads, side, groups, piece;
  __host__ __device__ Layout(int64_t Hk, int slots) {
    heads = static_cast<int>(Hk < slots ? Hk : slots), side = slots / heads;
    groups = static_cast<int>((Hk + slots - 1) / slots), piece = side * kTokens;
  }
};

struct Range {  // keys that a query sees
  int begin, end;
};
__device__ __forceinline__ Range visible(const OryxDecodeAttention& a, int n) {
  if (a.wanted != nullptr && a.wanted[n] == 0) return {0, 0};
  const int end = min(max(__ldg(a.lengths + n), 0), static_cast<int>(a.capacity));
  return {a.window > 0 && end > a.window ? end - static_cast<int>(a.window) : 0, end};
}
__device__ __forceinline__ int pieces_of(Range r, int piece) { return (r.end - r.begin + piece - 1) / piece; }

__device__ __forceinline__ int64_t place(const OryxDecodeAttention& a, int n, int token, int64_t row, int64_t step) {
  if (a.blocks == nullptr) return n * row + token * step;
  const int page = static_cast<int>(a.page);
  return __ldg(a.blocks + n * a.most_blocks + token / page) * row + (token % page) * step;
}

// First sequence of this share and the pieces before it, by one warp.
__device__ void find_share(const OryxDecodeAttention& a, int piece, Shared& s) {
  const int lane = threadIdx.x & 31, N = static_cast<int>(a.N);
  int64_t total = 0;
  for (int n = lane; n < N; n += 32) total += pieces_of(visible(a, n), piece);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(~0u, total, d);
  const int64_t begin = total * blockIdx.x / gridDim.x;
  int64_t before = 0;
  int first = N;
  for (int base = 0; base < N; base += 32) {
    const int n = base + lane;
    int64_t mine = n < N ? pieces_of(visible(a, n), piece) : 0, sum = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    const uint32_t found = __ballot_sync(~0u, before + sum > begin);
    if (found != 0) {
      const int at = __ffs(found) - 1;
      first = base + at;
      before += __shfl_sync(~0u, sum - mine, at);
      break;
    }
    before += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) s.first = first, s.pieces_before = before, s.pieces = total;
}

// f(sequence, range, first piece, last piece) for the parts of this share.
template <typename F>
__device__ __forceinline__ void for_each_part(const OryxDecodeAttention& a, const Shared& s, int piece, F f) {
  int64_t at = s.pieces * blockIdx.x / gridDim.x, before = s.pieces_before;
  const int64_t end = s.pieces * (blockIdx.x + 1) / gridDim.x;
  for (int n = s.first; at < end; ++n) {
    const Range r = visible(a, n);
    const int count = pieces_of(r, piece);
    if (count == 0) continue;
    const int from = static_cast<int>(at - before), to = static_cast<int>(min(end - before, static_cast<int64_t>(count)));
    f(n, r, from, to);
    at += to - from;
    before += count;
  }
}

__device__ __forceinline__ void wait_parity(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nL_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra L_DONE;\nbra L_WAIT;\nL_DONE:\n}\n" ::"r"(bar), "r"(parity)
      : "memory");
}

struct Ring {
  uint32_t base, full, empty;
  int stage = 0;
  uint32_t phase = 0;
  __device__ explicit Ring(Shared& s) : base(smem_address(s.ring)), full(smem_address(s.full)), empty(smem_address(s.empty)) {}
  __device__ __forceinline__ uint32_t slot() const { return base + stage * kStageBytes; }
  __device__ __forceinline__ void step() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ uint32_t wait() const {
    wait_parity(full + 8 * stage, phase);
    return slot();
  }
  __device__ __forceinline__ void release() {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * stage);
    step();
  }
};

template <int K>
__device__ void produce(const OryxDecodeAttention& a, Shared& s, const Layout& layout) {
  const int lane = threadIdx.x & 31, head = blockIdx.y * layout.heads, heads = min(layout.heads, static_cast<int>(a.Hk) - head);
  const int row_bytes = heads * K * 2, piece = layout.piece;
  const bool dense = heads == a.Hk && a.key_token == a.Hk * K && a.value_token == a.Hk * K;
  Ring ring(s);
  for_each_part(a, s, piece, [&](int n, Range r, int from, int to) {
    for (int i = from; i < to; ++i) {
      const int first = r.begin + i * piece, tokens = min(piece, r.end - first);
      // Where the tokens of a piece lie side by side it is one copy, else one a token.
      const bool whole = dense && (a.blocks == nullptr || first % a.page + tokens <= a.page);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const bf16* from_rows = static_cast<const bf16*>(part == 0 ? a.keys : a.values) + head * K;
        const int64_t row = part == 0 ? a.key_row : a.value_row, step = part == 0 ? a.key_token : a.value_token;
        wait_parity(ring.empty + 8 * ring.stage, ring.phase ^ 1);
        const uint32_t full = ring.full + 8 * ring.stage;
        if (lane == 0) barrier_expect(full, tokens * row_bytes);
        __syncwarp();
        if (whole) {
          if (lane == 0) bulk_load(ring.slot(), from_rows + place(a, n, first, row, step), tokens * row_bytes, full);
        } else {
          for (int t = lane; t < tokens; t += 32) bulk_load(ring.slot() + t * row_bytes, from_rows + place(a, n, first + t, row, step), row_bytes, full);
        }
        ring.step();
      }
    }
  });
}

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

struct Angles {
  float c[4], s[4];
};
template <int K>
__device__ __forceinline__ Angles angles_of(const float* rope, int64_t position, int l) {
  Angles x;
  const float4 c = __ldg(reinterpret_cast<const float4*>(rope + position * K) + l), s = __ldg(reinterpret_cast<const float4*>(rope + position * K + K / 2) + l);
  x.c[0] = c.x, x.c[1] = c.y, x.c[2] = c.z, x.c[3] = c.w, x.s[0] = s.x, x.s[1] = s.y, x.s[2] = s.z, x.s[3] = s.w;
  return x;
}
template <int kSign>
__device__ __forceinline__ void turn(float (&lo)[4], float (&hi)[4], const Angles& by) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = lo[i], y = hi[i];
    lo[i] = fmaf(-kSign * y, by.s[i], x * by.c[i]), hi[i] = fmaf(kSign * x, by.s[i], y * by.c[i]);
  }
}

// Sums of the four tokens' partial scores over a slot's lanes: lane l has the sum of token 2 (l / (L / 2)) + l / (L / 4) % 2.
template <int kSlotLanes>
__device__ __forceinline__ float slot_sum(const float (&x)[4], int l) {
  constexpr int kUp = kSlotLanes / 2, kRight = kSlotLanes / 4;
  const bool up = l & kUp, right = l & kRight;
  const float s0 = __shfl_xor_sync(~0u, up ? x[0] : x[2], kUp), s1 = __shfl_xor_sync(~0u, up ? x[1] : x[3], kUp);
  const float k0 = (up ? x[2] : x[0]) + s0, k1 = (up ? x[3] : x[1]) + s1;
  float k = (right ? k1 : k0) + __shfl_xor_sync(~0u, right ? k0 : k1, kRight);
#pragma unroll
  for (int d = kRight / 2; d > 0; d /= 2) k += __shfl_xor_sync(~0u, k, d);
  return k;
}

template <int K, int kGroup>
__device__ void consume(const OryxDecodeAttention& a, Shared& s, const Layout& layout, float2* part_ml, float* part_o) {
  constexpr int L = kLanes<K>;
  const int lane = threadIdx.x & 31, l = threadIdx.x % L, slot = threadIdx.x / L;
  const int local = slot % layout.heads, side = slot / layout.heads, head = blockIdx.y * layout.heads + local;
  const int heads = min(layout.heads, static_cast<int>(a.Hk) - static_cast<int>(blockIdx.y) * layout.heads);
  const bool works = side < layout.side && local < heads;
  const bool turns = a.rope != nullptr;
  const int row_bytes = heads * K * 2, piece = layout.piece;
  const bool up = l & (L / 2), right = l & (L / 4);
  const int mine = (up ? 2 : 0) + (right ? 1 : 0);
  Angles one{};
  if (turns) one = angles_of<K>(a.rope, 1 < a.capacity ? 1 : 0, l);
  Ring in(s);
  for_each_part(a, s, piece, [&](int n, Range r, int from, int to) {
    float q_lo[kGroup][4], q_hi[kGroup][4], acc[kGroup][8], m[kGroup], sum[kGroup];
    const int position = r.end - 1;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      m[g] = kLowest, sum[g] = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[g][i] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) q_lo[g][i] = q_hi[g][i] = 0.0f;
      if (works) {
        const bf16* q = static_cast<const bf16*>(a.q) + n * a.q_row + (head * kGroup + g) * K + 4 * l;
        const uint2 x = __ldg(reinterpret_cast<const uint2*>(q)), y = __ldg(reinterpret_cast<const uint2*>(q + K / 2));
        const float scale = a.scale * kLog2e;
        q_lo[g][0] = low(x.x) * scale, q_lo[g][1] = high(x.x) * scale, q_lo[g][2] = low(x.y) * scale, q_lo[g][3] = high(x.y) * scale;
        q_hi[g][0] = low(y.x) * scale, q_hi[g][1] = high(y.x) * scale, q_hi[g][2] = low(y.y) * scale, q_hi[g][3] = high(y.y) * scale;
      }
      if (kGroup > 1 && turns) turn<1>(q_lo[g], q_hi[g], angles_of<K>(a.rope, position, l));
    }
    // The angle at this slot's first token of a piece is fetched a piece ahead.
    const auto angle_at = [&](int i) {
      const int first = min(r.begin + i * piece + side * kTokens, position);
      return angles_of<K>(a.rope, kGroup == 1 ? position - first : first, l);
    };
    Angles next{};
    if (turns) next = angle_at(from);
    for (int i = from; i < to; ++i) {
      const int first = r.begin + i * piece + side * kTokens, tokens = works ? min(max(r.end - first, 0), kTokens) : 0;
      Angles angle = next;
      if (turns && i + 1 < to) next = angle_at(i + 1);
      float lo[4], hi[4], score[kGroup][4];
      if constexpr (kGroup == 1) {
#pragma unroll
        for (int e = 0; e < 4; ++e) lo[e] = q_lo[0][e], hi[e] = q_hi[0][e];
        if (turns) turn<1>(lo, hi, angle);
      }
      uint32_t at = in.wait() + (side * kTokens * heads + local) * (K * 2);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        uint2 ka = make_uint2(0, 0), kb = ka;
        if (t < tokens) ka = lds64(at + t * row_bytes + l * 8), kb = lds64(at + t * row_bytes + K + l * 8);
        float k_lo[4] = {low(ka.x), high(ka.x), low(ka.y), high(ka.y)}, k_hi[4] = {low(kb.x), high(kb.x), low(kb.y), high(kb.y)};
        if constexpr (kGroup == 1) {
          float p = k_lo[0] * lo[0];
#pragma unroll
          for (int e = 1; e < 4; ++e) p = fmaf(k_lo[e], lo[e], p);
#pragma unroll
          for (int e = 0; e < 4; ++e) p = fmaf(k_hi[e], hi[e], p);
          score[0][t] = p;
          if (turns && t + 1 < kTokens) turn<-1>(lo, hi, one);
        } else {
          if (turns) {
            turn<1>(k_lo, k_hi, angle);
            if (t + 1 < kTokens) turn<1>(angle.c, angle.s, one);  // (cos, sin) turns as (x, y) does
          }
#pragma unroll
          for (int g = 0; g < kGroup; ++g) {
            float p = k_lo[0] * q_lo[g][0];
#pragma unroll
            for (int e = 1; e < 4; ++e) p = fmaf(k_lo[e], q_lo[g][e], p);
#pragma unroll
            for (int e = 0; e < 4; ++e) p = fmaf(k_hi[e], q_hi[g][e], p);
            score[g][t] = p;
          }
        }
      }
      in.release();
      float p[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        float k = slot_sum<L>(score[g], l);
        if (mine >= tokens) k = kLowest;
        float top = fmaxf(k, __shfl_xor_sync(~0u, k, L / 2));
        top = fmaxf(m[g], fmaxf(top, __shfl_xor_sync(~0u, top, L / 4)));
        const float shrink = exp2f(m[g] - top);
        p[g] = mine < tokens ? exp2f(k - top) : 0.0f;
        sum[g] = fmaf(sum[g], shrink, p[g]);
        m[g] = top;
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[g][e] *= shrink;
      }
      at = in.wait() + (side * kTokens * heads + local) * (K * 2);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (t < tokens) v = lds128(at + t * row_bytes + l * 16);
        const int source = (lane & ~(L - 1)) | (t >> 1) * (L / 2) | (t & 1) * (L / 4);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          const float pt = __shfl_sync(~0u, p[g], source);
          acc[g][0] = fmaf(low(v.x), pt, acc[g][0]), acc[g][1] = fmaf(high(v.x), pt, acc[g][1]);
          acc[g][2] = fmaf(low(v.y), pt, acc[g][2]), acc[g][3] = fmaf(high(v.y), pt, acc[g][3]);
          acc[g][4] = fmaf(low(v.z), pt, acc[g][4]), acc[g][5] = fmaf(high(v.z), pt, acc[g][5]);
          acc[g][6] = fmaf(low(v.w), pt, acc[g][6]), acc[g][7] = fmaf(high(v.w), pt, acc[g][7]);
        }
      }
      in.release();
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float total = sum[g] + __shfl_xor_sync(~0u, sum[g], L / 2);
      total += __shfl_xor_sync(~0u, total, L / 4);
      if (!works) continue;
      const int64_t part = ((static_cast<int64_t>(blockIdx.x) + n) * a.Hq + head * kGroup + g) * layout.side + side;
      if (l == 0) part_ml[part] = make_float2(m[g], total);
      float4* out = reinterpret_cast<float4*>(part_o + part * K + 8 * l);
      out[0] = make_float4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]);
      out[1] = make_float4(acc[g][4], acc[g][5], acc[g][6], acc[g][7]);
    }
  });
}

template <int K, int kGroup>
__global__ void __launch_bounds__(kThreads, 1) shares_kernel(const __grid_constant__ OryxDecodeAttention a, float2* part_ml, float* part_o) {
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 127) & ~static_cast<uintptr_t>(127));
  const Layout layout(a.Hk, kSlots<K>);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(smem_address(s.full + i), 1), barrier_init(smem_address(s.empty + i), kWarps);
    barrier_init_fence();
  }
  launch_dependents();
  wait_for_previous();
  if (a.wanted != nullptr) {
    bool any = false;
    for (int n = threadIdx.x; n < a.N; n += kThreads) any |= a.wanted[n] != 0;
    if (__syncthreads_or(any) == 0) return;
  }
  if (threadIdx.x >= kConsumers) find_share(a, layout.piece, s);
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    produce<K>(a, s, layout);
  } else {
    consume<K, kGroup>(a, s, layout, part_ml, part_o);
  }
}

// The shares that met a sequence, in order; a block has some of its query heads. kJoin groups of K threads sum every kJoin-th partial.
constexpr int kJoin = 4, kMostShares = 160;

template <int K>
__global__ void __launch_bounds__(kJoin * K) join_kernel(const __grid_constant__ OryxDecodeAttention a, int shares, int heads, const float2* part_ml, const float* part_o) {
  constexpr int kJoinThreads = kJoin * K, kWarpsHere = kJoinThreads / 32;
  __shared__ int64_t sums[2][kWarpsHere];
  __shared__ int rows[kMostShares];  // of this sequence's partials: share + sequence
  __shared__ int count;
  __shared__ float tops[kWarpsHere], totals[kJoin], squares[K / 32], outputs[kJoin][K];
  const int n = blockIdx.y, t = threadIdx.x, lane = t % 32, warp = t / 32, first_head = blockIdx.x * heads;
  launch_dependents();
  wait_for_previous();
  const Layout layout(a.Hk, kSlots<K>);
  const int own = pieces_of(visible(a, n), layout.piece);
  if (own == 0) {
    if (a.gate == nullptr) {
      for (int i = t; i < heads * K; i += kJoinThreads) static_cast<bf16*>(a.o)[(n * a.Hq + first_head) * K + i] = __float2bfloat16_rn(0.0f);
    }
    return;
  }
  int64_t before = 0, total = 0;
  for (int i = t; i < a.N; i += kJoinThreads) {
    const int pieces = pieces_of(visible(a, i), layout.piece);
    total += pieces, before += i < n ? pieces : 0;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) before += __shfl_xor_sync(~0u, before, d), total += __shfl_xor_sync(~0u, total, d);
  if (lane == 0) sums[0][warp] = before, sums[1][warp] = total;
  __syncthreads();
  before = total = 0;
#pragma unroll
  for (int w = 0; w < kWarpsHere; ++w) before += sums[0][w], total += sums[1][w];
  // Share c has pieces [total c / shares, total (c + 1) / shares): none where there are fewer pieces than shares.
  if (warp == 0) {
    int found = 0;
    for (int base = 0; base < shares; base += 32) {
      const int64_t c = base + lane, from = total * c / shares, to = total * (c + 1) / shares;
      const bool meets = c < shares && from < to && from < before + own && to > before;
      const uint32_t mask = __ballot_sync(~0u, meets);
      if (meets) rows[found + __popc(mask & ((1u << lane) - 1))] = static_cast<int>(c) + n;
      found += __popc(mask);
    }
    if (lane == 0) count = found;
  }
  __syncthreads();
  const int parts = count * layout.side;
  for (int head = first_head; head < first_head + heads; ++head) {
    const auto place_of = [&](int i) { return (static_cast<int64_t>(rows[i / layout.side]) * a.Hq + head) * layout.side + i % layout.side; };
    float top = kLowest;
    for (int i = t; i < parts; i += kJoinThreads) top = fmaxf(top, __ldcg(&part_ml[place_of(i)]).x);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    if (lane == 0) tops[warp] = top;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarpsHere; ++w) top = fmaxf(top, tops[w]);
    const int group = t / K, column = t % K;
    float x = 0.0f, sum = 0.0f;
#pragma unroll 8
    for (int i = group; i < parts; i += kJoin) {
      const int64_t part = place_of(i);
      const float2 ml = __ldcg(part_ml + part);
      const float e = exp2f(ml.x - top);
      x = fmaf(e, __ldcg(part_o + part * K + column), x), sum = fmaf(e, ml.y, sum);
    }
    outputs[group][column] = x;
    if (column == 0) totals[group] = sum;
    __syncthreads();
    if (t < K) {
      x = sum = 0.0f;
#pragma unroll
      for (int g = 0; g < kJoin; ++g) x += outputs[g][t], sum += totals[g];
      x /= sum;
      if (a.gate == nullptr) {
        static_cast<bf16*>(a.o)[(n * a.Hq + head) * K + t] = __float2bfloat16_rn(x);
      } else {
        float square = x * x;
#pragma unroll
        for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
        if (lane == 0) squares[warp] = square;
        named_barrier(1, K);
        square = 0.0f;
#pragma unroll
        for (int w = 0; w < K / 32; ++w) square += squares[w];
        const float gate = __bfloat162float(static_cast<const bf16*>(a.gate)[n * a.gate_row + head * K + t]);
        x *= rsqrtf(square / K + a.head_norm_eps) * __ldg(a.head_norm + t) * gate / (1.0f + __expf(-gate));
        *activation(a.o, a.o_tiles, n, head * K + t) = __float2bfloat16_rn(x);
      }
    }
    __syncthreads();
  }
}

int shares_of() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return count;
}

template <int K>
int64_t partials(const OryxDecodeAttention& a, int shares) {
  return (shares + a.N) * a.Hq * Layout(a.Hk, kSlots<K>).side;
}

template <int K, int kGroup>
int launch(const OryxDecodeAttention& a, void* workspace, cudaStream_t stream) {
  const int shares = shares_of(), bytes = static_cast<int>(sizeof(Shared)) + 128;
  if (shares == 0 || shares > kMostShares) return cudaErrorInvalidValue;
  const Layout layout(a.Hk, kSlots<K>);
  float2* ml = static_cast<float2*>(workspace);
  float* o = reinterpret_cast<float*>(ml + (partials<K>(a, shares) + 1) / 2 * 2);
  const auto kernel = shares_kernel<K, kGroup>;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  if (const int e = launch_after(kernel, dim3(shares, layout.groups), kThreads, bytes, stream, a, ml, o); e != cudaSuccess) return e;
  const int heads = a.N >= 16 && a.Hq % 4 == 0 ? 4 : 1;  // of a block: few long sequences want many blocks, many sequences few
  return launch_after(join_kernel<K>, dim3(static_cast<unsigned>(a.Hq / heads), static_cast<unsigned>(a.N)), kJoin * K, 0, stream, a, shares, heads, ml, o);
}

template <int K>
int by_group(const OryxDecodeAttention& a, void* workspace, cudaStream_t stream) {
  switch (a.Hq / a.Hk) {
    case 1: return launch<K, 1>(a, workspace, stream);
    case 2: return launch<K, 2>(a, workspace, stream);
    case 4: return launch<K, 4>(a, workspace, stream);
    case 8: return launch<K, 8>(a, workspace, stream);
    default: return cudaErrorInvalidValue;
  }
}

bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

}  // namespace
}  // namespace oryx::decode_attention_cuda

using namespace oryx::decode_attention_cuda;

extern "C" int oryx_decode_attention_supports(const OryxDecodeAttention* a) {
  const int64_t group = a->Hk > 0 ? a->Hq / a->Hk : 0;
  const auto strides = [](int64_t row, int64_t token) { return row % 8 == 0 && token % 8 == 0; };
  return (a->K == 64 || a->K == 128) && a->V == a->K && (group == 1 || group == 2 || group == 4 || group == 8) && a->key_head == a->K && a->value_head == a->V &&
         strides(a->key_row, a->key_token) && strides(a->value_row, a->value_token) && (a->rope == nullptr || a->rotated == a->K) && aligned(a->q) && a->q_row % 4 == 0 &&
         aligned(a->keys) && aligned(a->values) && a->N <= 65535;
}

extern "C" int64_t oryx_decode_attention_workspace(const OryxDecodeAttention* a) {
  const int shares = shares_of();
  const int64_t count = a->K == 64 ? partials<64>(*a, shares) : partials<128>(*a, shares);
  return ((count + 1) / 2 * 2) * 8 + count * a->K * 4;
}

extern "C" int oryx_decode_attention(const OryxDecodeAttention* a, void* workspace, void* stream) {
  if (a->N == 0) return cudaSuccess;
  return a->K == 64 ? by_group<64>(*a, workspace, static_cast<cudaStream_t>(stream)) : by_group<128>(*a, workspace, static_cast<cudaStream_t>(stream));
}
