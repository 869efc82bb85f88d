// What the kernels of the causal short convolution share.
//
// A thread owns V adjacent channels (one packet) and a run of tokens, and keeps the last kTaps - 1 inputs in registers. Kernels
// exist for kTaps = 4 and 8; narrower filters get leading zero taps. Channels that are no whole packets, or misaligned, run
// with V = 1.
#pragma once

#include "oryx/ops/cuda/packet.cuh"

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 128;

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

// Sequence n of the packed row. Bounds are the caller's to get right, but wrong ones read nothing outside of x.
__device__ __forceinline__ Span packed_span(const Arguments& a, int64_t n) {
  const int64_t begin = a.cu_seqlens[n], end = a.cu_seqlens[n + 1];
  const int64_t first = begin < 0 ? 0 : begin < a.T ? begin : a.T;
  return {n, first, end < first ? first : end < a.T ? end : a.T};
}

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
  return packed_span(a, low);
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
    if (time >= kTaps - 1) {  // their loads leave together
      Packet<T, V> packets[kTaps - 1];
      const T* from = static_cast<const T*>(a.x) + (row * a.T + s.begin + time - (kTaps - 1)) * a.C + channel;
#pragma unroll
      for (int j = 0; j < kTaps - 1; ++j) packets[j].load(from + j * a.C);
#pragma unroll
      for (int j = 0; j < kTaps - 1; ++j) packets[j].unpack(out[j]);
      return;
    }
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) input(s, row, time - (kTaps - 1) + j, out[j]);
  }

  __device__ __forceinline__ void taps(float (&w)[kTaps][V]) const {
    if constexpr (V > 1 && kTaps == 4) {
      if (a.width == 4) {
        with_weights<V>(a.weight, a.weight_dtype, [&](const auto& load) {
          float flat[4][V];
#pragma unroll
          for (int k = 0; k < 4; ++k) load(channel * 4 + k * V, flat[k]);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int e = 0; e < V; ++e) w[(k * V + e) % 4][(k * V + e) / 4] = flat[k][e];
          }
        });
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

  // The value before the activation, given the input and those before it.
  __device__ __forceinline__ static void convolve(const float (&w)[kTaps][V], const float (&bias)[V], const float (&window)[kTaps - 1][V],
                                                  const float (&v)[V], float (&z)[V]) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      z[e] = bias[e] + w[kTaps - 1][e] * v[e];
#pragma unroll
      for (int j = 0; j < kTaps - 1; ++j) z[e] += w[j][e] * window[j][e];
    }
  }

  __device__ __forceinline__ void bias(float (&out)[V]) const {
#pragma unroll
    for (int e = 0; e < V; ++e) out[e] = 0.0f;
    if (a.bias != nullptr) with_weights<V>(a.bias, a.weight_dtype, [&](const auto& load) { load(channel, out); });
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

}  // namespace
}  // namespace oryx::ops::cuda
