// What precedes and follows the backward pass's main kernel: the key blocks are planned and the slots' queries gathered; dq is rounded and scattered.
#pragma once

#include "oryx/ops/span_attention/cuda/span_attention_plan.cuh"
#include "oryx/ops/span_attention/cuda/span_attention_products.cuh"

namespace oryx::span_attention_cuda {
namespace {

constexpr int kStages = 2;
constexpr int kStatsBytes = 784, kStatsStride = 896;  // lse[64], delta[64], position[64], first and last position
constexpr int kWorkWords = 10, kWorkStride = 48;       // of an item

struct Arguments {
  Plan plan;
  const __nv_bfloat16 *q, *o, *d_o;
  const float* lse;
  __nv_bfloat16 *dq, *dk, *dv;
  char* records;
  float* dq_sum;
  int* turns;        // [Hq][tiles]
  float* group_sum;  // dv and dk of a half of a key block, as its warpgroup's threads have them: [blocks][Hk][2 halves]
  int* group_turns;  // [blocks][Hk][2]
  int64_t q_row, q_token, q_head;
  int64_t slots;
  int Tq, Tk, Hq, Hk, group, queries, window;
  float scale;
  bool zero;
};

template <int D>
struct Layout {
  static constexpr int kPanels = D / 64;
  static constexpr int kPanel = 128 * 128, kMatrix = kPanels * kPanel;  // keys
  static constexpr int kSmallPanel = 64 * 128, kSmallMatrix = kPanels * kSmallPanel;  // slots
  static constexpr int kHalf = 64 * D * 2;  // of dq in float32, a warpgroup's columns
  static constexpr int kK = 0, kV = kMatrix, kQ = 2 * kMatrix, kDo = kQ + kStages * kSmallMatrix, kDs = kDo + kStages * kSmallMatrix;
  static constexpr int kDq = kDs + 2 * 2 * kSmallPanel, kStats = kDq + 2 * 2 * kHalf, kWork = kStats + kStages * kStatsStride;
  static constexpr int kBarriers = kWork + 2 * kWorkStride, kBytes = kWork + 256 + 1024;
  static constexpr int kRecord = 2 * kSmallMatrix + 1024;
};

// The key blocks, each with the tiles of slots that see it.
__device__ void plan_blocks(const Arguments& a) {
  const Sequence* seq = a.plan.sequences;
  const int blocks = a.plan.counts->blocks;
  for (int b = blockIdx.x * blockDim.x + threadIdx.x; b < blocks; b += gridDim.x * blockDim.x) {
    int s = 0, end = a.plan.sequence_count;
    while (end - s > 1) {
      const int mid = (s + end) / 2;
      if (seq[mid].block <= b) s = mid;
      else end = mid;
    }
    const Sequence r = seq[s];
    const int n = b - r.block, small = (r.count + kSmall - 1) / kSmall;
    const auto position = [&](int i) { return a.plan.rows[r.slot + min(i, r.count - 1)] - r.q_begin + r.shift; };
    int lo = 0, hi = small;  // the first tile whose last query stands at the block or beyond
    while (lo < hi) {
      const int mid = (lo + hi) / 2;
      if (position(mid * kSmall + kSmall - 1) >= n * kKeys) hi = mid;
      else lo = mid + 1;
    }
    KeyBlock x{s, n, lo, small};
    if (a.window > 0) {  // the first tile whose first query sees no key of the block any more
      hi = small;
      while (lo < hi) {
        const int mid = (lo + hi) / 2;
        if (position(mid * kSmall) - a.window + 1 >= (n + 1) * kKeys) hi = mid;
        else lo = mid + 1;
      }
      x.end = lo;
    }
    a.plan.blocks[b] = x;
    if (r.split) {
      for (int i = 0; i < 2 * a.Hk; ++i) a.group_turns[2 * a.Hk * b + i] = 0;
    }
  }
}

template <int D>
__global__ void __launch_bounds__(256) prepare_kernel(const Arguments a) {
  using L = Layout<D>;
  const int m = blockIdx.x, head = static_cast<int>(blockIdx.y) - 1, thread = threadIdx.x;
  if (head < 0) {
    if (m == 0 && thread == 0) a.plan.counts->next_block = 0;
    plan_blocks(a);
    return;
  }
  if (m >= a.plan.counts->small) return;
  char* record = a.records + (head * (a.slots / kSmall) + m) * L::kRecord;
  float* stats = reinterpret_cast<float*>(record + 2 * L::kSmallMatrix);
  constexpr int kLanes = D / 8;  // threads of a row, 16 bytes each
  const int unit = thread % kLanes;
#pragma unroll 2
  for (int r = thread / kLanes; r < kSmall; r += 256 / kLanes) {
    const int g = a.plan.rows[m * kSmall + r];
    uint4 q = make_uint4(0, 0, 0, 0), d_o = q, o = q;
    if (g >= 0) {
      const size_t at = (static_cast<size_t>(g) * a.Hq + head) * D + unit * 8;
      q = *reinterpret_cast<const uint4*>(a.q + g / a.Tq * a.q_row + g % a.Tq * a.q_token + head * a.q_head + unit * 8);
      d_o = *reinterpret_cast<const uint4*>(a.d_o + at);
      o = *reinterpret_cast<const uint4*>(a.o + at);
    }
    const int to = unit / 8 * L::kSmallPanel + r * 128 + ((unit % 8 ^ r % 8) << 4);
    *reinterpret_cast<uint4*>(record + to) = q;
    *reinterpret_cast<uint4*>(record + L::kSmallMatrix + to) = d_o;
    const uint32_t x[4] = {o.x, o.y, o.z, o.w}, y[4] = {d_o.x, d_o.y, d_o.z, d_o.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += low(x[i]) * low(y[i]) + high(x[i]) * high(y[i]);
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (unit == 0) {
      stats[64 + r] = sum;
      stats[r] = g >= 0 ? a.lse[head * a.slots + m * kSmall + r] : INFINITY;
    }
  }
  if (thread >= kSmall) return;
  if (thread == 0) a.turns[head * (a.slots / kSmall) + m] = 0;
  // Positions: the sequence is the last whose slots begin at the tile or before it.
  int lo = 0, hi = a.plan.sequence_count;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (a.plan.sequences[mid].small <= m) lo = mid;
    else hi = mid;
  }
  const Sequence s = a.plan.sequences[lo];
  const int g = a.plan.rows[m * kSmall + thread], first = (m - s.small) * kSmall;
  int* positions = reinterpret_cast<int*>(stats) + 128;
  positions[thread] = g >= 0 ? g - s.q_begin + s.shift : -1;
  if (thread == 0) positions[64] = a.plan.rows[m * kSmall] - s.q_begin + s.shift;
  if (thread == 1) positions[65] = a.plan.rows[s.slot + min(first + kSmall, s.count) - 1] - s.q_begin + s.shift;
}

// dq of the slots, rounded, to its rows.
template <int D>
__global__ void __launch_bounds__(256) finish_kernel(const Arguments a) {
  constexpr int kRow = D / 2 + 4;  // words of a row in shared memory
  __shared__ __align__(16) uint32_t tile[kSmall * kRow];
  const int m = blockIdx.x, head = blockIdx.y, thread = threadIdx.x;
  if (m >= a.plan.counts->small) return;
  const float4* from = reinterpret_cast<const float4*>(a.dq_sum + (head * (a.slots / kSmall) + m) * kSmall * D);
  const int half = thread / 128, t = thread % 128, row = t / 32 * 16 + t % 32 / 4, column = half * D / 2 + 2 * (t % 4);
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const float4 x = from[half * (D / 16) * 128 + i * 128 + t];
    tile[row * kRow + (column + 8 * i) / 2] = pack(x.x * a.scale, x.y * a.scale);
    tile[(row + 8) * kRow + (column + 8 * i) / 2] = pack(x.z * a.scale, x.w * a.scale);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const int r = (thread + 256 * i) / (D / 8), unit = (thread + 256 * i) % (D / 8), g = a.plan.rows[m * kSmall + r];
    if (g < 0) continue;
    *reinterpret_cast<uint4*>(a.dq + (static_cast<size_t>(g) * a.Hq + head) * D + unit * 8) = *reinterpret_cast<uint4*>(tile + r * kRow + unit * 4);
  }
}

}  // namespace
}  // namespace oryx::span_attention_cuda
