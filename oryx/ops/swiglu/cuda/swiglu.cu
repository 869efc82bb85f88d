// SwiGLU, y = silu(gate) * up. Bound by memory: 3 streams forward, 5 backward.
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/swiglu/cuda/swiglu_launch.h"

namespace oryx::ops::cuda {
namespace {

// A thread takes one packet of each array. Shared memory that no kernel touches keeps a block from residing where it would be the 13th (forward) or 9th
// (backward) of a multiprocessor of 228 KB: 48 KB of loads in flight there carry more than 64 or 96 KB do.
constexpr int kThreads = 128, kForwardShare = 17 * 1024, kBackwardShare = 27 * 1024;

template <typename T, int V>
__global__ __launch_bounds__(kThreads) void swiglu_forward(const T* gate, const T* up, T* y, int64_t packets) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= packets) return;
  Packet<T, V> g, u;
  g.load(gate + i * V), u.load(up + i * V);
  float a[V], b[V];
  g.unpack(a), u.unpack(b);
#pragma unroll
  for (int e = 0; e < V; ++e) a[e] = silu(a[e]) * b[e];
  g.pack(a);
  g.store(y + i * V);
}

template <typename T, int V>
__global__ __launch_bounds__(kThreads) void swiglu_backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up, int64_t packets) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= packets) return;
  Packet<T, V> d, g, u;
  d.load(d_y + i * V), g.load(gate + i * V), u.load(up + i * V);
  float dy[V], a[V], b[V];
  d.unpack(dy), g.unpack(a), u.unpack(b);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float s = sigmoid(a[e]), up_e = b[e];
    b[e] = dy[e] * a[e] * s;
    a[e] = dy[e] * up_e * silu_slope(a[e], s);
  }
  g.pack(a), u.pack(b);
  g.store(d_gate + i * V);
  u.store(d_up + i * V);
}

unsigned blocks(int64_t packets) { return static_cast<unsigned>((packets + kThreads - 1) / kThreads); }

// Whole packets first, then what is left of them; all of it one by one where an address is not a multiple of 16.
template <typename T>
int forward(const T* gate, const T* up, T* y, int64_t n, cudaStream_t stream) {
  constexpr int V = kLanes<T>;
  const int64_t packets = aligned16(gate) && aligned16(up) && aligned16(y) ? n / V : 0, at = packets * V, rest = n - at;
  if (packets > 0) swiglu_forward<T, V><<<blocks(packets), kThreads, kForwardShare, stream>>>(gate, up, y, packets);
  if (rest > 0) swiglu_forward<T, 1><<<blocks(rest), kThreads, 0, stream>>>(gate + at, up + at, y + at, rest);
  return cudaGetLastError();
}

template <typename T>
int backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n, cudaStream_t stream) {
  constexpr int V = kLanes<T>;
  const bool wide = aligned16(d_y) && aligned16(gate) && aligned16(up) && aligned16(d_gate) && aligned16(d_up);
  const int64_t packets = wide ? n / V : 0, at = packets * V, rest = n - at;
  if (packets > 0) swiglu_backward<T, V><<<blocks(packets), kThreads, kBackwardShare, stream>>>(d_y, gate, up, d_gate, d_up, packets);
  if (rest > 0) swiglu_backward<T, 1><<<blocks(rest), kThreads, 0, stream>>>(d_y + at, gate + at, up + at, d_gate + at, d_up + at, rest);
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
