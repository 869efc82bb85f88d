// Rotary position embedding. Bound by memory: x in, y out. A block takes a few tokens, makes their cosines and sines once
// for all heads in shared memory, and rotates.
//
// Angles: turns = position * (frequency / 2 pi) in float64, of which the whole part is dropped exactly; the rest, at most
// half a turn, goes to sincospif in float32.
#include <cmath>

#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/rope/cuda/rope_launch.h"

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 256, kTokens = 8, kMaxHalf = kOryxRopeMaxRotaryDim / 2;

struct Arguments {
  const void* x;
  const int32_t* positions;
  void* y;
  int64_t tokens, T, H, d, stride_b, stride_t, stride_h;
  int half;
  float sign;
  double turns[kMaxHalf];  // frequency / 2 pi
};

// V: values an access, divides half, d and the strides.
template <typename T, int V>
__global__ __launch_bounds__(kThreads) void rotate(const __grid_constant__ Arguments a) {
  __shared__ float2 table[kTokens][kMaxHalf];  // cosine, sine
  __shared__ int64_t starts[kTokens];          // of the tokens in x: 64-bit divisions once a token
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  for (int i = threadIdx.x; i < kTokens * a.half; i += kThreads) {
    const int token = i / a.half, m = i % a.half;
    if (first + token >= a.tokens) break;
    const double turns = static_cast<double>(a.positions[first + token]) * a.turns[m];
    float sine, cosine;
    sincospif(2.0f * static_cast<float>(turns - rint(turns)), &sine, &cosine);
    table[token][m] = make_float2(cosine, a.sign * sine);
  }
  if (threadIdx.x < kTokens) {
    const int64_t index = first + threadIdx.x;
    starts[threadIdx.x] = index / a.T * a.stride_b + index % a.T * a.stride_t;
  }
  __syncthreads();
  // Pairs of packets that turn together, then the packets of a head that stay as they are.
  const unsigned pairs = a.half / V, rest = static_cast<unsigned>(a.d - 2 * a.half) / V, units = pairs + rest;
  const unsigned per_token = units * static_cast<unsigned>(a.H);
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < kTokens * per_token; i += kThreads) {
    const unsigned token = i / per_token, of_token = i - token * per_token, head = of_token / units, unit = of_token - head * units;
    const int64_t index = first + token;
    if (index >= a.tokens) break;
    const T* x = static_cast<const T*>(a.x) + starts[token] + head * a.stride_h;
    T* y = static_cast<T*>(a.y) + (index * a.H + head) * a.d;
    Packet<T, V> low, high;
    if (unit >= pairs) {
      const unsigned m = 2 * a.half + (unit - pairs) * V;
      low.load(x + m);
      low.store(y + m);
      continue;
    }
    const unsigned m = unit * V;
    low.load(x + m), high.load(x + m + a.half);
    float p[V], q[V];
    low.unpack(p), high.unpack(q);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float2 turn = table[token][m + e];
      const float rotated = p[e] * turn.x - q[e] * turn.y;
      q[e] = q[e] * turn.x + p[e] * turn.y;
      p[e] = rotated;
    }
    low.pack(p), high.pack(q);
    low.store(y + m), high.store(y + m + a.half);
  }
}

template <typename T>
int launch(const Arguments& a, cudaStream_t stream) {
  constexpr int V = kLanes<T>;
  const unsigned blocks = static_cast<unsigned>((a.tokens + kTokens - 1) / kTokens);
  const bool wide = aligned16(a.x) && aligned16(a.y) && a.half % V == 0 && a.d % V == 0 && a.stride_b % V == 0 &&
                    a.stride_t % V == 0 && a.stride_h % V == 0;
  if (wide) {
    rotate<T, V><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    rotate<T, 1><<<blocks, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace oryx::ops::cuda

int oryx_rope(int dtype, const void* x, const int32_t* positions, void* y, int64_t B, int64_t T, int64_t H, int64_t d,
              int64_t stride_b, int64_t stride_t, int64_t stride_h, int64_t rotary_dim, double theta, int inverse,
              cudaStream_t stream) {
  using namespace oryx::ops::cuda;
  if (B * T * H * d == 0) return cudaSuccess;
  if (rotary_dim > kOryxRopeMaxRotaryDim) return cudaErrorInvalidValue;
  Arguments a{x,        positions, y,        B * T, T, H, d, stride_b, stride_t,
              stride_h, static_cast<int>(rotary_dim / 2), inverse != 0 ? -1.0f : 1.0f, {}};
  for (int m = 0; m < a.half; ++m) {
    a.turns[m] = std::pow(theta, -2.0 * m / static_cast<double>(rotary_dim)) / (2.0 * 3.14159265358979323846);
  }
  return dtype == kBfloat16 ? launch<__nv_bfloat16>(a, stream) : launch<float>(a, stream);
}
