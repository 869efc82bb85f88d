// SwiGLU, y = silu(gate) * up. Bound by memory: 3 streams forward, 5 backward.
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/swiglu/cuda/swiglu_launch.h"

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 256;

// Each thread takes U packets, kThreads apart: 2 U (3 U backward) independent loads before the first use.
template <typename T, int V, int U>
__global__ __launch_bounds__(kThreads) void swiglu_forward(const T* gate, const T* up, T* y, int64_t packets) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * U + threadIdx.x;
  Packet<T, V> g[U], u[U];
#pragma unroll
  for (int k = 0; k < U; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < packets) g[k].load(gate + i * V), u[k].load(up + i * V);
  }
#pragma unroll
  for (int k = 0; k < U; ++k) {
    const int64_t i = first + k * kThreads;
    if (i >= packets) continue;
    float a[V], b[V];
    g[k].unpack(a), u[k].unpack(b);
#pragma unroll
    for (int e = 0; e < V; ++e) a[e] = silu(a[e]) * b[e];
    Packet<T, V> out;
    out.pack(a);
    out.store(y + i * V);
  }
}

template <typename T, int V, int U>
__global__ __launch_bounds__(kThreads) void swiglu_backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up,
                                                            int64_t packets) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * U + threadIdx.x;
  Packet<T, V> d[U], g[U], u[U];
#pragma unroll
  for (int k = 0; k < U; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < packets) d[k].load(d_y + i * V), g[k].load(gate + i * V), u[k].load(up + i * V);
  }
#pragma unroll
  for (int k = 0; k < U; ++k) {
    const int64_t i = first + k * kThreads;
    if (i >= packets) continue;
    float dy[V], a[V], b[V];
    d[k].unpack(dy), g[k].unpack(a), u[k].unpack(b);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float s = sigmoid(a[e]), up_e = b[e];
      b[e] = dy[e] * a[e] * s;
      a[e] = dy[e] * up_e * silu_slope(a[e], s);
    }
    Packet<T, V> out;
    out.pack(a);
    out.store(d_gate + i * V);
    out.pack(b);
    out.store(d_up + i * V);
  }
}

template <typename T>
int forward(const T* gate, const T* up, T* y, int64_t n, cudaStream_t stream) {
  constexpr int V = kLanes<T>, U = 2;
  // Whole packets first, then what is left of them; all of it one by one where an address is not a multiple of 16.
  const int64_t packets = aligned16(gate) && aligned16(up) && aligned16(y) ? n / V : 0, rest = n - packets * V;
  const auto blocks = [](int64_t count) { return static_cast<unsigned>((count + kThreads * U - 1) / (kThreads * U)); };
  if (packets > 0) swiglu_forward<T, V, U><<<blocks(packets), kThreads, 0, stream>>>(gate, up, y, packets);
  const int64_t at = packets * V;
  if (rest > 0) swiglu_forward<T, 1, U><<<blocks(rest), kThreads, 0, stream>>>(gate + at, up + at, y + at, rest);
  return cudaGetLastError();
}

template <typename T>
int backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n, cudaStream_t stream) {
  constexpr int V = kLanes<T>, U = 2;
  const bool wide = aligned16(d_y) && aligned16(gate) && aligned16(up) && aligned16(d_gate) && aligned16(d_up);
  const int64_t packets = wide ? n / V : 0, rest = n - packets * V, at = packets * V;
  const auto blocks = [](int64_t count) { return static_cast<unsigned>((count + kThreads * U - 1) / (kThreads * U)); };
  if (packets > 0) {
    swiglu_backward<T, V, U><<<blocks(packets), kThreads, 0, stream>>>(d_y, gate, up, d_gate, d_up, packets);
  }
  if (rest > 0) {
    swiglu_backward<T, 1, U>
        <<<blocks(rest), kThreads, 0, stream>>>(d_y + at, gate + at, up + at, d_gate + at, d_up + at, rest);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace oryx::ops::cuda

using oryx::ops::cuda::kBfloat16;
using Bf16 = __nv_bfloat16;

int oryx_swiglu_forward(int dtype, const void* gate, const void* up, void* y, int64_t n, cudaStream_t stream) {
  using oryx::ops::cuda::forward;
  if (dtype == kBfloat16) {
    return forward(static_cast<const Bf16*>(gate), static_cast<const Bf16*>(up), static_cast<Bf16*>(y), n, stream);
  }
  return forward(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(y), n, stream);
}

int oryx_swiglu_backward(int dtype, const void* d_y, const void* gate, const void* up, void* d_gate, void* d_up, int64_t n,
                         cudaStream_t stream) {
  using oryx::ops::cuda::backward;
  if (dtype == kBfloat16) {
    return backward(static_cast<const Bf16*>(d_y), static_cast<const Bf16*>(gate), static_cast<const Bf16*>(up),
                    static_cast<Bf16*>(d_gate), static_cast<Bf16*>(d_up), n, stream);
  }
  return backward(static_cast<const float*>(d_y), static_cast<const float*>(gate), static_cast<const float*>(up),
                  static_cast<float*>(d_gate), static_cast<float*>(d_up), n, stream);
}
