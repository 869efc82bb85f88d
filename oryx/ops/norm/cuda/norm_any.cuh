// RMSNorm and its forms over rows of any length and alignment: one block a row, element by element.
#pragma once

#include "oryx/ops/norm/cuda/norm_common.cuh"

namespace oryx::ops::cuda {
namespace {

__device__ __forceinline__ float block_sum(float x) {
  __shared__ float sums[kThreads / 32];
  x = warp_sum<32>(x);
  __syncthreads();  // the sums of the call before are read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += sums[i];
  return total;
}

template <typename T, int kForm>
__global__ __launch_bounds__(kThreads) void norm_forward_any(const Forward a) {
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + row * a.dim;
    const T* other = static_cast<const T*>(kForm == kAdd ? a.residual : a.gate);
    if (kForm != kPlain) other += row * a.dim;
    const auto value = [&](int64_t c) {
      const float v = to_float(x[c]);
      if (kForm == kAdd) return v + to_float(other[c]);
      if (kForm == kGateFirst) return v * silu(to_float(other[c]));
      return v;
    };
    float squares = 0.0f;
    for (int64_t c = threadIdx.x; c < a.dim; c += kThreads) squares += value(c) * value(c);
    const float rstd = rsqrtf(block_sum(squares) * a.inverse_dim + a.eps);
    if (threadIdx.x == 0) a.rstd[row] = rstd;
    for (int64_t c = threadIdx.x; c < a.dim; c += kThreads) {
      const float v = value(c);
      float y = v * rstd * (load_any(a.weight, a.weight_dtype, row % a.groups * a.dim + c) + a.weight_offset);
      if (kForm == kGateAfter) y *= silu(to_float(other[c]));
      if (kForm == kAdd) static_cast<T*>(a.sum)[row * a.dim + c] = from_float<T>(v);
      static_cast<T*>(a.y)[row * a.dim + c] = from_float<T>(y);
    }
  }
}

template <typename T, int kForm>
__global__ __launch_bounds__(kThreads) void norm_backward_any(const Backward a) {
  float* partial = a.partial + (static_cast<int64_t>(blockIdx.x) * a.groups + blockIdx.y) * a.dim;
  for (int64_t c = threadIdx.x; c < a.dim; c += kThreads) partial[c] = 0.0f;
  for (int64_t i = blockIdx.x; i < a.per_group; i += gridDim.x) {
    const int64_t row = i * a.groups + blockIdx.y, at = row * a.dim;
    const float rstd = a.rstd[row];
    const auto get = [&](int64_t c) {
      return element<kForm>(to_float(static_cast<const T*>(a.d_y)[at + c]), to_float(static_cast<const T*>(a.x)[at + c]),
                            kForm == kPlain ? 0.0f : to_float(static_cast<const T*>(a.gate)[at + c]), rstd);
    };
    const auto weight = [&](int64_t c) {
      return load_any(a.weight, a.weight_dtype, blockIdx.y * a.dim + c) + a.weight_offset;
    };
    float dot = 0.0f;
    for (int64_t c = threadIdx.x; c < a.dim; c += kThreads) {
      const Element e = get(c);
      partial[c] += e.h * e.n;  // this thread's own column
      dot += e.h * e.n * weight(c);
    }
    const float mean = block_sum(dot) * a.inverse_dim;
    for (int64_t c = threadIdx.x; c < a.dim; c += kThreads) {
      float d_x, d_gate = 0.0f;
      finish<kForm>(get(c), weight(c), rstd, mean, d_x, d_gate);
      if (a.d_sum != nullptr) d_x += to_float(static_cast<const T*>(a.d_sum)[at + c]);
      static_cast<T*>(a.d_x)[at + c] = from_float<T>(d_x);
      if (kForm != kPlain) static_cast<T*>(a.d_gate)[at + c] = from_float<T>(d_gate);
    }
  }
}

}  // namespace
}  // namespace oryx::ops::cuda
