// Causal short convolution, forward, and one token at a time. Bound by memory: x in, y out.
//
// A thread loads all it needs at once, its kTokens tokens and the ones before them, and is done after them: neighbours in the grid read those again, from the
// L2. Groups inside one sequence, nearly all, take a path without branches; the others go token by token.
#include <type_traits>

#include "oryx/ops/cuda/load_weights.cuh"
#include "oryx/ops/short_conv/cuda/short_conv_common.cuh"
#include "oryx/ops/short_conv/cuda/short_conv_launch.h"

namespace oryx::ops::cuda {
namespace {

// Block (g, i, z) has the channels of group g and the tokens of group i of row z; blocks i behind the last group of tokens have the final state of sequence
// (i - groups) B + z. `first` counts in i, `row` in z where the grid would be too large. W: of weights that are known to be whole filters of kTaps taps at a
// multiple of 16 bytes; else void. kSilu: the activation is known to be SiLU; otherwise a.silu says. kPacked: there is a cu_seqlens.
template <typename T, typename W, int V, int kTaps, int kTokens, int kBlocks, bool kSilu, bool kPacked>
__global__ __launch_bounds__(kThreads, kBlocks) void short_conv_forward(const Arguments a, T* y, T* final_state, int groups, int first, int row_first) {
  static_assert(kTokens >= kTaps - 1);  // only the first group has no tokens before it
  const int packet = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x), group = first + static_cast<int>(blockIdx.y);
  if (packet >= static_cast<int>(a.C) / V) return;
  const int64_t row = row_first + static_cast<int64_t>(blockIdx.z);
  const Channels<T, V, kTaps> c{a, static_cast<int64_t>(packet) * V};
  if (group >= groups) {
    const int64_t n = (group - groups) * a.B + row, h = a.width - 1;
    if (n >= a.N) return;
    const Span s = kPacked ? packed_span(a, n) : Span{n, 0, a.T};
    for (int64_t i = 0; i < h; ++i) {
      float v[V];
      c.input(s, kPacked ? 0 : n, s.end - s.begin - h + i, v);
#pragma unroll
      for (int e = 0; e < V; ++e) final_state[(n * a.C + c.channel + e) * h + i] = from_float<T>(v[e]);
    }
    return;
  }
  const int begin = group * kTokens, left = static_cast<int>(a.T) - begin;  // tokens from begin to the end of the row
  const int64_t base = (row * a.T + begin) * a.C + c.channel;
  const T* x = static_cast<const T*>(a.x) + base;
  T* out = y + base;
  Packet<T, V> past[kTaps - 1], in[kTokens];
#pragma unroll
  for (int j = 0; j < kTaps - 1; ++j) {
    past[j].zero();
    if (begin > 0) past[j].load(x + (j - (kTaps - 1)) * a.C);
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    in[k].zero();
    if (k < left) in[k].load(x + k * a.C);
  }
  float w[kTaps][V], bias[V], window[kTaps - 1][V];
  if constexpr (std::is_void_v<W>) {
    c.taps(w);
  } else {
    float flat[V * kTaps];
    load_weights(static_cast<const W*>(a.weight) + c.channel * kTaps, flat);
#pragma unroll
    for (int e = 0; e < V; ++e) {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) w[j][e] = flat[e * kTaps + j];
    }
  }
  c.bias(bias);
  Span s = kPacked ? find_span(a, row, begin) : Span{row, 0, a.T};
#pragma unroll
  for (int j = 0; j < kTaps - 1; ++j) past[j].unpack(window[j]);
  if (begin - s.begin < kTaps - 1) c.window(s, row, begin - s.begin, window);
  const auto token = [&](T* to, const Packet<T, V>& packed) {
    float v[V], z[V];
    packed.unpack(v);
    c.convolve(w, bias, window, v, z);
    if (kSilu || a.silu) {
#pragma unroll
      for (int e = 0; e < V; ++e) z[e] = silu(z[e]);
    }
    Packet<T, V> result;
    result.pack(z);
    result.store(to);
    shift<V, kTaps>(window, v);
  };
  if constexpr (kPacked) {
    if (s.end - begin < (left < kTokens ? left : kTokens)) {
#pragma unroll 1
      for (int k = 0; k < kTokens && k < left; ++k) {
        if (begin + k == s.end) {
          s = find_span(a, row, begin + k);
          c.window(s, row, 0, window);
        }
        Packet<T, V> again;  // in[k] would need registers that can be indexed
        again.load(x + k * a.C);
        token(out + k * a.C, again);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    if (k < left) token(out + k * a.C, in[k]);
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

template <typename T, typename W, int V, int kTaps, int kTokens, int kBlocks, bool kSilu>
int forward(const Arguments& a, T* y, T* final_state, cudaStream_t stream) {
  constexpr int64_t kMost = 65535;  // blocks in y and in z
  if (a.B == 0 || a.C == 0) return cudaSuccess;
  const int64_t groups = (a.T + kTokens - 1) / kTokens, all = groups + (final_state != nullptr && a.width > 1 ? (a.N + a.B - 1) / a.B : 0);
  const unsigned channels = static_cast<unsigned>((a.C / V + kThreads - 1) / kThreads);
  const auto kernel = a.cu_seqlens != nullptr ? short_conv_forward<T, W, V, kTaps, kTokens, kBlocks, kSilu, true>
                                              : short_conv_forward<T, W, V, kTaps, kTokens, kBlocks, kSilu, false>;
  for (int64_t row = 0; row < a.B; row += kMost) {
    for (int64_t first = 0; first < all; first += kMost) {
      const dim3 grid(channels, static_cast<unsigned>(all - first < kMost ? all - first : kMost), static_cast<unsigned>(a.B - row < kMost ? a.B - row : kMost));
      kernel<<<grid, kThreads, 0, stream>>>(a, y, final_state, static_cast<int>(groups), static_cast<int>(first), static_cast<int>(row));
    }
  }
  return cudaGetLastError();
}

template <typename T, typename W, int kTokens, int kBlocks>
int forward_of(const Arguments& a, T* y, T* final_state, cudaStream_t stream) {
  return a.silu ? forward<T, W, 4, 4, kTokens, kBlocks, true>(a, y, final_state, stream)
                : forward<T, W, 4, 4, kTokens, kBlocks, false>(a, y, final_state, stream);
}

template <typename T>
int forward_of(const Arguments& a, void* y_out, void* final_out, cudaStream_t stream) {
  T *y = static_cast<T*>(y_out), *final_state = static_cast<T*>(final_out);
  constexpr int V = 4, kTokens = 8, kBlocks = sizeof(T) == 2 ? 8 : 5;  // 8 channels a thread would leave too few threads
  if (a.C % V != 0 || !aligned16(a.x) || !aligned16(y)) {
    return a.width <= 4 ? forward<T, void, 1, 4, kTokens, 1, false>(a, y, final_state, stream)
                        : forward<T, void, 1, 8, kTokens, 1, false>(a, y, final_state, stream);
  }
  if (a.width > 4) return forward<T, void, V, 8, kTokens, 1, false>(a, y, final_state, stream);
  if (a.width < 4 || !aligned16(a.weight)) return forward<T, void, V, 4, kTokens, kBlocks, false>(a, y, final_state, stream);
  return a.weight_dtype == kBfloat16 ? forward_of<T, __nv_bfloat16, kTokens, kBlocks>(a, y, final_state, stream)
                                     : forward_of<T, float, kTokens, kBlocks>(a, y, final_state, stream);
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
