// The backward pass of plain RMSNorm as a stream of rows: what resides on the device at once walks over all rows, with the weights and
// their gradient in registers and the next row's loads in flight while this one is worked on. For one weight group.
//
// A row belongs to a warp (kWarp) or to a block; each thread holds kPackets packets of it, as many apart as threads share the row.
#pragma once

#include "oryx/ops/norm/cuda/norm_common.cuh"

namespace oryx::ops::cuda {
namespace {

constexpr int kMaxStreamThreads = 384, kStreamWarpThreads = 128;

// Sum over the threads of a row. `parity` alternates between calls, so that one barrier a call is enough.
template <bool kWarp>
__device__ __forceinline__ float row_sum(float x, int parity) {
  x = warp_sum<32>(x);
  if constexpr (!kWarp) {
    __shared__ float sums[2][kMaxStreamThreads / 32];
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) sums[parity][threadIdx.x / 32] = x;
    __syncthreads();
    x = warp_sum<16>(lane % 16 < warps ? sums[parity][lane % 16] : 0.0f);
  }
  return x;
}

template <bool kWarp>
struct Place {  // of a thread
  int lane, threads, team, teams;
  __device__ __forceinline__ Place()
      : lane(kWarp ? threadIdx.x % 32 : threadIdx.x),
        threads(kWarp ? 32 : blockDim.x),
        team(kWarp ? threadIdx.x / 32 : 0),
        teams(kWarp ? blockDim.x / 32 : 1) {}
};

template <typename W, int kPackets, int V>
__device__ __forceinline__ void stream_weights(const void* weight, float offset, int lane, int threads, int packets, float (&w)[kPackets][V]) {
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    const int i = lane + p * threads;
#pragma unroll
    for (int e = 0; e < V; ++e) w[p][e] = 0.0f;
    if (i >= packets) continue;
    load_weights(static_cast<const W*>(weight) + i * V, w[p]);
#pragma unroll
    for (int e = 0; e < V; ++e) w[p][e] += offset;
  }
}

// With n = x rstd: d_x = rstd (d_y w - n mean(d_y w n)) (+ d_sum), d_w = sum over rows of d_y n.
// kExact: a row is 32 kPackets packets.
template <typename T, typename W, bool kWarp, bool kExact, int kPackets, int kBlocks, bool kSum>
__global__ __launch_bounds__(kWarp ? kStreamWarpThreads : kMaxStreamThreads, kBlocks) void norm_backward_stream(const Backward a) {
  constexpr int V = kLanes<T>;
  const Place<kWarp> me;
  const int packets = static_cast<int>(a.dim / V), rows = static_cast<int>(a.rows), step = static_cast<int>(gridDim.x) * me.teams;
  const int64_t dim = kExact ? 32 * kPackets * V : a.dim;
  Packet<T, V> next_dy[kPackets], next_x[kPackets], next_sum[kSum ? kPackets : 1];
  float next_rstd = 0.0f;
  // A warp's loads leave together, without branches: behind the last row or packet a valid one is read again (its weight is 0). In a block's row
  // the addresses that takes would be registers too many.
  const auto fetch = [&](int row) {
    if (row >= rows) {
      if (!kWarp) return;
      row = rows - 1;
    }
    next_rstd = load_read_only(a.rstd + row);
    const int64_t at = row * dim + me.lane * V;
    const T *dy = static_cast<const T*>(a.d_y) + at, *x = static_cast<const T*>(a.x) + at, *sum = static_cast<const T*>(a.d_sum) + at;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      int i = p * me.threads * V;
      if (!kExact && me.lane + p * me.threads >= packets) {
        if (!kWarp) break;
        i = -me.lane * V;
      }
      next_dy[p].load(dy + i);
      next_x[p].load(x + i);
      if constexpr (kSum) next_sum[p].load(sum + i);
    }
  };
#pragma unroll
  for (int p = 0; p < kPackets; ++p) next_dy[p].zero(), next_x[p].zero();
  int row = static_cast<int>(blockIdx.x) * me.teams + me.team;
  fetch(row);
  float w[kPackets][V], d_w[kPackets][V] = {};
  stream_weights<W>(a.weight, a.weight_offset, me.lane, me.threads, packets, w);
#pragma unroll 1
  for (int parity = 0; row < rows; row += step, parity ^= 1) {
    Packet<T, V> dy[kPackets], x[kPackets], sum[kSum ? kPackets : 1];
    const float rstd = next_rstd;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      dy[p] = next_dy[p], x[p] = next_x[p];
      if constexpr (kSum) sum[p] = next_sum[p];
    }
    fetch(row + step);
    float dot = 0.0f;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      float d[V], v[V];
      dy[p].unpack(d), x[p].unpack(v);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float share = d[e] * v[e];
        d_w[p][e] += share * rstd;
        dot += share * w[p][e];
      }
    }
    const float mean = row_sum<kWarp>(dot, parity) * rstd * a.inverse_dim * rstd * rstd;
    T* to = static_cast<T*>(a.d_x) + row * dim + me.lane * V;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const bool inside = kExact || me.lane + p * me.threads < packets;
      if (!kWarp && !inside) break;
      float d[V], v[V], s[V] = {};
      dy[p].unpack(d), x[p].unpack(v);
      if constexpr (kSum) sum[p].unpack(s);
#pragma unroll
      for (int e = 0; e < V; ++e) d[e] = s[e] + (d[e] * w[p][e] * rstd - v[e] * mean);
      Packet<T, V> out;
      out.pack(d);
      if (inside) out.store(to + p * me.threads * V);
    }
  }
  launch_dependents();
  float* to = a.partial + static_cast<int64_t>(blockIdx.x) * dim;
  if constexpr (kWarp) {  // the warps of the block, one after the other
    __shared__ float total[kStreamWarpThreads / 32][32 * kPackets * V];
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
#pragma unroll
      for (int e = 0; e < V; ++e) total[me.team][(p * V + e) * 32 + me.lane] = d_w[p][e];
    }
    __syncthreads();
#pragma unroll 1
    for (int c = threadIdx.x; c < static_cast<int>(dim); c += kStreamWarpThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int team = 0; team < kStreamWarpThreads / 32; ++team) sum += total[team][(c / V / 32 * V + c % V) * 32 + c / V % 32];
      to[c] = sum;
    }
  } else {
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int i = me.lane + p * me.threads;
      if (i >= packets) break;
#pragma unroll
      for (int e = 0; e < V; e += 4) {
        *reinterpret_cast<float4*>(to + i * V + e) = make_float4(d_w[p][e], d_w[p][e + 1], d_w[p][e + 2], d_w[p][e + 3]);
      }
    }
  }
}

// How a shape runs: `threads` a block, `packets` a thread; 0 packets: not as a stream. Up to 128 packets a warp takes a row. Fewer threads
// with more packets leave more registers for each, which a d_sum needs.
constexpr int kMostWarpPackets = 128;
struct StreamPlan {
  int packets, threads, blocks;
};
inline StreamPlan stream_plan(int64_t rows, int64_t packets, bool sum) {
  if (packets <= 16 || packets > 1024 || rows > INT32_MAX / 2) return {0, 0, 0};
  StreamPlan plan{3, kStreamWarpThreads, 3};
  if (packets <= kMostWarpPackets) {
    constexpr int kResident[] = {6, 4, 3, 2};  // registers
    plan.packets = static_cast<int>((packets + 31) / 32);
    plan.blocks = kResident[plan.packets - 1];
  } else {
    plan.packets = sum || packets <= 192 ? 3 : 4;
    plan.threads = static_cast<int>((packets + plan.packets * 32 - 1) / (plan.packets * 32) * 32);
    plan.blocks = plan.threads < 320 ? (sum ? 384 : 320) / plan.threads : 1;  // 384 threads of 168 registers are resident
  }
  const int64_t teams = packets <= kMostWarpPackets ? kStreamWarpThreads / 32 : 1, most = (rows + teams - 1) / teams;
  plan.blocks *= multiprocessors();
  if (most < plan.blocks) plan.blocks = static_cast<int>(most);
  return plan;
}

template <typename T, typename W, bool kExact, bool kSum>
void norm_backward_warps(const Backward& a, const StreamPlan& plan, unsigned blocks, unsigned threads, cudaStream_t stream) {
  if (plan.packets == 1) norm_backward_stream<T, W, true, kExact, 1, 3, kSum><<<blocks, threads, 0, stream>>>(a);
  if (plan.packets == 2) norm_backward_stream<T, W, true, kExact, 2, 3, kSum><<<blocks, threads, 0, stream>>>(a);
  if (plan.packets == 3) norm_backward_stream<T, W, true, kExact, 3, 3, kSum><<<blocks, threads, 0, stream>>>(a);
  if (plan.packets == 4) norm_backward_stream<T, W, true, kExact, 4, 2, kSum><<<blocks, threads, 0, stream>>>(a);
}
template <typename T, typename W, bool kSum>
void norm_backward_stream_of(const Backward& a, const StreamPlan& plan, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(plan.blocks), threads = static_cast<unsigned>(plan.threads);
  const int64_t packets = a.dim / kLanes<T>;
  if (packets <= kMostWarpPackets) {
    constexpr bool kExact = sizeof(T) == 2;
    kExact && packets == plan.packets * 32 ? norm_backward_warps<T, W, kExact, kSum>(a, plan, blocks, threads, stream)
                                           : norm_backward_warps<T, W, false, kSum>(a, plan, blocks, threads, stream);
  } else if (plan.packets == 3) {
    norm_backward_stream<T, W, false, false, 3, 1, kSum><<<blocks, threads, 0, stream>>>(a);
  } else if constexpr (!kSum) {
    norm_backward_stream<T, W, false, false, 4, 1, false><<<blocks, threads, 0, stream>>>(a);
  }
}
template <typename T, typename W>
void norm_backward_stream(const Backward& a, const StreamPlan& plan, cudaStream_t stream) {
  a.d_sum != nullptr ? norm_backward_stream_of<T, W, true>(a, plan, stream) : norm_backward_stream_of<T, W, false>(a, plan, stream);
}

}  // namespace
}  // namespace oryx::ops::cuda
