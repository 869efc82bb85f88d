// Cross-entropy over rows of logits. Bound by memory: a row is read once, its statistics are made in registers, and its gradient is
// written over it.
//
// One block takes a row, in steps of kPackets packets a thread; while it works on one step, the loads of the next are in flight,
// be it of this row or of the block's next one. Each thread makes the maximum of its own values and the sum of exponentials
// against it, so that the block meets only once a row. For the gradient the last step is still in registers, up to
// kMaxHeld before it in shared memory (each thread's in slots of its own), and only what a still longer row has is read again.
// Rows run from the last to the first: the product that made them has left the last ones in the L2, and the next product
// begins with the first ones.
#include <cmath>

#include "oryx/ops/cross_entropy/cuda/cross_entropy_launch.h"
#include "oryx/ops/cuda/packet.cuh"

namespace oryx::ops::cuda {
namespace {

// Maximum and sum of exp(x - maximum) over some values.
struct Softmax {
  float max, sum;
};

// x - max where max may be -inf, of a part without any finite value.
__device__ __forceinline__ float base_of(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ Softmax warp_softmax(Softmax s) {
  float max = s.max;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
  return {max, warp_sum<32>(s.sum * exp2_fast((s.max - base_of(max)) * kLog2E))};
}

// The whole block's. `parity` alternates between calls, so that one barrier is enough.
template <int kThreads>
__device__ __forceinline__ Softmax block_softmax(Softmax s, int parity) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float maxima[2][kWarps], sums[2][kWarps];
  s = warp_softmax(s);
  if (threadIdx.x % 32 == 0) maxima[parity][threadIdx.x / 32] = s.max, sums[parity][threadIdx.x / 32] = s.sum;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return warp_softmax(lane < kWarps ? Softmax{maxima[parity][lane], sums[parity][lane]} : Softmax{-INFINITY, 0.0f});
}

// kPackets packets of a row, kThreads apart. What lies behind the last class is -inf.
template <typename T, int V, int kThreads, int kPackets>
struct Part {
  Packet<T, V> raw[kPackets];

  __device__ __forceinline__ void load(const T* row, int first, int classes) {
    float none[V];
#pragma unroll
    for (int e = 0; e < V; ++e) none[e] = -INFINITY;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int column = (first + p * kThreads) * V;
      if (column < classes) {
        raw[p].load_plain(row + column);
      } else {
        raw[p].pack(none);
      }
    }
  }

  // Cuts the packet that holds the last class, where classes is no multiple of V. Apart from load, so as not to wait for it.
  __device__ __forceinline__ void cut(int first, int classes) {
    if constexpr (V == 1) return;
    if (classes % V == 0) return;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int column = (first + p * kThreads) * V;
      if (column < classes && column + V > classes) {
        float v[V];
        raw[p].unpack(v);
#pragma unroll
        for (int e = 0; e < V; ++e) v[e] = column + e < classes ? v[e] : -INFINITY;
        raw[p].pack(v);
      }
    }
  }

  __device__ __forceinline__ float max() const {
    float most = -INFINITY;
    if constexpr (sizeof(T) == 2 && V > 1) {  // two values an instruction
      __nv_bfloat162 m = __float2bfloat162_rn(-INFINITY);
#pragma unroll
      for (int p = 0; p < kPackets; ++p) {
        const uint32_t words[4] = {raw[p].raw.x, raw[p].raw.y, raw[p].raw.z, raw[p].raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) m = __hmax2(m, *reinterpret_cast<const __nv_bfloat162*>(&words[i]));
      }
      most = fmaxf(to_float(m.x), to_float(m.y));
    } else {
#pragma unroll
      for (int p = 0; p < kPackets; ++p) {
        float v[V];
        raw[p].unpack(v);
#pragma unroll
        for (int e = 0; e < V; ++e) most = fmaxf(most, v[e]);
      }
    }
    return most;
  }

  // s with these values added.
  __device__ __forceinline__ Softmax add_to(Softmax s) const {
    const float most = fmaxf(s.max, max()), base = base_of(most);
    float sums[2] = {s.sum * exp2_fast((s.max - base) * kLog2E), 0.0f};
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      float v[V];
      raw[p].unpack(v);
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e % 2] += exp2_fast((v[e] - base) * kLog2E);
    }
    return {most, sums[0] + sums[1]};
  }

  // The gradient factor (exp(x - max)) - (scale at the target).
  __device__ __forceinline__ void store_gradient(T* row, int first, int classes, float base, float factor, float scale,
                                                 int target) const {
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int column = (first + p * kThreads) * V;
      if (column >= classes) break;
      float v[V];
      raw[p].unpack(v);
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = factor * exp2_fast((v[e] - base) * kLog2E);
      if (target >= column && target < column + V) {
#pragma unroll
        for (int e = 0; e < V; ++e) v[e] -= target == column + e ? scale : 0.0f;
      }
      Packet<T, V> out;
      out.pack(v);
      out.store(row + column);  // the rest of the last packet, if any, lies between the rows
    }
  }
};

constexpr int kMaxHeld = 3;  // steps of 64 KB

// Dynamic shared memory holds `held` steps, all but the last of a row if it can.
template <typename T, int V, int kThreads, int kPackets, bool kGradient>
__global__ __launch_bounds__(kThreads, 1024 / kThreads) void softmax_rows(const OryxCrossEntropyRows a, int held) {
  extern __shared__ uint4 slots[];
  using Step = Part<T, V, kThreads, kPackets>;
  constexpr int kStride = kThreads * kPackets;
  const int classes = static_cast<int>(a.classes), steps = ((classes + V - 1) / V + kStride - 1) / kStride;
  float scale = 0.0f;
  if constexpr (kGradient) {
    const int64_t kept = a.counts[0];
    scale = (a.d_loss == nullptr ? 1.0f : *a.d_loss) / static_cast<float>(kept > 1 ? kept : 1);
  }
  const auto first_of = [&](int step) { return static_cast<int>(threadIdx.x) + step * kStride; };
  Step next;
  const auto fetch = [&](int64_t i, int step) {  // row i from the last one
    if (i < a.rows) next.load(static_cast<const T*>(a.logits) + (a.rows - 1 - i) * a.stride, first_of(step), classes);
  };
  const auto slot = [&](int step, int p) { return slots + (step * kPackets + p) * kThreads + threadIdx.x; };
  fetch(blockIdx.x, 0);
  int parity = 0;
  for (int64_t i = blockIdx.x; i < a.rows; i += gridDim.x, parity ^= 1) {
    const int64_t row = a.rows - 1 - i;
    const int target = a.targets[row];
    const bool kept = target != a.ignore_index, known = target >= 0 && target < classes;
    float picked = NAN;
    // Before anyone writes over it.
    if (threadIdx.x == 0 && kept && known) picked = to_float(static_cast<const T*>(a.logits)[row * a.stride + target]);
    Step part;
    Softmax s{-INFINITY, 0.0f};
    for (int step = 0; step < steps; ++step) {
      part = next;
      step + 1 < steps ? fetch(i, step + 1) : fetch(i + gridDim.x, 0);
      part.cut(first_of(step), classes);
      s = part.add_to(s);
      if constexpr (kGradient && V > 1) {
        if (step < held) {
#pragma unroll
          for (int p = 0; p < kPackets; ++p) *slot(step, p) = part.raw[p].raw;
        }
      }
    }
    s = block_softmax<kThreads>(s, parity);
    const float base = base_of(s.max), lse = s.max + logf(s.sum);
    if (threadIdx.x == 0) {
      if (a.lse != nullptr) a.lse[row] = lse;
      if (a.nll != nullptr) a.nll[row] = kept ? lse - picked : 0.0f;
    }
    if constexpr (kGradient) {
      T* out = static_cast<T*>(a.d_logits) + row * a.stride;
      if (!kept) {
        Packet<T, V> zeros;
        zeros.zero();
        for (int p = threadIdx.x; p * V < classes; p += kThreads) zeros.store(out + p * V);
        continue;
      }
      const float factor = scale * (1.0f + 2.0f * a.z_coef * lse) / s.sum;
      part.store_gradient(out, first_of(steps - 1), classes, base, factor, scale, target);
      for (int step = steps - 2; step >= 0; --step) {
        if constexpr (V > 1) {
          if (step < held) {
#pragma unroll
            for (int p = 0; p < kPackets; ++p) part.raw[p].raw = *slot(step, p);
          }
        }
        if (step >= held) part.load(static_cast<const T*>(a.logits) + row * a.stride, first_of(step), classes);
        part.store_gradient(out, first_of(step), classes, base, factor, scale, target);
      }
    }
  }
}

__global__ void count_targets(const int32_t* targets, int64_t n, int64_t classes, int64_t ignore_index, int64_t* counts) {
  __shared__ long long kept, bad;
  if (threadIdx.x == 0) kept = 0, bad = n;
  __syncthreads();
  int mine = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const int64_t t = targets[i];
    if (t == ignore_index) continue;
    ++mine;
    if (t < 0 || t >= classes) atomicMin(&bad, static_cast<long long>(i));
  }
  mine = __reduce_add_sync(0xffffffffu, mine);  // 64-bit atomics of 1024 threads on one word in shared memory would take 40 us
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(&kept), static_cast<unsigned long long>(mine));  // whole numbers: in any order
  __syncthreads();
  if (threadIdx.x == 0) counts[0] = kept, counts[1] = bad;
}

constexpr int kSumThreads = 1024;
__global__ __launch_bounds__(kSumThreads) void sum_loss(const float* nll, const float* lse, const int32_t* targets, int64_t n,
                                                        int64_t ignore_index, double z_coef, const int64_t* counts, float* loss) {
  __shared__ double sums[kSumThreads];
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) {
    if (targets[i] != ignore_index) sum += nll[i] + z_coef * lse[i] * lse[i];
  }
  sums[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss = counts[0] > 0 ? static_cast<float>(sums[0] / static_cast<double>(counts[0])) : 0.0f;
}

template <typename T>
__global__ __launch_bounds__(256) void scale(T* x, int64_t n, const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;
  constexpr int V = kLanes<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, me = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = me; i < n / V; i += step) {
    Packet<T, V> packet;
    packet.raw = *reinterpret_cast<const uint4*>(x + i * V);
    float v[V];
    packet.unpack(v);
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] *= by;
    packet.pack(v);
    packet.store(x + i * V);
  }
  if (me < n % V) x[n - 1 - me] = from_float<T>(to_float(x[n - 1 - me]) * by);
}

template <typename T, int V, int kThreads, int kPackets>
int launch(const OryxCrossEntropyRows& a, cudaStream_t stream) {
  const int64_t most = static_cast<int64_t>(multiprocessors()) * (1024 / kThreads);
  const unsigned blocks = static_cast<unsigned>(a.rows < most ? a.rows : most);
  const int64_t steps = (a.classes + V * kThreads * kPackets - 1) / (V * kThreads * kPackets);
  const int held = V == 1 || a.d_logits == nullptr ? 0 : static_cast<int>(steps - 1 < kMaxHeld ? steps - 1 : kMaxHeld);
  const int bytes = held * kThreads * kPackets * 16;
  const auto kernel = a.d_logits != nullptr ? softmax_rows<T, V, kThreads, kPackets, true> : softmax_rows<T, V, kThreads, kPackets, false>;
  if (bytes > 0) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<blocks, kThreads, bytes, stream>>>(a, held);
  return cudaGetLastError();
}

template <typename T>
int rows_of(const OryxCrossEntropyRows& a, cudaStream_t stream) {
  constexpr int V = kLanes<T>;
  if (a.rows == 0) return cudaSuccess;
  if (a.classes > (1 << 30)) return cudaErrorInvalidValue;
  if (a.stride % V != 0 || !aligned16(a.logits) || !aligned16(a.d_logits)) return launch<T, 1, 1024, 8>(a, stream);
  return a.classes <= 1024 * V ? launch<T, V, 256, 4>(a, stream) : launch<T, V, 1024, 4>(a, stream);
}

}  // namespace
}  // namespace oryx::ops::cuda

using namespace oryx::ops::cuda;

int oryx_cross_entropy_count(const int32_t* targets, int64_t n, int64_t classes, int64_t ignore_index, int64_t* counts,
                             cudaStream_t stream) {
  count_targets<<<1, 1024, 0, stream>>>(targets, n, classes, ignore_index, counts);
  return cudaGetLastError();
}

int oryx_cross_entropy_rows(int dtype, const OryxCrossEntropyRows* rows, cudaStream_t stream) {
  return dtype == kBfloat16 ? rows_of<__nv_bfloat16>(*rows, stream) : rows_of<float>(*rows, stream);
}

int oryx_cross_entropy_loss(const float* nll, const float* lse, const int32_t* targets, int64_t n, int64_t ignore_index,
                            double z_coef, const int64_t* counts, float* loss, cudaStream_t stream) {
  sum_loss<<<1, kSumThreads, 0, stream>>>(nll, lse, targets, n, ignore_index, z_coef, counts, loss);
  return cudaGetLastError();
}

int oryx_scale(int dtype, void* x, int64_t n, const float* factor, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(multiprocessors() * 8);
  if (dtype == kBfloat16) {
    scale<<<blocks, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(x), n, factor);
  } else {
    scale<<<blocks, 256, 0, stream>>>(static_cast<float*>(x), n, factor);
  }
  return cudaGetLastError();
}
