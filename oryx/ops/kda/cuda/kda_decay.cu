// Log decays of every channel: bound by memory, one pass each way.
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/kda/cuda/kda_decay.h"

namespace oryx::ops::cuda {
namespace {

constexpr int kDecayThreads = 256, kDecayColumns = 64, kDecayRows = 64;  // backward: 64 threads of 4 channels beside one another, 4 rows at a time, 64 rows a block

// log(1 + e^x) without overflow, exact for small e^x.
__device__ __forceinline__ float decay_softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// Four channels a thread.
__global__ __launch_bounds__(kDecayThreads) void decay_forward(const float4* x, const float* A_log, const float4* dt_bias, float4* g, int64_t n, int units, int head_units) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kDecayThreads + threadIdx.x;
  if (i >= n) return;
  const int unit = static_cast<int>(i % units);
  const float f = -expf(A_log[unit / head_units]);
  const float4 a = x[i], b = dt_bias[unit];
  g[i] = make_float4(f * decay_softplus(a.x + b.x), f * decay_softplus(a.y + b.y), f * decay_softplus(a.z + b.z), f * decay_softplus(a.w + b.w));
}

// A block's sums go to partial[blockIdx.x], [2][width].
__global__ __launch_bounds__(kDecayThreads) void decay_backward(const float4* d_g, const float4* x, const float* A_log, const float4* dt_bias, float4* d_x, float* partial,
                                                                int64_t rows, int units, int head_units) {
  __shared__ float sums[kDecayThreads / kDecayColumns][kDecayColumns][8];
  const int column = threadIdx.x % kDecayColumns, slice = threadIdx.x / kDecayColumns, unit = blockIdx.y * kDecayColumns + column;
  float total[8] = {};  // of dt_bias, of A_log
  if (unit < units) {
    const float f = -expf(A_log[unit / head_units]);
    const float4 bias = dt_bias[unit];
    const float b[4] = {bias.x, bias.y, bias.z, bias.w};
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecayRows, end = first + kDecayRows < rows ? first + kDecayRows : rows;
#pragma unroll 4
    for (int64_t row = first + slice; row < end; row += kDecayThreads / kDecayColumns) {
      const float4 d4 = d_g[row * units + unit], x4 = x[row * units + unit];
      const float d[4] = {d4.x, d4.y, d4.z, d4.w}, v[4] = {x4.x, x4.y, x4.z, x4.w};
      float to[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float y = v[k] + b[k], dg = d[k] * f;
        to[k] = dg / (1.0f + expf(-y));
        total[k] += to[k];
        total[4 + k] += dg * decay_softplus(y);
      }
      d_x[row * units + unit] = make_float4(to[0], to[1], to[2], to[3]);
    }
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) sums[slice][column][k] = total[k];
  __syncthreads();
  if (slice != 0 || unit >= units) return;
#pragma unroll
  for (int s = 1; s < kDecayThreads / kDecayColumns; ++s)
#pragma unroll
    for (int k = 0; k < 8; ++k) total[k] += sums[s][column][k];
  float4* const to = reinterpret_cast<float4*>(partial) + static_cast<int64_t>(blockIdx.x) * 2 * units + unit;
  to[0] = make_float4(total[0], total[1], total[2], total[3]);
  to[units] = make_float4(total[4], total[5], total[6], total[7]);
}

__global__ __launch_bounds__(kReduceColumns* kReduceSlices) void decay_reduce(const float* partial, int64_t count, int64_t width, float* out) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x;
  const float total = reduce_column(partial, count, width, column);
  if (threadIdx.y == 0 && column < width) out[column] = total;
}

int64_t decay_blocks(int64_t rows) { return (rows + kDecayRows - 1) / kDecayRows; }

}  // namespace
}  // namespace oryx::ops::cuda

using namespace oryx::ops::cuda;

int oryx_kda_decay(const float* x, const float* A_log, const float* dt_bias, float* g, int64_t rows, int heads, int width, cudaStream_t stream) {
  const int64_t n = rows * width / 4, blocks = (n + kDecayThreads - 1) / kDecayThreads;
  if (blocks > 0)
    decay_forward<<<static_cast<unsigned>(blocks), kDecayThreads, 0, stream>>>(reinterpret_cast<const float4*>(x), A_log, reinterpret_cast<const float4*>(dt_bias),
                                                                               reinterpret_cast<float4*>(g), n, width / 4, width / heads / 4);
  return cudaGetLastError();
}

int64_t oryx_kda_decay_backward_workspace(int64_t rows, int width) { return decay_blocks(rows) * 2 * width; }

int oryx_kda_decay_backward(const float* d_g, const float* x, const float* A_log, const float* dt_bias, float* d_x, float* sums, float* workspace, int64_t rows, int heads,
                            int width, cudaStream_t stream) {
  const int units = width / 4;
  const int64_t blocks = decay_blocks(rows);
  if (blocks > 0)
    decay_backward<<<dim3(static_cast<unsigned>(blocks), (units + kDecayColumns - 1) / kDecayColumns), kDecayThreads, 0, stream>>>(
        reinterpret_cast<const float4*>(d_g), reinterpret_cast<const float4*>(x), A_log, reinterpret_cast<const float4*>(dt_bias), reinterpret_cast<float4*>(d_x), workspace,
        rows, units, width / heads / 4);
  const unsigned columns = static_cast<unsigned>((2 * width + kReduceColumns - 1) / kReduceColumns);
  decay_reduce<<<columns, dim3(kReduceColumns, kReduceSlices), 0, stream>>>(workspace, blocks, 2 * width, sums);
  return cudaGetLastError();
}
