// Rotary position embedding. Bound by memory: x in, y out.
//
// Where a whole head turns and a token has enough of them, a warp takes a token, in the order of memory (rotate_token). Otherwise a thread takes one
// packet of pairs of one token, makes their cosines and sines once, in registers, and rotates that packet of one head after the other (rotate). The
// first loads are in flight while the cosines and sines are made.
//
// Angles: turns = position * (frequency / 2 pi) in float64, of which the whole part is dropped exactly; the rest, at most
// half a turn, goes to sincospif in float32.
#include <cmath>

#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/rope/cuda/rope_launch.h"

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 256, kMaxHalf = kOryxRopeMaxRotaryDim / 2;

struct Arguments {
  const void* x;
  const int32_t* positions;
  void* y;
  int64_t tokens, T, H, d, stride_b, stride_t, stride_h;
  int half;
  float sign;
  double turns[kMaxHalf];  // frequency / 2 pi
};

// V: values an access, divides half, d and the strides. kHeads: of a thread in flight. blockIdx.y takes every gridDim.y-th
// group of kHeads heads.
template <typename T, int V, int kHeads>
__global__ __launch_bounds__(kThreads) void rotate(const __grid_constant__ Arguments a) {
  // Pairs of packets that turn together, then the packets of a head that stay as they are.
  const unsigned pairs = a.half / V, units = pairs + static_cast<unsigned>(a.d - 2 * a.half) / V;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t token;
  unsigned unit;
  if (a.tokens * units <= UINT32_MAX) {
    const unsigned narrow = static_cast<unsigned>(index), quotient = narrow / units;
    token = quotient, unit = narrow - quotient * units;
  } else {
    token = index / units, unit = static_cast<unsigned>(index - token * units);
  }
  if (token >= a.tokens) return;
  const bool turns = unit < pairs;
  const unsigned m = turns ? unit * V : 2 * a.half + (unit - pairs) * V;
  const int64_t row = token / a.T;
  const T* x = static_cast<const T*>(a.x) + row * a.stride_b + (token - row * a.T) * a.stride_t + m;
  T* y = static_cast<T*>(a.y) + token * a.H * a.d + m;
  const int H = static_cast<int>(a.H), first = blockIdx.y * kHeads, step = gridDim.y * kHeads;
  Packet<T, V> low[kHeads], high[kHeads];
  const auto fetch = [&](int head) {
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (head + k >= H) break;
      low[k].load(x + (head + k) * a.stride_h);
      if (turns) high[k].load(x + (head + k) * a.stride_h + a.half);
    }
  };
  fetch(first);
  float cosine[V], sine[V];
  const double position = a.positions[token];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const double whole = position * a.turns[turns ? m + e : 0];
    sincospif(2.0f * static_cast<float>(whole - rint(whole)), &sine[e], &cosine[e]);
    sine[e] *= a.sign;
  }
  for (int head = first; head < H; head += step) {
    if (head != first) fetch(head);
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (head + k >= H) break;
      T* to = y + (head + k) * a.d;
      if (turns) {
        float p[V], q[V];
        low[k].unpack(p), high[k].unpack(q);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const float rotated = p[e] * cosine[e] - q[e] * sine[e];
          q[e] = q[e] * cosine[e] + p[e] * sine[e];
          p[e] = rotated;
        }
        low[k].pack(p), high[k].pack(q);
        high[k].store(to + a.half);
      }
      low[k].store(to);
    }
  }
}

// For 2 half = d and heads that lie side by side. Between them the lanes of a warp make its token's cosines and sines once, in shared memory; the other
// packet of a pair is another lane's. kPackets: of a head; kSteps: of a lane in flight. blockIdx.y is the row of the batch.
constexpr int kTokenThreads = 128;  // a block lives as long as its slowest warp: few of them
template <typename T, int kPackets, int kSteps>
__global__ __launch_bounds__(kTokenThreads, kSteps == 3 ? 9 : kSteps == 4 ? 8 : 6) void rotate_token(const __grid_constant__ Arguments a) {
  constexpr int V = kLanes<T>, kWarps = kTokenThreads / 32, kHalf = kPackets * V / 2;
  static_assert(kHalf % 32 == 0);
  __shared__ __align__(16) float table[kWarps][2][kHalf];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, packets = static_cast<int>(a.H) * kPackets;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp, token = blockIdx.y * a.T + t;
  if (t >= a.T) return;
  const double position = a.positions[token];
  const T* x = static_cast<const T*>(a.x) + blockIdx.y * a.stride_b + t * a.stride_t;
  T* y = static_cast<T*>(a.y) + token * (packets * V);
  Packet<T, V> in[kSteps];
  const auto fetch = [&](int begin) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int i = begin + k * 32 + lane;
      in[k].zero();
      if (i < packets) in[k].load(x + i * V);
    }
  };
  fetch(0);
#pragma unroll
  for (int m = lane; m < kHalf; m += 32) {
    const double whole = position * a.turns[m];
    float sine, cosine;
    sincospif(2.0f * static_cast<float>(whole - rint(whole)), &sine, &cosine);
    table[warp][0][m] = cosine, table[warp][1][m] = sine * a.sign;
  }
  __syncwarp();
  const int pair = lane % (kPackets / 2) * V;
  const bool low = lane % kPackets < kPackets / 2;
  float cosine[V], sine[V];  // of the other value of a pair
#pragma unroll
  for (int e = 0; e < V; ++e) cosine[e] = table[warp][0][pair + e], sine[e] = low ? -table[warp][1][pair + e] : table[warp][1][pair + e];
#pragma unroll 1
  for (int begin = 0; begin < packets; begin += 32 * kSteps) {
    if (begin > 0) fetch(begin);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Packet<T, V> other;
      const auto across = [](uint32_t word) { return __shfl_xor_sync(0xffffffffu, word, kPackets / 2); };
      other.raw = make_uint4(across(in[k].raw.x), across(in[k].raw.y), across(in[k].raw.z), across(in[k].raw.w));
      float own[V], its[V];
      in[k].unpack(own), other.unpack(its);
#pragma unroll
      for (int e = 0; e < V; ++e) own[e] = own[e] * cosine[e] + its[e] * sine[e];
      in[k].pack(own);
      const int i = begin + k * 32 + lane;
      if (i < packets) in[k].store(y + i * V);
    }
  }
}

template <typename T, int kPackets>
int launch_token(const Arguments& a, cudaStream_t stream) {
  constexpr int kWarps = kTokenThreads / 32;
  const dim3 grid(static_cast<unsigned>((a.T + kWarps - 1) / kWarps), static_cast<unsigned>(a.tokens / a.T));
  const int64_t packets = a.H * kPackets;
  if (packets <= 96) {
    rotate_token<T, kPackets, 3><<<grid, kTokenThreads, 0, stream>>>(a);
  } else if (packets <= 128) {
    rotate_token<T, kPackets, 4><<<grid, kTokenThreads, 0, stream>>>(a);
  } else {
    rotate_token<T, kPackets, 8><<<grid, kTokenThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

template <typename T, int V, int kHeads>
int launch(const Arguments& a, cudaStream_t stream) {
  const int64_t threads = a.tokens * (a.half / V + (a.d - 2 * a.half) / V);
  // One thread for all heads where that fills the device, else more, each of which makes the angles anew.
  const int64_t blocks = (threads + kThreads - 1) / kThreads, wanted = static_cast<int64_t>(multiprocessors()) * 4;
  const int64_t most = (a.H + kHeads - 1) / kHeads, shares = (wanted + blocks - 1) / blocks;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shares < most ? shares : most));
  rotate<T, V, kHeads><<<grid, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <typename T>
int launch(const Arguments& a, cudaStream_t stream) {
  constexpr int V = kLanes<T>;
  const bool wide = aligned16(a.x) && aligned16(a.y) && a.half % V == 0 && a.d % V == 0 && a.stride_b % V == 0 &&
                    a.stride_t % V == 0 && a.stride_h % V == 0;
  if (!wide) return launch<T, 1, 4>(a, stream);
  if constexpr (sizeof(T) == 2) {
    // With fewer packets a token its cosines and sines take longer than they do.
    const bool tokens = 2 * a.half == a.d && a.stride_h == a.d && a.H * a.d / V >= 96 && a.tokens / a.T <= 65535;
    if (tokens && a.d == 64) return launch_token<T, 8>(a, stream);
    if (tokens && a.d == 128) return launch_token<T, 16>(a, stream);
  }
  return launch<T, V, 6>(a, stream);
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
