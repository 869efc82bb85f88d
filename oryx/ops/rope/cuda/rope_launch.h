// Launcher of rotary position embedding on CUDA. Formula: oryx/ops/rope/rope.h. dtype of x and y: 0 float32, 1 bfloat16.
// Returns a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {
// The widest rotation: angles travel as a kernel parameter.
enum { kOryxRopeMaxRotaryDim = 512 };

// x: element (b, t, h, m) at x[b stride_b + t stride_t + h stride_h + m]; y [B, T, H, d] contiguous; positions [B, T] int32
// contiguous. Rotates the first rotary_dim of d values, by minus the angle if inverse (the backward pass).
int oryx_rope(int dtype, const void* x, const int32_t* positions, void* y, int64_t B, int64_t T, int64_t H, int64_t d,
              int64_t stride_b, int64_t stride_t, int64_t stride_h, int64_t rotary_dim, double theta, int inverse,
              cudaStream_t stream);
}
