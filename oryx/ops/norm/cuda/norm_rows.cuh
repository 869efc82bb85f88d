// The forward pass of RMSNorm and its forms over rows of whole packets: a row is read once, held in registers and written once.
//
// A row belongs to a team of threads, each with kPackets packets of it, as many apart as the team has threads; a block has one team or several. No thread
// reads ahead: what a warp does not have in flight, the others of a full multiprocessor have. What counts beyond the bytes is
//   - the code, which comes from device memory when a kernel runs behind others: one shape and one dtype of weights a kernel, 2 to 6 KB;
//   - 1 / rms: four bytes a row are a partial write each; those of a block of several short rows are gathered and written together.
#pragma once

#include "oryx/ops/norm/cuda/norm_common.cuh"

namespace oryx::ops::cuda {
namespace {

constexpr int kMaxRowThreads = 1024;

// Sum over the team of this thread, called once. kTeam 0: the block, of any number of warps.
template <int kTeam, int kBlock>
__device__ __forceinline__ float row_total(float x) {
  x = warp_sum<(kTeam == 0 || kTeam > 32 ? 32 : kTeam)>(x);
  if constexpr (kTeam == 0 || kTeam > 32) {
    __shared__ float sums[kBlock / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    if constexpr (kTeam == 0) {
      x = warp_sum<32>(lane < static_cast<int>(blockDim.x / 32) ? sums[lane] : 0.0f);
    } else {
      constexpr int kWarps = kTeam / 32;
      const int first = kTeam == kBlock ? 0 : warp / kWarps * kWarps;
      x = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) x += sums[first + i];
    }
  }
  return x;
}

// W: of the weights, which begin at a multiple of 16 bytes. kExact: a row is as many packets as the team holds. kTeam 0: the block, of up to kBlock threads.
template <typename T, typename W, int kForm, int kTeam, int kPackets, int kBlock, bool kExact>
__global__ __launch_bounds__(kBlock) void norm_rows(const Forward a) {
  constexpr int V = kLanes<T>, kTeams = kTeam == 0 ? 1 : kBlock / kTeam;
  constexpr bool kGather = kTeams > 1 && kTeam <= 32;
  constexpr bool kSecond = kForm != kPlain;  // a residual or a gate
  const int size = kTeam == 0 ? static_cast<int>(blockDim.x) : kTeam;
  const int lane = kTeams == 1 ? threadIdx.x : threadIdx.x % size, team = kTeams == 1 ? 0 : threadIdx.x / size;
  const int packets = static_cast<int>(a.dim) / V;
  const unsigned rows = static_cast<unsigned>(a.rows), mine = blockIdx.x * kTeams + team;
  const bool in = kTeams == 1 || mine < rows;
  const unsigned row = in ? mine : rows - 1;  // read, not written
  const int64_t at = row * a.dim + lane * V;
  const T *from = static_cast<const T*>(a.x) + at, *second = static_cast<const T*>(kForm == kAdd ? a.residual : a.gate) + at;
  const auto inside = [&](int p) { return kExact || lane + p * size < packets; };
  Packet<T, V> x[kPackets], other[kSecond ? kPackets : 1];
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    if constexpr (!kExact) {
      x[p].zero();
      if constexpr (kSecond) other[p].zero();
    }
    if (inside(p)) {
      x[p].load(from + p * size * V);
      if constexpr (kSecond) other[p].load(second + p * size * V);
    }
  }
  // The value that is normalised: x, x + residual, or x silu(gate).
  const auto value = [&](int p, float(&v)[V]) {
    x[p].unpack(v);
    if constexpr (kForm == kAdd || kForm == kGateFirst) {
      float o[V];
      other[p].unpack(o);
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = kForm == kAdd ? v[e] + o[e] : v[e] * silu(o[e]);
    }
  };
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    float v[V];
    value(p, v);
#pragma unroll
    for (int e = 0; e < V; ++e) squares += v[e] * v[e];
  }
  const float rstd = rsqrtf(row_total<kTeam, kBlock>(squares) * a.inverse_dim + a.eps);
  __shared__ float gathered[kGather ? kTeams : 1];
  if (lane == 0) {
    if constexpr (kGather) gathered[team] = rstd;
    if (!kGather && in) a.rstd[row] = rstd;
  }
  const W* weight = static_cast<const W*>(a.weight) + lane * V;
  if (a.groups != 1) weight += row % static_cast<unsigned>(a.groups) * a.dim;
  T *y = static_cast<T*>(a.y) + at, *sum = static_cast<T*>(a.sum) + at;
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    if (!in || !inside(p)) break;
    float v[V], w[V];
    value(p, v);
    load_weights(weight + p * size * V, w);
    Packet<T, V> out;
    if constexpr (kForm == kAdd) {
      out.pack(v);
      out.store(sum + p * size * V);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] *= rstd * (w[e] + a.weight_offset);
    if constexpr (kForm == kGateAfter) {
      float g[V];
      other[p].unpack(g);
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] *= silu(g[e]);
    }
    out.pack(v);
    out.store(y + p * size * V);
  }
  if constexpr (kGather) {
    __syncthreads();
    const unsigned next = blockIdx.x * kTeams + threadIdx.x;
    if (threadIdx.x < kTeams && next < rows) a.rstd[next] = gathered[threadIdx.x];
  }
}

template <typename T, typename W, int kForm, int kTeam, int kPackets, int kBlock, bool kExact>
void norm_rows(const Forward& a, cudaStream_t stream) {
  constexpr int64_t kTeams = kBlock / kTeam;
  norm_rows<T, W, kForm, kTeam, kPackets, kBlock, kExact><<<static_cast<unsigned>((a.rows + kTeams - 1) / kTeams), kBlock, 0, stream>>>(a);
}

// Plain rows of 65 to 96 packets: a row to 16 threads of 6 packets. It reads each packet's weights, of either dtype, before it writes that packet, and not
// all of them before the first: 38.3 to 38.5 us at 32768 x 768 where every form of norm_rows takes 39.3 or more.
template <typename T>
__global__ __launch_bounds__(kThreads) void norm_half_warps(const Forward a) {
  constexpr int V = kLanes<T>, kTeam = 16, kPackets = 6, kTeams = kThreads / kTeam;
  const int lane = threadIdx.x % kTeam, packets = static_cast<int>(a.dim / V);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / kTeam;
  Packet<T, V> x[kPackets];
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    const int i = lane + p * kTeam;
    x[p].zero();
    if (row < a.rows && i < packets) x[p].load(static_cast<const T*>(a.x) + row * a.dim + i * V);
  }
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    float v[V];
    x[p].unpack(v);
#pragma unroll
    for (int e = 0; e < V; ++e) squares += v[e] * v[e];
  }
  squares = warp_sum<kTeam>(squares);
  if (row >= a.rows) return;
  const float rstd = rsqrtf(squares / static_cast<float>(a.dim) + a.eps);
  if (lane == 0) a.rstd[row] = rstd;
  const int64_t weights = a.groups == 1 ? 0 : row % a.groups * a.dim;
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    const int i = lane + p * kTeam;
    if (i >= packets) break;
    float v[V], w[V];
    x[p].unpack(v);
    load_any(a.weight, a.weight_dtype, weights + i * V, w);
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] *= rstd * (w[e] + a.weight_offset);
    Packet<T, V> out;
    out.pack(v);
    out.store(static_cast<T*>(a.y) + row * a.dim + i * V);
  }
}
template <typename T>
void norm_half_warps(const Forward& a, cudaStream_t stream) {
  constexpr int64_t kTeams = kThreads / 16;
  norm_half_warps<T><<<static_cast<unsigned>((a.rows + kTeams - 1) / kTeams), kThreads, 0, stream>>>(a);
}

// A block a row, of any number of packets up to kPackets kMaxRowThreads.
template <typename T, typename W, int kForm, int kPackets>
void norm_long_rows(const Forward& a, cudaStream_t stream) {
  const int64_t packets = a.dim / kLanes<T>, warps = (packets + 32 * kPackets - 1) / (32 * kPackets);
  norm_rows<T, W, kForm, 0, kPackets, kMaxRowThreads, false><<<static_cast<unsigned>(a.rows), static_cast<unsigned>(warps * 32), 0, stream>>>(a);
}

constexpr int64_t kMostRowPackets = 4 * kMaxRowThreads;
template <typename T, typename W, int kForm>
void norm_rows(const Forward& a, cudaStream_t stream) {
  const int64_t packets = a.dim / kLanes<T>;
  if constexpr (sizeof(T) == 2) {  // lengths that models have
    if (packets == 8) return norm_rows<T, W, kForm, 8, 1, 128, true>(a, stream);
    if (packets == 16) return norm_rows<T, W, kForm, 16, 1, 256, true>(a, stream);
    if (packets == 32) return norm_rows<T, W, kForm, 32, 1, 256, true>(a, stream);
    if (packets == 64) return norm_rows<T, W, kForm, 32, 2, 128, true>(a, stream);
    if constexpr (kForm == kPlain) {
      if (packets > 64 && packets <= 96) return norm_half_warps<T>(a, stream);
    }
    if (packets == 96) return norm_rows<T, W, kForm, 32, 3, 256, true>(a, stream);
    if (packets == 128) return norm_rows<T, W, kForm, 128, 1, 256, true>(a, stream);
    if (packets == 192) return norm_rows<T, W, kForm, 192, 1, 192, true>(a, stream);
    if (packets == 256) return norm_rows<T, W, kForm, 256, 1, 256, true>(a, stream);
    if (packets == 512) return norm_rows<T, W, kForm, 256, 2, 256, true>(a, stream);
    if (packets == 640) return norm_rows<T, W, kForm, 320, 2, 320, true>(a, stream);
  }
  if (packets <= 8) return norm_rows<T, W, kForm, 8, 1, 128, false>(a, stream);
  if (packets <= 16) return norm_rows<T, W, kForm, 16, 1, 256, false>(a, stream);
  if (packets <= 32) return norm_rows<T, W, kForm, 32, 1, 256, false>(a, stream);
  if (packets <= 64) return norm_rows<T, W, kForm, 32, 2, 128, false>(a, stream);
  if (packets <= 256) return norm_long_rows<T, W, kForm, 1>(a, stream);
  if (packets <= 1024) return norm_long_rows<T, W, kForm, 2>(a, stream);
  norm_long_rows<T, W, kForm, 4>(a, stream);
}

}  // namespace
}  // namespace oryx::ops::cuda
