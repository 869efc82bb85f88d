// Causal short convolution, backward. Bound by memory: x and d_y in, d_x out.
//
// With z the value before the activation and g = d_y act'(z):
//   d_x_t = sum_j w_j g_{t + w - 1 - j},  d_w_j = sum_t g_t x_{t - w + 1 + j},  d_bias = sum_t g_t
#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/short_conv/cuda/short_conv_common.cuh"
#include "oryx/ops/short_conv/cuda/short_conv_launch.h"

namespace oryx::ops::cuda {
namespace {

constexpr int kBackwardBlocks = 3;  // resident on a multiprocessor

// A warp takes 32 packets of channels and one chunk of tokens, a block four chunks in a row. Each thread walks its chunk and the
// w - 1 tokens behind it (for their g), and emits d_x w - 1 tokens late; the filter's gradient stays in registers. The next kAhead
// tokens are on their way: a token's registers take the one kAhead later as soon as it is unpacked. Groups of kAhead inside one
// sequence, nearly all, take a path without branches.
template <typename T, int V, int kTaps, int kAhead, int kBlocks, bool kSilu>
__global__ __launch_bounds__(kThreads, kBlocks) void short_conv_backward(const Arguments a, const T* d_y, const T* d_final, T* d_x,
                                                                         float* partial, int chunk) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned packets = static_cast<unsigned>(a.C / V), groups = (packets + 31) / 32, block = blockIdx.x / groups;
  const unsigned group = blockIdx.x - block * groups, packet = group * 32 + lane, work = block * kWarps + warp;
  const unsigned chunks = static_cast<unsigned>((a.T + chunk - 1) / chunk), row = work / chunks;
  const Channels<T, V, kTaps> c{a, static_cast<int64_t>(packet) * V};
  float d_w[kTaps][V] = {}, d_bias[V] = {};
  if (packet < packets && row < a.B) {
    const int begin = static_cast<int>(work - row * chunks) * chunk, h = a.width - 1;
    const int end = begin + chunk < a.T ? begin + chunk : static_cast<int>(a.T);
    const int stop = end + kTaps - 1, loads = stop < a.T ? stop : static_cast<int>(a.T);
    const int64_t base = row * a.T * a.C + c.channel;
    const T *x = static_cast<const T*>(a.x) + base, *dy = d_y + base;
    T* out = d_x + base;
    Packet<T, V> next[kAhead], next_dy[kAhead];
    const int64_t stride = a.C;
    const T *ahead_x = x + begin * stride, *ahead_dy = dy + begin * stride;  // token t + kAhead
    T* behind = out + (begin - (kTaps - 1)) * stride;                        // token t - (kTaps - 1)
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k < loads) next[k].load(ahead_x), next_dy[k].load(ahead_dy);
      ahead_x += stride, ahead_dy += stride;
    }
    float w[kTaps][V], bias[V], window[kTaps - 1][V], late[kTaps - 1][V];  // late: the g before this token
    c.taps(w);
    c.bias(bias);
    Span s = find_span(a, row, begin);
    c.window(s, row, begin - s.begin, window);
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) {
#pragma unroll
      for (int e = 0; e < V; ++e) late[j][e] = 0.0f;
    }
    int from = begin;  // the first token of this chunk and this sequence
    const auto gradient = [&](const Packet<T, V>& x_in, const Packet<T, V>& dy_in, float(&v)[V], float(&g)[V]) {
      x_in.unpack(v), dy_in.unpack(g);
      if (!kSilu && !a.silu) return;
      float z[V];
      c.convolve(w, bias, window, v, z);
#pragma unroll
      for (int e = 0; e < V; ++e) g[e] *= silu_slope(z[e], sigmoid(z[e]));
    };
    const auto accumulate = [&](const float(&v)[V], const float(&g)[V]) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        d_bias[e] += g[e];
        d_w[kTaps - 1][e] += g[e] * v[e];
#pragma unroll
        for (int j = 0; j < kTaps - 1; ++j) d_w[j][e] += g[e] * window[j][e];
      }
    };
    // d_x of token `to`, given g of token to + kTaps - 1; then that g is late.
    const auto combine = [&](const float(&g)[V], float(&sum)[V]) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        sum[e] = w[0][e] * g[e];
#pragma unroll
        for (int j = 0; j < kTaps - 1; ++j) sum[e] += w[kTaps - 1 - j][e] * late[j][e];
      }
      shift<V, kTaps>(late, g);
    };
    const auto store = [&](int to, const float(&sum)[V]) {
      Packet<T, V> packed;
      packed.pack(sum);
      packed.store(out + to * a.C);
    };
    const auto emit = [&](int t, const float(&g)[V]) {
      const int to = t - (kTaps - 1);
      float sum[V];
      combine(g, sum);
      if (to < from || to >= end) return;
      if (d_final != nullptr && to >= s.end - h) {
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += to_float(d_final[(s.n * a.C + c.channel + e) * h + to - (s.end - h)]);
      }
      store(to, sum);
    };
#pragma unroll 1
    for (int t = begin; t < stop; t += kAhead) {
      if (t + kAhead <= end && t + kAhead <= s.end) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          float v[V], g[V], sum[V];
          gradient(next[k], next_dy[k], v, g);
          if (t + kAhead + k < loads) next[k].load(ahead_x), next_dy[k].load(ahead_dy);
          accumulate(v, g);
          combine(g, sum);
          Packet<T, V> packed;
          packed.pack(sum);
          packed.store_if(behind, k >= kTaps - 1 || t + k - (kTaps - 1) >= from);  // no d_final_state here: it ends in the last h tokens
          shift<V, kTaps>(window, v);
          ahead_x += stride, ahead_dy += stride, behind += stride;
        }
        continue;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (t + kAhead + k < loads) next[k].load(ahead_x), next_dy[k].load(ahead_dy);
        ahead_x += stride, ahead_dy += stride, behind += stride;
      }
#pragma unroll 1
      for (int k = 0; k < kAhead && t + k < stop; ++k) {
        const float none[V] = {};
        if (t + k < end && t + k == s.end) {
#pragma unroll 1
          for (int i = 0; i < kTaps - 1; ++i) emit(t + k + i, none);
          s = find_span(a, row, t + k);
          c.window(s, row, 0, window);
          from = t + k;
        }
        float v[V] = {}, g[V] = {};
        if (t + k < s.end) {
          Packet<T, V> again, again_dy;
          again.load(x + (t + k) * a.C), again_dy.load(dy + (t + k) * a.C);
          gradient(again, again_dy, v, g);
          if (t + k < end) accumulate(v, g);
        }
        emit(t + k, g);
        shift<V, kTaps>(window, v);
      }
    }
  }
  launch_dependents();
  // The block's four chunks, added in their order: partial [blocks, kTaps + 1, C].
  __shared__ float sums[kWarps][kTaps + 1][V][32];
#pragma unroll
  for (int j = 0; j <= kTaps; ++j) {
#pragma unroll
    for (int e = 0; e < V; ++e) sums[warp][j][e][lane] = j < kTaps ? d_w[j < kTaps ? j : 0][e] : d_bias[e];
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(group) * 32 * V;
  for (int i = threadIdx.x; i < (kTaps + 1) * 32 * V; i += kThreads) {
    const int j = i / (32 * V), channel = i % (32 * V);
    if (first + channel >= a.C) continue;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) sum += sums[k][j][channel % V][channel / V];
    partial[(static_cast<int64_t>(block) * (kTaps + 1) + j) * a.C + first + channel] = sum;
  }
}

// Sums partial [count, taps + 1, C], few rows of many columns, into d_weight [C, width] and d_bias [C].
constexpr int kSumColumns = 32, kSumThreads = kSumColumns * 8;
__global__ __launch_bounds__(kSumThreads) void reduce_filter(const float* partial, int64_t count, int64_t C, int taps, int width, void* d_weight,
                                                             void* d_bias, int dtype) {
  wait_for_previous();
  const int64_t columns = (taps + 1) * C, column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
  const float total = reduce_column<kSumColumns, kSumThreads / kSumColumns, 8>(partial, count, columns, column);
  if (threadIdx.x >= kSumColumns || column >= columns) return;
  const unsigned row = static_cast<unsigned>(column) / static_cast<unsigned>(C);
  const int tap = static_cast<int>(row) - (taps - width);
  const int64_t channel = column - row * C;
  if (tap == width) {
    if (d_bias != nullptr) store_any(d_bias, dtype, channel, total);
  } else if (tap >= 0) {
    store_any(d_weight, dtype, channel * width + tap, total);
  }
}

// d_initial_state[i] = sum_{t <= min(i, length - 1)} w_{i - t} g_t (+ d_final_state[i - length]); one thread a (sequence,
// channel).
template <typename T>
__global__ void history_gradient(const Arguments a, const T* d_y, const T* d_final, T* d_history) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, h = a.width - 1;
  if (index >= a.N * a.C) return;
  const int64_t n = index / a.C;
  const bool packed = a.cu_seqlens != nullptr;
  const Span s = packed ? packed_span(a, n) : Span{n, 0, a.T};
  const int64_t row = packed ? 0 : n, length = s.end - s.begin;
  const Channels<T, 1, 8> c{a, index % a.C};
  float sums[7] = {};
  for (int64_t t = 0; t < h && t < length; ++t) {
    float g = to_float(d_y[(row * a.T + s.begin + t) * a.C + c.channel]);
    if (a.silu) {
      float z = a.bias != nullptr ? load_any(a.bias, a.weight_dtype, c.channel) : 0.0f;
      for (int j = 0; j < a.width; ++j) {
        float v[1];
        c.input(s, row, t - h + j, v);
        z += load_any(a.weight, a.weight_dtype, c.channel * a.width + j) * v[0];
      }
      g *= silu_slope(z, sigmoid(z));
    }
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      if (i < h && i >= t) sums[i] += load_any(a.weight, a.weight_dtype, c.channel * a.width + i - t) * g;
    }
  }
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    if (i >= h) break;
    if (d_final != nullptr && i >= length) sums[i] += to_float(d_final[index * h + i - length]);
    d_history[index * h + i] = from_float<T>(sums[i]);
  }
}

// ---- the choice of a kernel

// Tokens of a warp: one wave of blocks over the device, so that partial sums are few.
struct BackwardPlan {
  int64_t chunk, groups, blocks;
};
BackwardPlan backward_plan(int64_t B, int64_t T, int64_t C, int lanes, int resident) {
  const int64_t groups = (C / lanes + 31) / 32, warps = static_cast<int64_t>(multiprocessors()) * resident / groups * (kThreads / 32);
  const int64_t rows = warps / B > 0 ? warps / B : 1;  // warps a row of the batch
  int64_t chunk = (T + rows - 1) / rows;
  chunk = chunk < 16 ? 16 : (chunk + 7) / 8 * 8;
  return {chunk, groups, (B * ((T + chunk - 1) / chunk) + 3) / 4};
}

template <typename T, int V, int kTaps, int kAhead, int kBlocks, bool kSilu>
int backward(const Arguments& a, const BackwardPlan& plan, const T* d_y, const T* d_final, T* d_x, void* d_weight, void* d_bias,
             float* workspace, cudaStream_t stream) {
  if (plan.blocks > 0) {
    short_conv_backward<T, V, kTaps, kAhead, kBlocks, kSilu><<<static_cast<unsigned>(plan.groups * plan.blocks), kThreads, 0, stream>>>(
        a, d_y, d_final, d_x, workspace, static_cast<int>(plan.chunk));
  }
  const int64_t columns = (kTaps + 1) * a.C;
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return launch_after(reduce_filter, dim3(static_cast<unsigned>((columns + kSumColumns - 1) / kSumColumns)), kSumThreads, 0, stream, workspace,
                      plan.blocks, a.C, kTaps, a.width, d_weight, d_bias, a.weight_dtype);
}

template <typename T>
int backward_of(const Arguments& a, const void* d_y_in, const void* d_final_in, void* d_x_out, void* d_weight, void* d_bias,
                void* d_history, float* workspace, cudaStream_t stream) {
  const T *d_y = static_cast<const T*>(d_y_in), *d_final = static_cast<const T*>(d_final_in);
  T* d_x = static_cast<T*>(d_x_out);
  if (d_history != nullptr && a.width > 1 && a.N * a.C > 0) {
    history_gradient<T><<<static_cast<unsigned>((a.N * a.C + 127) / 128), 128, 0, stream>>>(a, d_y, d_final,
                                                                                            static_cast<T*>(d_history));
  }
  constexpr int V = 4;  // more channels a thread would leave too few threads: a channel takes 24 registers
  const bool wide = a.C % V == 0 && aligned16(a.x) && aligned16(d_y) && aligned16(d_x);
  const BackwardPlan plan = backward_plan(a.B, a.T, a.C, wide ? V : 1, kBackwardBlocks);
  const auto run = [&](auto kernel) { return kernel(a, plan, d_y, d_final, d_x, d_weight, d_bias, workspace, stream); };
  if (!wide) return a.width <= 4 ? run(backward<T, 1, 4, 4, 1, false>) : run(backward<T, 1, 8, 4, 1, false>);
  if (a.width > 4) return run(backward<T, V, 8, 4, 1, false>);
  constexpr int kAhead = sizeof(T) == 2 ? 6 : 3;
  return a.silu ? run(backward<T, V, 4, kAhead, kBackwardBlocks, true>) : run(backward<T, V, 4, kAhead, kBackwardBlocks, false>);
}

}  // namespace
}  // namespace oryx::ops::cuda

using namespace oryx::ops::cuda;

int64_t oryx_short_conv_backward_workspace(int, int64_t B, int64_t T, int64_t C, int width) {
  int64_t most = 0;
  for (const int lanes : {1, 4}) {  // alignment is not known here
    if (C % lanes != 0) continue;
    const int64_t blocks = backward_plan(B, T, C, lanes, kBackwardBlocks).blocks;
    most = blocks > most ? blocks : most;
  }
  return most * ((width <= 4 ? 4 : 8) + 1) * C;
}

int oryx_short_conv_backward(int dtype, int weight_dtype, const void* d_y, const void* d_final_state, const void* x,
                             const void* weight, const void* bias, const void* initial_state, const int32_t* cu_seqlens,
                             void* d_x, void* d_weight, void* d_bias, void* d_initial_state, float* workspace, int64_t B,
                             int64_t T, int64_t C, int64_t N, int width, int silu, cudaStream_t stream) {
  if (C == 0) return cudaSuccess;
  const Arguments a{x, weight, bias, initial_state, cu_seqlens, B, T, C, N, width, weight_dtype, silu != 0};
  return dtype == kBfloat16 ? backward_of<__nv_bfloat16>(a, d_y, d_final_state, d_x, d_weight, d_bias, d_initial_state,
                                                         workspace, stream)
                            : backward_of<float>(a, d_y, d_final_state, d_x, d_weight, d_bias, d_initial_state, workspace,
                                                 stream);
}
