// Launchers of SwiGLU on CUDA. dtype: 0 float32, 1 bfloat16. All arrays contiguous, n elements. Return a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {
int oryx_swiglu_forward(int dtype, const void* gate, const void* up, void* y, int64_t n, cudaStream_t stream);
int oryx_swiglu_backward(int dtype, const void* d_y, const void* gate, const void* up, void* d_gate, void* d_up, int64_t n,
                         cudaStream_t stream);
}
