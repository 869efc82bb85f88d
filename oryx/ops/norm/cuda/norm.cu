// RMSNorm, RMSNorm of a sum, and the gated forms. Bound by memory: a row is read once, held in registers and written once.
//
// Forward: norm_rows.cuh. Backward: norm_stream.cuh for plain rows of more than 16 packets; here for the others, where kTeam threads share a row, each holding
// kPackets 16-byte packets of it (kTeam apart), and take kRows rows at a time so that many loads are in flight. Rows that are too long, not a multiple of a
// packet, or misaligned take the kernels of norm_any.cuh: one block a row, element by element.
#include "oryx/ops/norm/cuda/norm_any.cuh"
#include "oryx/ops/norm/cuda/norm_launch.h"
#include "oryx/ops/norm/cuda/norm_rows.cuh"
#include "oryx/ops/norm/cuda/norm_stream.cuh"

namespace oryx::ops::cuda {
namespace {

// Sums x[u] over the kTeam threads of a team. Teams wider than a warp meet in shared memory: `parity` alternates between
// calls, so that one barrier a call is enough. Every thread of the block must call it.
template <int kTeam, int kRows>
__device__ __forceinline__ void team_sum(float (&x)[kRows], int parity) {
#pragma unroll
  for (int u = 0; u < kRows; ++u) x[u] = warp_sum<(kTeam < 32 ? kTeam : 32)>(x[u]);
  if constexpr (kTeam > 32) {
    constexpr int kWarps = kTeam / 32;
    __shared__ float sums[2][kThreads / 32][kRows];
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) sums[parity][warp][u] = x[u];
    }
    __syncthreads();
    const int first = warp / kWarps * kWarps;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      x[u] = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) x[u] += sums[parity][first + i][u];
    }
  }
}

// blockIdx.y is the weight group. Block b of gridDim.x takes tiles b, b + gridDim.x, ...: the rows behind a partial sum
// depend on shape and device only.
constexpr int resident_backward(int packets) { return packets > 2 ? 1 : 2; }  // blocks a multiprocessor: registers
template <typename T, typename W, int kForm, int kTeam, int kPackets, int kRows>
__global__ __launch_bounds__(kThreads, resident_backward(kPackets)) void norm_backward(const Backward a) {
  constexpr int V = kLanes<T>, kTeams = kThreads / kTeam;
  constexpr bool kGated = kForm != kPlain;
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam, packets = static_cast<int>(a.dim / V);
  const int64_t per_group = a.per_group, tiles = (per_group + kTeams * kRows - 1) / (kTeams * kRows);
  float d_weight[kPackets][V];
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
#pragma unroll
    for (int e = 0; e < V; ++e) d_weight[p][e] = 0.0f;
  }
  // Few weights stay in registers; more are read at each row.
  constexpr bool kKeep = kPackets * V <= 16;
  const auto weights_of = [&](int p, float(&w)[V]) {
    const int i = lane + p * kTeam;
#pragma unroll
    for (int e = 0; e < V; ++e) w[e] = 0.0f;
    if (i < packets) load_weights(static_cast<const W*>(a.weight) + blockIdx.y * a.dim + i * V, w);
#pragma unroll
    for (int e = 0; e < V; ++e) w[e] += a.weight_offset;
  };
  float kept[kKeep ? kPackets : 1][V];
  if constexpr (kKeep) {
#pragma unroll
    for (int p = 0; p < kPackets; ++p) weights_of(p, kept[p]);
  }
  const auto weights = [&](int p, float(&w)[V]) {
    if constexpr (kKeep) {
#pragma unroll
      for (int e = 0; e < V; ++e) w[e] = kept[p][e];
    } else {
      weights_of(p, w);
    }
  };
  int parity = 0;
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
    const int64_t first = (tile * kTeams + team) * kRows;
    // The third is the gate or, without one, d_sum.
    Packet<T, V> d_y[kRows][kPackets], x[kRows][kPackets], gate[kRows][kPackets];
    const T* third = static_cast<const T*>(kGated ? a.gate : a.d_sum);
    float rstd[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t row = (first + u) * a.groups + blockIdx.y;
      rstd[u] = first + u < per_group ? load_read_only(a.rstd + row) : 0.0f;
#pragma unroll
      for (int p = 0; p < kPackets; ++p) {
        const int i = lane + p * kTeam;
        d_y[u][p].zero(), x[u][p].zero();
        gate[u][p].zero();
        if (first + u < per_group && i < packets) {
          const int64_t at = row * a.dim + i * V;
          d_y[u][p].load(static_cast<const T*>(a.d_y) + at);
          x[u][p].load(static_cast<const T*>(a.x) + at);
          if (third != nullptr) gate[u][p].load(third + at);
        }
      }
    }
    const auto elements = [&](int u, int p, Element(&out)[V]) {
      float d[V], v[V], g[V] = {};
      d_y[u][p].unpack(d), x[u][p].unpack(v);
      if constexpr (kGated) gate[u][p].unpack(g);
#pragma unroll
      for (int e = 0; e < V; ++e) out[e] = element<kForm>(d[e], v[e], g[e], rstd[u]);
    };
    float dots[kRows] = {};
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      float w[V];
      weights(p, w);
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        Element all[V];
        elements(u, p, all);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const float share = all[e].h * all[e].n;
          d_weight[p][e] += share;
          dots[u] += share * w[e];
        }
      }
    }
    team_sum<kTeam, kRows>(dots, parity);
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int i = lane + p * kTeam;
      float w[V];
      weights(p, w);
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (first + u >= per_group || i >= packets) break;
        const int64_t at = ((first + u) * a.groups + blockIdx.y) * a.dim + i * V;
        const float mean = dots[u] * a.inverse_dim;
        Element all[V];
        elements(u, p, all);
        float d_x[V], d_gate[V] = {};
#pragma unroll
        for (int e = 0; e < V; ++e) finish<kForm>(all[e], w[e], rstd[u], mean, d_x[e], d_gate[e]);
        Packet<T, V> out;
        if constexpr (!kGated) {  // zeros where there is no d_sum
          float s[V];
          gate[u][p].unpack(s);
#pragma unroll
          for (int e = 0; e < V; ++e) d_x[e] += s[e];
        }
        out.pack(d_x);
        out.store(static_cast<T*>(a.d_x) + at);
        if constexpr (kGated) {
          out.pack(d_gate);
          out.store(static_cast<T*>(a.d_gate) + at);
        }
      }
    }
  }
  launch_dependents();
  // The teams of the block, added in their order.
  constexpr int kWidth = kTeam * kPackets * V;
  __shared__ float total[kTeams][kWidth];
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
#pragma unroll
    for (int e = 0; e < V; ++e) total[team][(p * V + e) * kTeam + lane] = d_weight[p][e];
  }
  __syncthreads();
  float* to = a.partial + (static_cast<int64_t>(blockIdx.x) * a.groups + blockIdx.y) * a.dim;
#pragma unroll 1
  for (int c = threadIdx.x; c < a.dim; c += kThreads) {
    const int packet = c / V, at = (packet / kTeam * V + c % V) * kTeam + packet % kTeam;
    float sum = total[0][at];
#pragma unroll
    for (int i = 1; i < kTeams; ++i) sum += total[i][at];
    to[c] = sum;
  }
}

// The sum of a column of partial [count, width] in a fixed order: kSlices threads take every kSlices-th row, kDeep of them at once, so that one pass over the
// rows of 132 multiprocessors with 3 blocks each is enough.
constexpr int kSumColumns = 8, kSlices = 32, kSumThreads = kSumColumns * kSlices, kDeep = 13;
__global__ __launch_bounds__(kSumThreads) void reduce_weight(const float* partial, int count, int width, void* d_weight, int dtype) {
  __shared__ float sums[kSlices][kSumColumns + 1];
  const int mine = static_cast<int>(threadIdx.x) % kSumColumns, slice = static_cast<int>(threadIdx.x) / kSumColumns;
  const int column = static_cast<int>(blockIdx.x) * kSumColumns + mine, rows = column < width ? count : 0, step = kSlices * width;
  const float* from = partial + static_cast<int64_t>(slice) * width + column;
  float sum = 0.0f;
  wait_for_previous();
#pragma unroll 1
  for (int first = slice; first < rows; first += kSlices * kDeep) {
    float values[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      values[k] = first + k * kSlices < rows ? *from : 0.0f;
      from += step;
    }
#pragma unroll
    for (int k = 0; k < kDeep; ++k) sum += values[k];
  }
  sums[slice][mine] = sum;
  __syncthreads();
  if (slice > 0 || column >= width) return;
  float total = 0.0f;
#pragma unroll 8
  for (int i = 0; i < kSlices; ++i) total += sums[i][mine];
  store_any(d_weight, dtype, column, total);
}

int reduce_weights(const float* partial, int64_t count, int64_t width, void* d_weight, int dtype, cudaStream_t stream) {
  return launch_after(reduce_weight, dim3(static_cast<unsigned>((width + kSumColumns - 1) / kSumColumns)), kSumThreads, 0, stream, partial,
                      static_cast<int>(count), static_cast<int>(width), d_weight, dtype);
}

// ---- the choice of a kernel

template <typename T, int kForm>
int forward(const Forward& a, cudaStream_t stream) {
  const bool wide = a.dim % kLanes<T> == 0 && a.dim <= kLanes<T> * kMostRowPackets && a.rows <= INT32_MAX && aligned16(a.x) && aligned16(a.y) &&
                    aligned16(a.weight) && (kForm != kAdd || (aligned16(a.residual) && aligned16(a.sum))) && (kForm < kGateAfter || aligned16(a.gate));
  if (!wide) {
    const int64_t blocks = a.rows < multiprocessors() * 8 ? a.rows : multiprocessors() * 8;
    norm_forward_any<T, kForm><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
  } else if (a.weight_dtype == kBfloat16) {
    norm_rows<T, __nv_bfloat16, kForm>(a, stream);
  } else {
    norm_rows<T, float, kForm>(a, stream);
  }
  return cudaGetLastError();
}

// Rows of a block and its kernel for a shape; 0 packets: the kernel for any shape.
struct Plan {
  int team, packets, rows;
};
Plan backward_plan(int lanes, int64_t dim, bool gated, bool wide) {
  const int64_t packets = dim / lanes;
  if (!wide || dim % lanes != 0 || packets > 1024) return {kThreads, 0, 1};
  const int rows = gated ? 1 : 2;  // a gate takes registers
  if (packets <= 8) return {8, 1, 2 * rows};
  if (packets <= 16) return {16, 1, 2 * rows};
  if (packets <= 32) return {32, 1, 2 * rows};
  if (packets <= 64) return {32, 2, rows};
  if (packets <= 128) return {64, 2, rows};
  if (packets <= 256) return {128, 2, rows};
  if (packets <= 512) return {256, 2, rows};
  return {256, 4, 1};
}

// Blocks a weight group: at most what is resident at once, so that partial sums are few.
int64_t backward_blocks(int64_t rows, int64_t groups, const Plan& plan) {
  const int64_t block_rows = kThreads / plan.team * plan.rows, resident = static_cast<int64_t>(multiprocessors()) * resident_backward(plan.packets);
  const int64_t tiles = (rows / groups + block_rows - 1) / block_rows, most = (resident + groups - 1) / groups;
  return tiles < 1 ? 1 : tiles < most ? tiles : most;
}

template <typename T, typename W, int kForm>
void backward(const Backward& a, const Plan& plan, dim3 grid, cudaStream_t stream) {
  constexpr int kRows = kForm == kPlain ? 2 : 1;
  if (plan.team == 8) norm_backward<T, W, kForm, 8, 1, 2 * kRows><<<grid, kThreads, 0, stream>>>(a);
  if (plan.team == 16) norm_backward<T, W, kForm, 16, 1, 2 * kRows><<<grid, kThreads, 0, stream>>>(a);
  if constexpr (kForm != kPlain) {  // longer plain rows run as a stream
    if (plan.team == 32 && plan.packets == 1) norm_backward<T, W, kForm, 32, 1, 2><<<grid, kThreads, 0, stream>>>(a);
    if (plan.team == 32 && plan.packets == 2) norm_backward<T, W, kForm, 32, 2, 1><<<grid, kThreads, 0, stream>>>(a);
    if (plan.team == 64) norm_backward<T, W, kForm, 64, 2, 1><<<grid, kThreads, 0, stream>>>(a);
    if (plan.team == 128) norm_backward<T, W, kForm, 128, 2, 1><<<grid, kThreads, 0, stream>>>(a);
    if (plan.team == 256 && plan.packets == 2) norm_backward<T, W, kForm, 256, 2, 1><<<grid, kThreads, 0, stream>>>(a);
    if (plan.team == 256 && plan.packets == 4) norm_backward<T, W, kForm, 256, 4, 1><<<grid, kThreads, 0, stream>>>(a);
  }
}

template <typename T, int kForm>
int backward(const Backward& a, void* d_weight, cudaStream_t stream) {
  const bool wide = aligned16(a.d_y) && aligned16(a.x) && aligned16(a.d_x) && aligned16(a.d_sum) && aligned16(a.weight) &&
                    (kForm == kPlain || (aligned16(a.gate) && aligned16(a.d_gate)));
  const bool bf16 = a.weight_dtype == kBfloat16;
  if constexpr (kForm == kPlain) {
    const StreamPlan plan = stream_plan(a.rows, wide && a.dim % kLanes<T> == 0 ? a.dim / kLanes<T> : 0, a.d_sum != nullptr);
    if (plan.packets > 0) {
      bf16 ? norm_backward_stream<T, __nv_bfloat16>(a, plan, stream) : norm_backward_stream<T, float>(a, plan, stream);
      return reduce_weights(a.partial, plan.blocks, a.dim, d_weight, a.weight_dtype, stream);
    }
  }
  // Plain rows of more than 16 packets have no kernel here.
  const Plan plan = backward_plan(kLanes<T>, a.dim, kForm != kPlain, wide && (kForm != kPlain || a.dim <= 16 * kLanes<T>));
  const int64_t blocks = backward_blocks(a.rows, a.groups, plan);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.groups));
  if (plan.packets == 0) {
    norm_backward_any<T, kForm><<<grid, kThreads, 0, stream>>>(a);
  } else {
    bf16 ? backward<T, __nv_bfloat16, kForm>(a, plan, grid, stream) : backward<T, float, kForm>(a, plan, grid, stream);
  }
  return reduce_weights(a.partial, blocks, a.dim * a.groups, d_weight, a.weight_dtype, stream);
}

template <typename T>
int forward_of(int form, const Forward& a, cudaStream_t stream) {
  switch (form) {
    case kPlain:
      return forward<T, kPlain>(a, stream);
    case kAdd:
      return forward<T, kAdd>(a, stream);
    case kGateAfter:
      return forward<T, kGateAfter>(a, stream);
    case kGateFirst:
      return forward<T, kGateFirst>(a, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
int backward_of(int form, const Backward& a, void* d_weight, cudaStream_t stream) {
  switch (form) {
    case kPlain:
      return backward<T, kPlain>(a, d_weight, stream);
    case kGateAfter:
      return backward<T, kGateAfter>(a, d_weight, stream);
    case kGateFirst:
      return backward<T, kGateFirst>(a, d_weight, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace oryx::ops::cuda

using namespace oryx::ops::cuda;

int oryx_norm_forward(int form, int dtype, int weight_dtype, const void* x, const void* residual, const void* gate,
                      const void* weight, void* y, void* sum, float* rstd, int64_t rows, int64_t dim, int64_t groups,
                      float eps, float weight_offset, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const Forward a{x, residual, gate, weight, y, sum, rstd, rows, dim, groups, eps, weight_offset, 1.0f / static_cast<float>(dim), weight_dtype};
  return dtype == kBfloat16 ? forward_of<__nv_bfloat16>(form, a, stream) : forward_of<float>(form, a, stream);
}

int64_t oryx_norm_backward_workspace(int form, int dtype, int64_t rows, int64_t dim, int64_t groups) {
  const int lanes = dtype == kBfloat16 ? kLanes<__nv_bfloat16> : kLanes<float>;
  int64_t most = 0;
  for (const bool wide : {false, true}) {  // alignment is not known here
    const Plan plan = backward_plan(lanes, dim, form != kPlain, wide);
    const int64_t blocks = backward_blocks(rows, groups, plan);
    most = blocks > most ? blocks : most;
  }
  for (const bool sum : {false, true}) {
    if (form != kPlain || groups != 1 || dim % lanes != 0) break;
    const int64_t blocks = stream_plan(rows, dim / lanes, sum).blocks;
    most = blocks > most ? blocks : most;
  }
  return most * dim * groups;
}

int oryx_norm_backward(int form, int dtype, int weight_dtype, const void* d_y, const void* x, const void* gate,
                       const void* weight, const float* rstd, const void* d_sum, void* d_x, void* d_gate, void* d_weight,
                       float* workspace, int64_t rows, int64_t dim, int64_t groups, float weight_offset,
                       cudaStream_t stream) {
  const Backward a{d_y, x,  gate, weight, rstd, d_sum, d_x, d_gate, workspace, rows, dim, groups, rows / groups, weight_offset, 1.0f / static_cast<float>(dim),
                   weight_dtype};
  return dtype == kBfloat16 ? backward_of<__nv_bfloat16>(form, a, d_weight, stream)
                            : backward_of<float>(form, a, d_weight, stream);
}
