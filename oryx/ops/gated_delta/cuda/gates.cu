// Decay and write strength of the gated delta rule: a few bytes a token, so that what counts is to be one launch each way.
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/gated_delta/cuda/gates_launch.h"

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 256, kRows = 128;  // rows of a block in the backward pass

// log(1 + e^x) without overflow, exact for small e^x.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__global__ __launch_bounds__(kThreads) void forward(const float* ba, const float* A_log, const float* dt_bias, float strength, float* g, float* beta,
                                                    int64_t rows, int heads) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * heads) return;
  const int64_t row = i / heads;
  const int h = static_cast<int>(i - row * heads);
  const float* from = ba + row * 2 * heads;
  beta[i] = strength / (1.0f + expf(-from[h]));
  g[i] = -expf(A_log[h]) * softplus(from[heads + h] + dt_bias[h]);
}

// A thread goes down one head's column in steps; the block's sums of d A_log and d dt_bias go to partial[block].
__global__ __launch_bounds__(kThreads) void backward(const float* d_g, const float* d_beta, const float* ba, const float* A_log, const float* dt_bias,
                                                     float strength, float* d_ba, float* partial, int64_t rows, int heads) {
  extern __shared__ float sums[];  // [2][kThreads]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, end = first + kRows < rows ? first + kRows : rows;
  for (int h0 = 0; h0 < heads; h0 += kThreads) {
    const int width = heads - h0 < kThreads ? heads - h0 : kThreads, lanes = kThreads / width;  // threads of a head
    const int h = h0 + static_cast<int>(threadIdx.x) % width, lane = static_cast<int>(threadIdx.x) / width;
    float d_A = 0.0f, d_bias = 0.0f;
    if (lane < lanes) {
      const float decay = -expf(A_log[h]), bias = dt_bias[h];
      for (int64_t row = first + lane; row < end; row += lanes) {
        const float* from = ba + row * 2 * heads;
        const float s = 1.0f / (1.0f + expf(-from[h])), x = from[heads + h] + bias;
        const float dg = d_g[row * heads + h], dx = dg * decay / (1.0f + expf(-x));
        d_ba[row * 2 * heads + h] = d_beta[row * heads + h] * strength * s * (1.0f - s);
        d_ba[row * 2 * heads + heads + h] = dx;
        d_A += dg * decay * softplus(x);
        d_bias += dx;
      }
    }
    sums[threadIdx.x] = d_A, sums[kThreads + threadIdx.x] = d_bias;
    __syncthreads();
    if (lane == 0) {
      for (int l = 1; l < lanes; ++l) d_A += sums[l * width + threadIdx.x], d_bias += sums[kThreads + l * width + threadIdx.x];
      partial[static_cast<int64_t>(blockIdx.x) * 2 * heads + h] = d_A;
      partial[static_cast<int64_t>(blockIdx.x) * 2 * heads + heads + h] = d_bias;
    }
    __syncthreads();
  }
}

__global__ __launch_bounds__(kReduceColumns* kReduceSlices) void reduce(const float* partial, int64_t count, int64_t width, float* out) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x;
  const float total = reduce_column(partial, count, width, column);
  if (threadIdx.y == 0 && column < width) out[column] = total;
}

int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

}  // namespace
}  // namespace oryx::ops::cuda

using namespace oryx::ops::cuda;

int oryx_gates_forward(const float* ba, const float* A_log, const float* dt_bias, float strength, float* g, float* beta, int64_t rows, int heads,
                       cudaStream_t stream) {
  const int64_t blocks = (rows * heads + kThreads - 1) / kThreads;
  if (blocks > 0) forward<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(ba, A_log, dt_bias, strength, g, beta, rows, heads);
  return cudaGetLastError();
}

int64_t oryx_gates_backward_workspace(int64_t rows, int heads) { return blocks_of(rows) * 2 * heads; }

int oryx_gates_backward(const float* d_g, const float* d_beta, const float* ba, const float* A_log, const float* dt_bias, float strength, float* d_ba,
                        float* d_sums, float* workspace, int64_t rows, int heads, cudaStream_t stream) {
  const int64_t blocks = blocks_of(rows);
  if (blocks > 0) {
    backward<<<static_cast<unsigned>(blocks), kThreads, 2 * kThreads * sizeof(float), stream>>>(d_g, d_beta, ba, A_log, dt_bias, strength, d_ba, workspace,
                                                                                             rows, heads);
  }
  const unsigned columns = static_cast<unsigned>((2 * heads + kReduceColumns - 1) / kReduceColumns);
  reduce<<<columns, dim3(kReduceColumns, kReduceSlices), 0, stream>>>(workspace, blocks, 2 * heads, d_sums);
  return cudaGetLastError();
}
