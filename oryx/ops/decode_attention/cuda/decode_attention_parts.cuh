// What the two forms of decode attention share (decode_attention.cu): how cached tokens are cut to pieces and shared out, and the ring through which they come.
#pragma once

#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/cuda/fragments.cuh"
#include "oryx/ops/cuda/hopper.cuh"
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/decode_attention/cuda/decode_attention_seen.cuh"

namespace oryx::decode_attention_cuda {
namespace {

using namespace oryx::hopper;
using namespace oryx::ops::cuda;
using bf16 = __nv_bfloat16;

// Warps that compute, with one query head a key head and with several; one more copies.
constexpr int kSingleWarps = 8, kGroupedWarps = 8;
constexpr int kRingBytes = 8 * 16384, kMostStages = 8;  // more on their way make multiprocessors unequal
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLowest = -1e30f;

struct __align__(128) Shared {
  uint8_t ring[kRingBytes];
  uint64_t full[kMostStages], empty[kMostStages];
  int begin, end;     // of this share, in pieces of all sequences
  int pieces_before;  // of the sequences before this share's first
  int first;          // sequence
  // Of decode_attention_grouped.cuh: turned queries, as each lane wants them, and rows of the table of angles.
  alignas(16) uint4 queries[kGroupedWarps][128];
  alignas(16) float steps[2][128];
};

// How a block's warps divide a piece: into slots, each of which takes one key head of `tokens` tokens side by side.
struct Layout {
  int heads, side, groups, piece;  // key heads of a block, slots of the same head, blocks for all heads, tokens of a piece
  __host__ __device__ Layout(int64_t Hk, int slots, int tokens) {
    heads = static_cast<int>(Hk < slots ? Hk : slots), side = slots / heads;
    groups = static_cast<int>((Hk + slots - 1) / slots), piece = side * tokens;
  }
};

// First sequence of this share and the pieces before it, by one warp.
__device__ void find_share(const OryxDecodeAttention& a, int piece, Shared& s) {
  const int lane = threadIdx.x & 31, N = static_cast<int>(a.N);
  int64_t total = 0;
  for (int n = lane; n < N; n += 32) total += visible(a, n).pieces(piece);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(~0u, total, d);
  const int64_t begin = total * blockIdx.x / gridDim.x;
  int64_t before = 0;
  int first = N;
  for (int base = 0; base < N; base += 32) {
    const int n = base + lane;
    int64_t mine = n < N ? visible(a, n).pieces(piece) : 0, sum = mine;
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
  if (lane == 0) {
    s.begin = static_cast<int>(begin), s.end = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
    s.first = first, s.pieces_before = static_cast<int>(before);
  }
}

// f(sequence, range, first piece, last piece) for the parts of this share.
template <typename F>
__device__ __forceinline__ void for_each_part(const OryxDecodeAttention& a, const Shared& s, int piece, F f) {
  int at = s.begin, before = s.pieces_before;
  const int end = s.end;
  for (int n = s.first; at < end; ++n) {
    const Range r = visible(a, n);
    const int count = r.pieces(piece);
    if (count == 0) continue;
    const int from = at - before, to = min(end - before, count);
    f(n, r, from, to);
    at += to - from;
    before += count;
  }
}

template <int kStageBytes>
struct Ring {
  static constexpr int kStages = kRingBytes / kStageBytes;
  static_assert(kStages <= kMostStages);
  uint32_t base, full, empty;
  int stage = 0;
  uint32_t phase = 0;
  __device__ explicit Ring(Shared& s) : base(smem_address(s.ring)), full(smem_address(s.full)), empty(smem_address(s.empty)) {}
  __device__ __forceinline__ uint32_t slot() const { return base + stage * kStageBytes; }
  __device__ __forceinline__ void step() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ uint32_t wait() const {
    barrier_wait(full + 8 * stage, phase);
    return slot();
  }
  __device__ __forceinline__ void release() {
    __syncwarp();
    barrier_arrive_warp(empty + 8 * stage, threadIdx.x & 31);
    step();
  }
};

template <int K, int kStageBytes>
__device__ void produce(const OryxDecodeAttention& a, Shared& s, const Layout& layout) {
  const int lane = threadIdx.x & 31, head = blockIdx.y * layout.heads, heads = min(layout.heads, static_cast<int>(a.Hk) - head);
  const int row_bytes = heads * K * 2, piece = layout.piece;
  const bool dense = heads == a.Hk && a.key_token == a.Hk * K && a.value_token == a.Hk * K;
  Ring<kStageBytes> ring(s);
  for_each_part(a, s, piece, [&](int n, Range r, int from, int to) {
    for (int i = from; i < to; ++i) {
      const int first = r.first_of(i, piece), tokens = min(piece, r.end_of(i, piece) - first);
      // Tokens that lie side by side are one copy: where rows are dense those of a page, or all.
      const int together = !dense ? 1 : a.blocks == nullptr ? tokens : static_cast<int>(a.page), into = a.blocks == nullptr ? 0 : first % together;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const bf16* from_rows = static_cast<const bf16*>(part == 0 ? a.keys : a.values) + head * K;
        const int64_t row = part == 0 ? a.key_row : a.value_row, step = part == 0 ? a.key_token : a.value_token;
        barrier_wait(ring.empty + 8 * ring.stage, ring.phase ^ 1);
        const uint32_t full = ring.full + 8 * ring.stage;
        if (lane == 0) barrier_expect(full, tokens * row_bytes);
        __syncwarp();
        for (int c = lane; c * together < into + tokens; c += 32) {
          const int t = max(c * together - into, 0), count = min((c + 1) * together - into, tokens) - t;
          bulk_load(ring.slot() + t * row_bytes, from_rows + place(a, n, first + t, row, step), count * row_bytes, full);
        }
        ring.step();
      }
    }
  });
}

}  // namespace
}  // namespace oryx::decode_attention_cuda
