// What the files that register CUDA kernels (*_cuda.cc) share.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <optional>

namespace oryx::ops::cuda {

// The dtype as launchers take it: 0 float32, 1 bfloat16.
inline int kernel_dtype(const char* op, const at::Tensor& x) {
  if (x.scalar_type() == at::kFloat) return 0;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, op, ": no CUDA kernel for ", x.scalar_type(), ", expected float32 or bfloat16");
  return 1;
}

// x as a launcher wants a small parameter (a weight): contiguous, float32 or bfloat16.
inline at::Tensor as_parameter(const at::Tensor& x) {
  const auto t = x.scalar_type();
  return (t == at::kFloat || t == at::kBFloat16 ? x : x.to(at::kFloat)).contiguous();
}

inline void check(const char* op, int error) {
  TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

inline cudaStream_t stream_of(const at::Tensor& x) { return c10::cuda::getCurrentCUDAStream(x.device().index()).stream(); }

inline const void* read_or_null(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
inline void* write_or_null(const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; }

}  // namespace oryx::ops::cuda
