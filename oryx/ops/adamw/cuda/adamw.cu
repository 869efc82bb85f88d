// AdamW over many tensors, and the sum of squares for clipping. Bound by memory: p, m, v read and written, g read, the
// bfloat16 weight written. The list of tensors travels as a kernel parameter: no copy to the device, and a captured graph keeps it.
#include "oryx/ops/adamw/cuda/adamw_launch.h"
#include "oryx/ops/cuda/packet.cuh"

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 8, kChunk = 4 * kThreads * kPerThread, kMaxTensors = 400;

struct List {
  OryxAdamwTensor tensor[kMaxTensors];
  int first_chunk[kMaxTensors + 1];  // of each tensor; the last entry is the number of chunks
  int count;
};
static_assert(sizeof(List) + sizeof(OryxAdamwConstants) < 32000, "kernel parameters end at 32,764 bytes");

__device__ __forceinline__ int find_tensor(const List& list, int chunk) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ __forceinline__ void update(const OryxAdamwConstants& c, float& p, float& m, float& v, float g) {
  g *= c.grad_scale;
  m = c.beta1 * m + c.one_less_beta1 * g;
  v = c.beta2 * v + c.one_less_beta2 * g * g;
  p = p * c.keep - c.step_size * (m / (sqrtf(v) * c.inverse_root + c.eps));
}

// Four consecutive elements of a thread: a warp's accesses are then contiguous.
__device__ __forceinline__ void load4(const float* from, float (&out)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
}
__device__ __forceinline__ void store4(const float (&x)[4], float* to) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void load_gradient(const void* g, int dtype, int64_t i, float (&out)[4]) {
  if (dtype == kFloat32) return load4(static_cast<const float*>(g) + i, out);
  const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(g) + i);
  out[0] = __uint_as_float(raw.x << 16), out[1] = __uint_as_float(raw.x & 0xffff0000u);
  out[2] = __uint_as_float(raw.y << 16), out[3] = __uint_as_float(raw.y & 0xffff0000u);
}
__device__ __forceinline__ void store_weight(const float (&x)[4], void* weight, int64_t i) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]), high = __floats2bfloat162_rn(x[2], x[3]);
  *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(weight) + i) =
      make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
}

__device__ __forceinline__ bool aligned(const OryxAdamwTensor& t) {
  const auto bits = reinterpret_cast<uintptr_t>(t.p) | reinterpret_cast<uintptr_t>(t.m) | reinterpret_cast<uintptr_t>(t.v) |
                    reinterpret_cast<uintptr_t>(t.g) | reinterpret_cast<uintptr_t>(t.weight);
  return (bits & 15) == 0;
}

__device__ __forceinline__ void update_chunk(const List& list, const OryxAdamwTensor& t, int index, const OryxAdamwConstants& c) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x - list.first_chunk[index]) * kChunk;
  const int64_t end = begin + kChunk < t.n ? begin + kChunk : t.n;
  const int dtype = t.g_dtype;
  constexpr int kUnits = kPerThread / 4;
  int64_t done = begin;  // up to here in packets
  if (aligned(t)) {
    done = begin + (end - begin) / 4 * 4;
    for (int64_t first = begin + threadIdx.x * 4; first < done; first += kThreads * kPerThread) {
      float p[kUnits][4], m[kUnits][4], v[kUnits][4], g[kUnits][4];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int64_t i = first + u * kThreads * 4;
        if (i >= done) break;
        load4(t.p + i, p[u]), load4(t.m + i, m[u]), load4(t.v + i, v[u]);
        load_gradient(t.g, dtype, i, g[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int64_t i = first + u * kThreads * 4;
        if (i >= done) break;
#pragma unroll
        for (int k = 0; k < 4; ++k) update(c, p[u][k], m[u][k], v[u][k], g[u][k]);
        store4(p[u], t.p + i), store4(m[u], t.m + i), store4(v[u], t.v + i);
        if (t.weight != nullptr) store_weight(p[u], t.weight, i);
      }
    }
  }
  for (int64_t i = done + threadIdx.x; i < end; i += kThreads) {
    float p = t.p[i], m = t.m[i], v = t.v[i];
    update(c, p, m, v, load_any(t.g, dtype, i));
    t.p[i] = p, t.m[i] = m, t.v[i] = v;
    if (t.weight != nullptr) static_cast<__nv_bfloat16*>(t.weight)[i] = __float2bfloat16_rn(p);
  }
}

__global__ __launch_bounds__(kThreads) void adamw(const __grid_constant__ List list,
                                                  const __grid_constant__ OryxAdamwConstants c) {
  const int index = find_tensor(list, blockIdx.x);
  const OryxAdamwTensor t = list.tensor[index];  // a copy: its pointers stay in registers
  update_chunk(list, t, index, c);
}

__global__ __launch_bounds__(kThreads) void adamw_controlled(const __grid_constant__ List list, const OryxAdamwControl* control) {
  if (control->taken == 0.0) return;
  const int index = find_tensor(list, blockIdx.x);
  const OryxAdamwTensor t = list.tensor[index];
  OryxAdamwConstants c = control->constants;
  if (t.decays == 0) c.keep = 1.0f;
  update_chunk(list, t, index, c);
}

// One thread: everything in double, as the host does for the other form.
__global__ void decide(const double* sum_of_squares, const float* loss, const __grid_constant__ OryxAdamwRates r, OryxAdamwControl* control) {
  const double norm = sqrt(*sum_of_squares), value = loss != nullptr ? static_cast<double>(*loss) : 0.0;
  const bool taken = isfinite(norm) && isfinite(value);
  const double n = control->steps + (taken ? 1.0 : 0.0);
  control->loss = value, control->norm = norm, control->taken = taken ? 1.0 : 0.0, control->steps = n;
  const double lr = r.lr < 0 ? control->lr : r.lr;
  OryxAdamwConstants& c = control->constants;
  c.grad_scale = static_cast<float>(r.clip > 0 && norm > r.clip ? r.clip / norm : 1.0);
  c.keep = static_cast<float>(1 - lr * r.weight_decay);
  c.beta1 = static_cast<float>(r.beta1), c.one_less_beta1 = static_cast<float>(1 - r.beta1);
  c.beta2 = static_cast<float>(r.beta2), c.one_less_beta2 = static_cast<float>(1 - r.beta2);
  c.step_size = static_cast<float>(lr / (1 - pow(r.beta1, n)));
  c.inverse_root = static_cast<float>(1 / sqrt(1 - pow(r.beta2, n)));
  c.eps = static_cast<float>(r.eps);
}

// The sum over the block's threads, valid in thread 0.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double sums[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += sums[i];
  return total;
}

__global__ __launch_bounds__(kThreads) void sum_of_squares(const __grid_constant__ List list, double* partial) {
  const int index = find_tensor(list, blockIdx.x);
  const OryxAdamwTensor& t = list.tensor[index];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - list.first_chunk[index]) * kChunk;
  const int64_t end = begin + kChunk < t.n ? begin + kChunk : t.n;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x * kPerThread; i < end; i += kThreads * kPerThread) {
    if (i + kPerThread <= end) {
      float g[kPerThread];
      load_any(t.g, t.g_dtype, i, g);
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) sum += static_cast<double>(g[k]) * g[k];
    } else {
      for (int64_t k = i; k < end; ++k) {
        const double g = load_any(t.g, t.g_dtype, k);
        sum += g * g;
      }
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ __launch_bounds__(kThreads) void add_partial(const double* partial, int64_t count, double* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total = sum;
}

int64_t chunks_of(const OryxAdamwTensor& t) { return (t.n + kChunk - 1) / kChunk; }

// Calls launch(list, chunks) for each group of tensors that fits into one launch.
template <typename F>
void for_lists(const OryxAdamwTensor* tensors, int64_t count, F&& launch) {
  List list;
  list.count = 0;
  int64_t chunks = 0;
  const auto flush = [&] {
    list.first_chunk[list.count] = static_cast<int>(chunks);
    if (chunks > 0) launch(list, static_cast<unsigned>(chunks));
    list.count = 0, chunks = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].n == 0) continue;
    if (list.count == kMaxTensors || chunks + chunks_of(tensors[i]) > 0x7fffffff) flush();
    list.tensor[list.count] = tensors[i];
    list.first_chunk[list.count++] = static_cast<int>(chunks);
    chunks += chunks_of(tensors[i]);
  }
  flush();
}

}  // namespace
}  // namespace oryx::ops::cuda

using namespace oryx::ops::cuda;

int oryx_adamw(const OryxAdamwTensor* tensors, int64_t count, const OryxAdamwConstants* constants, cudaStream_t stream) {
  for_lists(tensors, count, [&](const List& list, unsigned chunks) {
    adamw<<<chunks, kThreads, 0, stream>>>(list, *constants);
  });
  return cudaGetLastError();
}

int oryx_adamw_control(const double* sum_of_squares, const float* loss, const OryxAdamwRates* rates, OryxAdamwControl* control,
                       cudaStream_t stream) {
  decide<<<1, 1, 0, stream>>>(sum_of_squares, loss, *rates, control);
  return cudaGetLastError();
}

int oryx_adamw_controlled(const OryxAdamwTensor* tensors, int64_t count, const OryxAdamwControl* control, cudaStream_t stream) {
  for_lists(tensors, count, [&](const List& list, unsigned chunks) { adamw_controlled<<<chunks, kThreads, 0, stream>>>(list, control); });
  return cudaGetLastError();
}

int64_t oryx_sum_of_squares_workspace(const OryxAdamwTensor* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(tensors[i]);
  return chunks;
}

int oryx_sum_of_squares(const OryxAdamwTensor* tensors, int64_t count, double* workspace, double* total,
                        cudaStream_t stream) {
  int64_t done = 0;
  for_lists(tensors, count, [&](const List& list, unsigned chunks) {
    sum_of_squares<<<chunks, kThreads, 0, stream>>>(list, workspace + done);
    done += chunks;
  });
  add_partial<<<1, kThreads, 0, stream>>>(workspace, done, total);
  return cudaGetLastError();
}
