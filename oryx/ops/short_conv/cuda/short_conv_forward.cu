// Causal short convolution, forward, and one token at a time. Bound by memory: x in, y out.
//
// While a thread works on kAhead tokens, the next kAhead are on their way. Groups that lie inside one sequence, nearly all, take a
// path without branches; the others go token by token.
#include "oryx/ops/short_conv/cuda/short_conv_common.cuh"
#include "oryx/ops/short_conv/cuda/short_conv_launch.h"

namespace oryx::ops::cuda {
namespace {

// One warp a (chunk of tokens, 32 packets of channels), and after those one a (sequence, 32 packets) for the final state. kSilu: the
// activation is known to be SiLU; otherwise a.silu says.
template <typename T, int V, int kTaps, int kAhead, int kBlocks, bool kSilu>
__global__ __launch_bounds__(kThreads, kBlocks) void short_conv_forward(const Arguments a, T* y, T* final_state, int chunk) {
  const unsigned packets = static_cast<unsigned>(a.C / V), groups = (packets + 31) / 32;
  const unsigned warp = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, work = warp / groups;
  const unsigned packet = (warp - work * groups) * 32 + threadIdx.x % 32, chunks = static_cast<unsigned>((a.T + chunk - 1) / chunk);
  if (packet >= packets) return;
  const Channels<T, V, kTaps> c{a, static_cast<int64_t>(packet) * V};
  const unsigned row = work / chunks;
  if (row >= a.B) {
    const int64_t n = work - chunks * static_cast<unsigned>(a.B), h = a.width - 1;
    if (n >= a.N || final_state == nullptr) return;
    const bool packed = a.cu_seqlens != nullptr;
    const Span s = packed ? packed_span(a, n) : Span{n, 0, a.T};
    for (int64_t i = 0; i < h; ++i) {
      float v[V];
      c.input(s, packed ? 0 : n, s.end - s.begin - h + i, v);
#pragma unroll
      for (int e = 0; e < V; ++e) final_state[(n * a.C + c.channel + e) * h + i] = from_float<T>(v[e]);
    }
    return;
  }
  const int begin = static_cast<int>(work - row * chunks) * chunk, end = begin + chunk < a.T ? begin + chunk : static_cast<int>(a.T);
  const int64_t base = row * a.T * a.C + c.channel;
  const T* x = static_cast<const T*>(a.x) + base;
  T* out = y + base;
  Packet<T, V> next[kAhead];
  const auto fetch = [&](int t) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (t + k < end) next[k].load(x + (t + k) * a.C);
    }
  };
  fetch(begin);
  float w[kTaps][V], bias[V], window[kTaps - 1][V];
  c.taps(w);
  c.bias(bias);
  Span s = find_span(a, row, begin);
  c.window(s, row, begin - s.begin, window);
  const auto token = [&](int t, const Packet<T, V>& in) {
    float v[V], z[V];
    in.unpack(v);
    c.convolve(w, bias, window, v, z);
    if (kSilu || a.silu) {
#pragma unroll
      for (int e = 0; e < V; ++e) z[e] = silu(z[e]);
    }
    Packet<T, V> packed;
    packed.pack(z);
    packed.store(out + t * a.C);
    shift<V, kTaps>(window, v);
  };
#pragma unroll 1
  for (int t = begin; t < end; t += kAhead) {
    Packet<T, V> in[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) in[k] = next[k];
    fetch(t + kAhead);
    if (t + kAhead <= end && t + kAhead <= s.end) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) token(t + k, in[k]);
      continue;
    }
#pragma unroll 1
    for (int k = 0; k < kAhead && t + k < end; ++k) {
      if (t + k == s.end) {
        s = find_span(a, row, t + k);
        c.window(s, row, 0, window);
      }
      Packet<T, V> again;  // in[k] would need registers that can be indexed
      again.load(x + (t + k) * a.C);
      token(t + k, again);
    }
  }
}

template <typename T>
__global__ void short_conv_step(const T* x, const void* weight, const void* bias, int weight_dtype, void* state,
                                int state_dtype, T* y, int64_t N, int64_t C, int width, bool use_silu) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, h = width - 1;
  if (index >= N * C) return;
  const int64_t channel = index % C;
  const float in = to_float(x[index]);
  float z = bias != nullptr ? load_any(bias, weight_dtype, channel) : 0.0f;
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

template <typename T, int V, int kTaps, int kAhead, int kBlocks, bool kSilu>
int forward(const Arguments& a, T* y, T* final_state, int chunk, cudaStream_t stream) {
  const int64_t groups = (a.C / V + 31) / 32, warps = groups * (a.B * ((a.T + chunk - 1) / chunk) + (final_state != nullptr ? a.N : 0));
  if (warps == 0) return cudaSuccess;
  short_conv_forward<T, V, kTaps, kAhead, kBlocks, kSilu>
      <<<static_cast<unsigned>((warps * 32 + kThreads - 1) / kThreads), kThreads, 0, stream>>>(a, y, final_state, chunk);
  return cudaGetLastError();
}

// Runs of 32 tokens; short inputs are cut finer to fill the device.
int forward_chunk(const Arguments& a, int lanes) {
  const int64_t packets = a.C / lanes, wanted = static_cast<int64_t>(multiprocessors()) * 512;
  int chunk = 32;
  while (chunk > 8 && packets * a.B * ((a.T + chunk - 1) / chunk) < wanted) chunk /= 2;
  return chunk;
}

template <typename T>
int forward_of(const Arguments& a, void* y_out, void* final_out, cudaStream_t stream) {
  T *y = static_cast<T*>(y_out), *final_state = static_cast<T*>(final_out);
  constexpr int V = 4, kAhead = sizeof(T) == 2 ? 8 : 4;  // 8 channels a thread would leave too few threads
  const bool wide = a.C % V == 0 && aligned16(a.x) && aligned16(y);
  const int chunk = forward_chunk(a, wide ? V : 1);
  if (!wide) {
    return a.width <= 4 ? forward<T, 1, 4, 4, 1, false>(a, y, final_state, chunk, stream)
                        : forward<T, 1, 8, 4, 1, false>(a, y, final_state, chunk, stream);
  }
  if (a.width > 4) return forward<T, V, 8, 4, 1, false>(a, y, final_state, chunk, stream);
  return a.silu ? forward<T, V, 4, kAhead, 5, true>(a, y, final_state, chunk, stream)
                : forward<T, V, 4, kAhead, 5, false>(a, y, final_state, chunk, stream);
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
