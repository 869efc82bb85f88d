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

template <int kPackets, int V>
__device__ __forceinline__ void stream_weights(const void* weight, int dtype, float offset, int lane, int threads, int packets,
                                               float (&w)[kPackets][V]) {
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    const int i = lane + p * threads;
#pragma unroll
    for (int e = 0; e < V; ++e) w[p][e] = 0.0f;
    if (i >= packets) continue;
    load_any(weight, dtype, static_cast<int64_t>(i) * V, w[p]);
#pragma unroll
    for (int e = 0; e < V; ++e) w[p][e] += offset;
  }
}

// With n = x rstd: d_x = rstd (d_y w - n mean(d_y w n)) (+ d_sum), d_w = sum over rows of d_y n.
template <typename T, bool kWarp, int kPackets, int kBlocks, bool kSum>
__global__ __launch_bounds__(kWarp ? kStreamWarpThreads : kMaxStreamThreads, kBlocks) void norm_backward_stream(const Backward a) {
  constexpr int V = kLanes<T>;
  const Place<kWarp> me;
  const int packets = static_cast<int>(a.dim / V);
  const int64_t step = static_cast<int64_t>(gridDim.x) * me.teams;
  Packet<T, V> next_dy[kPackets], next_x[kPackets], next_sum[kSum ? kPackets : 1];
  float next_rstd = 0.0f;
  // A warp's loads leave together, without branches: behind the last row or packet a valid one is read again (its weight is 0). In a block's row
  // the addresses that takes would be registers too many.
  const auto fetch = [&](int64_t row) {
    if (row >= a.rows) {
      if (!kWarp) return;
      row = a.rows - 1;
    }
    next_rstd = load_read_only(a.rstd + row);
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      int i = me.lane + p * me.threads;
      if (i >= packets) {
        if (!kWarp) break;
        i = 0;
      }
      const int64_t at = row * a.dim + i * V;
      next_dy[p].load(static_cast<const T*>(a.d_y) + at);
      next_x[p].load(static_cast<const T*>(a.x) + at);
      if constexpr (kSum) next_sum[p].load(static_cast<const T*>(a.d_sum) + at);
    }
  };
#pragma unroll
  for (int p = 0; p < kPackets; ++p) next_dy[p].zero(), next_x[p].zero();
  int64_t row = static_cast<int64_t>(blockIdx.x) * me.teams + me.team;
  fetch(row);
  float w[kPackets][V], d_w[kPackets][V] = {};
  stream_weights(a.weight, a.weight_dtype, a.weight_offset, me.lane, me.threads, packets, w);
  const float inverse_dim = 1.0f / static_cast<float>(a.dim);
#pragma unroll 1
  for (int parity = 0; row < a.rows; row += step, parity ^= 1) {
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
    const float mean = row_sum<kWarp>(dot, parity) * rstd * inverse_dim * rstd * rstd;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int i = me.lane + p * me.threads;
      if (!kWarp && i >= packets) break;
      float d[V], v[V], s[V] = {};
      dy[p].unpack(d), x[p].unpack(v);
      if constexpr (kSum) sum[p].unpack(s);
#pragma unroll
      for (int e = 0; e < V; ++e) d[e] = s[e] + (d[e] * w[p][e] * rstd - v[e] * mean);
      Packet<T, V> out;
      out.pack(d);
      if (i < packets) out.store(static_cast<T*>(a.d_x) + row * a.dim + i * V);
    }
  }
  launch_dependents();
  float* to = a.partial + static_cast<int64_t>(blockIdx.x) * a.dim;
  if constexpr (kWarp) {  // the warps of the block, one after the other
    __shared__ float total[kStreamWarpThreads / 32][32 * kPackets * V];
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
#pragma unroll
      for (int e = 0; e < V; ++e) total[me.team][(p * V + e) * 32 + me.lane] = d_w[p][e];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < a.dim; c += blockDim.x) {
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
  if (packets <= 16 || packets > 1024) return {0, 0, 0};
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

template <typename T, bool kSum>
void norm_backward_stream(const Backward& a, const StreamPlan& plan, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(plan.blocks), threads = static_cast<unsigned>(plan.threads);
  if (a.dim / kLanes<T> <= kMostWarpPackets) {
    if (plan.packets == 1) norm_backward_stream<T, true, 1, 3, kSum><<<blocks, threads, 0, stream>>>(a);
    if (plan.packets == 2) norm_backward_stream<T, true, 2, 3, kSum><<<blocks, threads, 0, stream>>>(a);
    if (plan.packets == 3) norm_backward_stream<T, true, 3, 3, kSum><<<blocks, threads, 0, stream>>>(a);
    if (plan.packets == 4) norm_backward_stream<T, true, 4, 2, kSum><<<blocks, threads, 0, stream>>>(a);
  } else if (plan.packets == 3) {
    norm_backward_stream<T, false, 3, 1, kSum><<<blocks, threads, 0, stream>>>(a);
  } else if constexpr (!kSum) {
    norm_backward_stream<T, false, 4, 1, false><<<blocks, threads, 0, stream>>>(a);
  }
}

}  // namespace
}  // namespace oryx::ops::cuda
