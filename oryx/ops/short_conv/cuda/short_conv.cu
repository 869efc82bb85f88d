// Causal short convolution. Bound by memory: x in, y out forward; x and d_y in, d_x out backward.
//
// A thread owns V adjacent channels (one 16-byte packet) and a run of tokens, keeps the last kTaps - 1 inputs in registers
// and loads kAhead tokens at a time. Kernels exist for kTaps = 4 and 8; narrower filters get leading zero taps. Channels that
// are no whole packets, or misaligned, run with V = 1.
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/short_conv/cuda/short_conv_launch.h"

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 128, kAhead = 4;

struct Arguments {
  const void *x, *weight, *bias, *history;  // history: the initial state
  const int32_t* cu_seqlens;
  int64_t B, T, C, N;
  int width, weight_dtype;
  bool silu;
};

// A sequence: its tokens [begin, end) of a row of x.
struct Span {
  int64_t n, begin, end;
};

// The sequence that holds token t of row b: of a packed row the last one to begin at or before t.
__device__ __forceinline__ Span find_span(const Arguments& a, int64_t b, int64_t t) {
  if (a.cu_seqlens == nullptr) return {b, 0, a.T};
  int64_t low = 0, high = a.N - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (a.cu_seqlens[middle] <= t) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, a.cu_seqlens[low], a.cu_seqlens[low + 1]};
}

// The bias, or 0 where there is none. The load reads the weight then, which is as long at least: nvcc moves a load through __ldg
// in front of the test of its pointer (seen with 13.0), and one of a null pointer ends the program.
__device__ __forceinline__ float bias_of(const void* bias, const void* weight, int dtype, int64_t channel) {
  const float loaded = load_any(bias != nullptr ? bias : weight, dtype, channel);
  return bias != nullptr ? loaded : 0.0f;
}

template <typename T, int V, int kTaps>
struct Channels {
  const Arguments& a;
  int64_t channel;  // the first of V

  // Input at `time` of sequence s, counted from its first token; times below 0 are the initial state's.
  __device__ __forceinline__ void input(const Span& s, int64_t row, int64_t time, float (&out)[V]) const {
    if (time >= 0) {
      Packet<T, V> p;
      p.load(static_cast<const T*>(a.x) + (row * a.T + s.begin + time) * a.C + channel);
      p.unpack(out);
      return;
    }
    const int64_t h = a.width - 1, i = time + h;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      out[e] = a.history != nullptr && i >= 0
                   ? to_float(static_cast<const T*>(a.history)[(s.n * a.C + channel + e) * h + i])
                   : 0.0f;
    }
  }

  // The inputs before `time`, oldest first.
  __device__ __forceinline__ void window(const Span& s, int64_t row, int64_t time, float (&out)[kTaps - 1][V]) const {
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) input(s, row, time - (kTaps - 1) + j, out[j]);
  }

  __device__ __forceinline__ void taps(float (&w)[kTaps][V]) const {
    if constexpr (V > 1 && kTaps == 4) {
      if (a.width == 4) {
        float flat[V];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          load_any(a.weight, a.weight_dtype, channel * 4 + k * V, flat);
#pragma unroll
          for (int e = 0; e < V; ++e) w[(k * V + e) % 4][(k * V + e) / 4] = flat[e];
        }
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const int k = j - (kTaps - a.width);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        w[j][e] = k >= 0 ? load_any(a.weight, a.weight_dtype, (channel + e) * a.width + k) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void bias(float (&out)[V]) const {
#pragma unroll
    for (int e = 0; e < V; ++e) out[e] = bias_of(a.bias, a.weight, a.weight_dtype, channel + e);
  }
};

template <int V, int kTaps>
__device__ __forceinline__ void shift(float (&window)[kTaps - 1][V], const float (&last)[V]) {
#pragma unroll
  for (int j = 0; j + 1 < kTaps - 1; ++j) {
#pragma unroll
    for (int e = 0; e < V; ++e) window[j][e] = window[j + 1][e];
  }
#pragma unroll
  for (int e = 0; e < V; ++e) window[kTaps - 2][e] = last[e];
}

// One thread a (chunk of tokens, packet of channels), and after those one a (sequence, packet) for the final state.
template <typename T, int V, int kTaps>
__global__ __launch_bounds__(kThreads) void short_conv_forward(const Arguments a, T* y, T* final_state, int chunk) {
  const int64_t packets = a.C / V, index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t chunks = (a.T + chunk - 1) / chunk, work = index / packets;
  const Channels<T, V, kTaps> c{a, index % packets * V};
  if (work >= chunks * a.B) {
    const int64_t n = work - chunks * a.B, h = a.width - 1;
    if (n >= a.N || final_state == nullptr) return;
    const bool packed = a.cu_seqlens != nullptr;
    const Span s = packed ? Span{n, a.cu_seqlens[n], a.cu_seqlens[n + 1]} : Span{n, 0, a.T};
    for (int64_t i = 0; i < h; ++i) {
      float v[V];
      c.input(s, packed ? 0 : n, s.end - s.begin - h + i, v);
#pragma unroll
      for (int e = 0; e < V; ++e) final_state[(n * a.C + c.channel + e) * h + i] = from_float<T>(v[e]);
    }
    return;
  }
  const int64_t row = work / chunks, begin = work % chunks * chunk;
  const int64_t end = begin + chunk < a.T ? begin + chunk : a.T;
  float w[kTaps][V], bias[V], window[kTaps - 1][V];
  c.taps(w);
  c.bias(bias);
  Span s = find_span(a, row, begin);
  c.window(s, row, begin - s.begin, window);
  const T* x = static_cast<const T*>(a.x) + row * a.T * a.C + c.channel;
  T* out = y + row * a.T * a.C + c.channel;
  for (int64_t t = begin; t < end; t += kAhead) {
    Packet<T, V> in[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (t + k < end) in[k].load(x + (t + k) * a.C);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (t + k >= end) break;
      if (t + k == s.end) {
        s = find_span(a, row, t + k);
        c.window(s, row, 0, window);
      }
      float v[V], z[V];
      in[k].unpack(v);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        z[e] = bias[e] + w[kTaps - 1][e] * v[e];
#pragma unroll
        for (int j = 0; j < kTaps - 1; ++j) z[e] += w[j][e] * window[j][e];
        if (a.silu) z[e] = silu(z[e]);
      }
      Packet<T, V> packet;
      packet.pack(z);
      packet.store(out + (t + k) * a.C);
      shift<V, kTaps>(window, v);
    }
  }
}

// With z the value before the activation and g = d_y act'(z):
//   d_x_t = sum_j w_j g_{t + w - 1 - j},  d_w_j = sum_t g_t x_{t - w + 1 + j},  d_bias = sum_t g_t
// A warp takes 32 packets of channels and one chunk of tokens, a block four chunks in a row. Each thread walks its chunk and
// the w - 1 tokens behind it (for their g), and emits d_x w - 1 tokens late; the filter's gradient stays in registers.
template <typename T, int V, int kTaps>
__global__ __launch_bounds__(kThreads, 2) void short_conv_backward(const Arguments a, const T* d_y, const T* d_final, T* d_x,
                                                                   float* partial, int64_t chunk) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t packets = a.C / V, packet = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const int64_t chunks = (a.T + chunk - 1) / chunk, work = static_cast<int64_t>(blockIdx.y) * kWarps + warp;
  const bool active = packet < packets && work < chunks * a.B;
  const Channels<T, V, kTaps> c{a, packet * V};
  float d_w[kTaps][V] = {}, d_bias[V] = {};
  if (active) {
    const int64_t row = work / chunks, begin = work % chunks * chunk, h = a.width - 1;
    const int64_t end = begin + chunk < a.T ? begin + chunk : a.T;
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
    const int64_t base = row * a.T * a.C + c.channel;
    const T *x = static_cast<const T*>(a.x) + base, *dy = d_y + base;
    T* out = d_x + base;
    const auto gradient = [&](const Packet<T, V>& x_in, const Packet<T, V>& dy_in, float(&v)[V], float(&g)[V]) {
      x_in.unpack(v), dy_in.unpack(g);
      if (!a.silu) return;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        float z = bias[e] + w[kTaps - 1][e] * v[e];
#pragma unroll
        for (int j = 0; j < kTaps - 1; ++j) z += w[j][e] * window[j][e];
        g[e] *= silu_slope(z, sigmoid(z));
      }
    };
    // Takes g of token t and writes d_x of token t - (kTaps - 1), if that is this chunk's and this sequence's.
    const auto emit = [&](int64_t t, const float(&g)[V]) {
      const int64_t to = t - (kTaps - 1);
      if (to >= begin && to >= s.begin) {
        float sum[V];
#pragma unroll
        for (int e = 0; e < V; ++e) {
          sum[e] = w[0][e] * g[e];
#pragma unroll
          for (int j = 0; j < kTaps - 1; ++j) sum[e] += w[kTaps - 1 - j][e] * late[j][e];
        }
        if (d_final != nullptr && to >= s.end - h) {
#pragma unroll
          for (int e = 0; e < V; ++e) sum[e] += to_float(d_final[(s.n * a.C + c.channel + e) * h + to - (s.end - h)]);
        }
        Packet<T, V> packed;
        packed.pack(sum);
        packed.store(out + to * a.C);
      }
      shift<V, kTaps>(late, g);
    };
    const float none[V] = {};
    for (int64_t t = begin; t < end; t += kAhead) {
      Packet<T, V> in[kAhead], in_dy[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (t + k < end) in[k].load(x + (t + k) * a.C), in_dy[k].load(dy + (t + k) * a.C);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (t + k >= end) break;
        if (t + k == s.end) {
#pragma unroll 1
          for (int i = 0; i < kTaps - 1; ++i) emit(s.end + i, none);
          s = find_span(a, row, t + k);
          c.window(s, row, 0, window);
        }
        float v[V], g[V];
        gradient(in[k], in_dy[k], v, g);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          d_bias[e] += g[e];
          d_w[kTaps - 1][e] += g[e] * v[e];
#pragma unroll
          for (int j = 0; j < kTaps - 1; ++j) d_w[j][e] += g[e] * window[j][e];
        }
        emit(t + k, g);
        shift<V, kTaps>(window, v);
      }
    }
#pragma unroll 1
    for (int64_t t = end; t < end + kTaps - 1; ++t) {
      float v[V] = {}, g[V] = {};
      if (t < s.end) {
        Packet<T, V> in, in_dy;
        in.load(x + t * a.C), in_dy.load(dy + t * a.C);
        gradient(in, in_dy, v, g);
      }
      emit(t, g);
      shift<V, kTaps>(window, v);
    }
  }
  // The block's four chunks, added in their order: partial [gridDim.y, kTaps + 1, C].
  __shared__ float sums[kTaps + 1][V][32];
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int j = 0; j <= kTaps; ++j) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const float mine = j < kTaps ? d_w[j < kTaps ? j : 0][e] : d_bias[e];
          sums[j][e][lane] = turn == 0 ? mine : sums[j][e][lane] + mine;
        }
      }
    }
    __syncthreads();
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 32 * V;
  for (int i = threadIdx.x; i < (kTaps + 1) * 32 * V; i += kThreads) {
    const int j = i / (32 * V), channel = i % (32 * V);
    if (first + channel < a.C) {
      partial[(static_cast<int64_t>(blockIdx.y) * (kTaps + 1) + j) * a.C + first + channel] =
          sums[j][channel % V][channel / V];
    }
  }
}

// Sums partial [count, taps + 1, C] into d_weight [C, width] and d_bias [C].
__global__ void reduce_filter(const float* partial, int64_t count, int64_t C, int taps, int width, void* d_weight,
                              void* d_bias, int dtype) {
  const int64_t columns = (taps + 1) * C, column = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x;
  const float total = reduce_column(partial, count, columns, column);
  if (threadIdx.y != 0 || column >= columns) return;
  const int tap = static_cast<int>(column / C) - (taps - width);
  const int64_t channel = column % C;
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
  const Span s = packed ? Span{n, a.cu_seqlens[n], a.cu_seqlens[n + 1]} : Span{n, 0, a.T};
  const int64_t row = packed ? 0 : n, length = s.end - s.begin;
  const Channels<T, 1, 8> c{a, index % a.C};
  float sums[7] = {};
  for (int64_t t = 0; t < h && t < length; ++t) {
    float g = to_float(d_y[(row * a.T + s.begin + t) * a.C + c.channel]);
    if (a.silu) {
      float z = bias_of(a.bias, a.weight, a.weight_dtype, c.channel);
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

template <typename T>
__global__ void short_conv_step(const T* x, const void* weight, const void* bias, int weight_dtype, void* state,
                                int state_dtype, T* y, int64_t N, int64_t C, int width, bool use_silu) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, h = width - 1;
  if (index >= N * C) return;
  const int64_t channel = index % C;
  const float in = to_float(x[index]);
  float z = bias_of(bias, weight, weight_dtype, channel);
  z += load_any(weight, weight_dtype, channel * width + h) * in;
  float past[7];
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    if (i >= h) break;
    // Plain loads: the state is written below.
    past[i] = state_dtype == kBfloat16 ? to_float(static_cast<const __nv_bfloat16*>(state)[index * h + i])
                                       : static_cast<const float*>(state)[index * h + i];
    z += load_any(weight, weight_dtype, channel * width + i) * past[i];
  }
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    if (i >= h) break;
    store_any(state, state_dtype, index * h + i, i + 1 < h ? past[i < 6 ? i + 1 : 6] : in);
  }
  y[index] = from_float<T>(use_silu ? silu(z) : z);
}

// ---- the choice of a kernel

template <typename T, int V, int kTaps>
int forward(const Arguments& a, T* y, T* final_state, cudaStream_t stream) {
  // Long runs amortise the filter and the window; short inputs are cut finer to fill the device.
  const int64_t packets = a.C / V, wanted = static_cast<int64_t>(multiprocessors()) * 1024;
  int chunk = 64;
  while (chunk > 8 && packets * a.B * ((a.T + chunk - 1) / chunk) < wanted) chunk /= 2;
  const int64_t threads = packets * (a.B * ((a.T + chunk - 1) / chunk) + (final_state != nullptr ? a.N : 0));
  if (threads == 0) return cudaSuccess;
  short_conv_forward<T, V, kTaps>
      <<<static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(a, y, final_state, chunk);
  return cudaGetLastError();
}

// Tokens of a warp of the backward: one wave of blocks over the device, so that partial sums are few.
struct BackwardPlan {
  int64_t chunk, blocks_x, blocks_y;
};
BackwardPlan backward_plan(int64_t B, int64_t T, int64_t C, int lanes) {
  const int64_t blocks_x = (C / lanes + 31) / 32, blocks = static_cast<int64_t>(multiprocessors()) * 2;
  const int64_t warps = blocks / blocks_x > 0 ? blocks / blocks_x * 4 : 4;
  const int64_t rows = warps / B > 0 ? warps / B : 1;  // warps a row of the batch
  int64_t chunk = (T + rows - 1) / rows;
  chunk = chunk < 16 ? 16 : (chunk + kAhead - 1) / kAhead * kAhead;
  return {chunk, blocks_x, (B * ((T + chunk - 1) / chunk) + 3) / 4};
}

template <typename T, int V, int kTaps>
int backward(const Arguments& a, const T* d_y, const T* d_final, T* d_x, void* d_weight, void* d_bias, float* workspace,
             cudaStream_t stream) {
  const BackwardPlan plan = backward_plan(a.B, a.T, a.C, V);
  if (plan.blocks_y > 0) {
    const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
    short_conv_backward<T, V, kTaps><<<grid, kThreads, 0, stream>>>(a, d_y, d_final, d_x, workspace, plan.chunk);
  }
  const int64_t columns = (kTaps + 1) * a.C;
  reduce_filter<<<static_cast<unsigned>((columns + kReduceColumns - 1) / kReduceColumns),
                  dim3(kReduceColumns, kReduceSlices), 0, stream>>>(workspace, plan.blocks_y, a.C, kTaps, a.width, d_weight,
                                                                    d_bias, a.weight_dtype);
  return cudaGetLastError();
}

template <typename T>
int forward_of(const Arguments& a, void* y_out, void* final_out, cudaStream_t stream) {
  T *y = static_cast<T*>(y_out), *final_state = static_cast<T*>(final_out);
  const bool wide = a.C % kLanes<T> == 0 && aligned16(a.x) && aligned16(y);
  if (a.width <= 4) {
    return wide ? forward<T, kLanes<T>, 4>(a, y, final_state, stream) : forward<T, 1, 4>(a, y, final_state, stream);
  }
  return wide ? forward<T, kLanes<T>, 8>(a, y, final_state, stream) : forward<T, 1, 8>(a, y, final_state, stream);
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
  const bool wide = a.C % kLanes<T> == 0 && aligned16(a.x) && aligned16(d_y) && aligned16(d_x);
  if (a.width <= 4) {
    return wide ? backward<T, kLanes<T>, 4>(a, d_y, d_final, d_x, d_weight, d_bias, workspace, stream)
                : backward<T, 1, 4>(a, d_y, d_final, d_x, d_weight, d_bias, workspace, stream);
  }
  return wide ? backward<T, kLanes<T>, 8>(a, d_y, d_final, d_x, d_weight, d_bias, workspace, stream)
              : backward<T, 1, 8>(a, d_y, d_final, d_x, d_weight, d_bias, workspace, stream);
}

}  // namespace
}  // namespace oryx::ops::cuda

using namespace oryx::ops::cuda;

int oryx_short_conv_forward(int dtype, int weight_dtype, const void* x, const void* weight, const void* bias,
                            const void* initial_state, const int32_t* cu_seqlens, void* y, void* final_state, int64_t B,
                            int64_t T, int64_t C, int64_t N, int width, int silu, cudaStream_t stream) {
  const Arguments a{x, weight, bias, initial_state, cu_seqlens, B, T, C, N, width, weight_dtype, silu != 0};
  return dtype == kBfloat16 ? forward_of<__nv_bfloat16>(a, y, final_state, stream)
                            : forward_of<float>(a, y, final_state, stream);
}

int64_t oryx_short_conv_backward_workspace(int dtype, int64_t B, int64_t T, int64_t C, int width) {
  int64_t most = 0;
  for (const int lanes : {1, dtype == kBfloat16 ? 8 : 4}) {  // alignment is not known here
    if (C % lanes != 0) continue;
    const int64_t blocks = backward_plan(B, T, C, lanes).blocks_y;
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

int oryx_short_conv_step(int dtype, int weight_dtype, int state_dtype, const void* x, const void* weight, const void* bias,
                         void* state, void* y, int64_t N, int64_t C, int width, int silu, cudaStream_t stream) {
  if (N * C == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((N * C + 127) / 128);
  if (dtype == kBfloat16) {
    short_conv_step<__nv_bfloat16><<<blocks, 128, 0, stream>>>(static_cast<const __nv_bfloat16*>(x), weight, bias,
                                                               weight_dtype, state, state_dtype,
                                                               static_cast<__nv_bfloat16*>(y), N, C, width, silu != 0);
  } else {
    short_conv_step<float><<<blocks, 128, 0, stream>>>(static_cast<const float*>(x), weight, bias, weight_dtype, state,
                                                       state_dtype, static_cast<float*>(y), N, C, width, silu != 0);
  }
  return cudaGetLastError();
}
