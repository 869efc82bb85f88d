// Launchers of Kimi Delta Attention's log decays on CUDA. Formula and letters: oryx/ops/kda/kda_decay.h. Everything float32, contiguous, starting at a multiple of 16
// bytes; width = heads * K, K a multiple of 4; return a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {
// x [rows, width] -> g [rows, width]
int oryx_kda_decay(const float* x, const float* A_log, const float* dt_bias, float* g, int64_t rows, int heads, int width, cudaStream_t stream);
// The floats of workspace that the backward pass wants.
int64_t oryx_kda_decay_backward_workspace(int64_t rows, int width);
// sums [2, width]: the gradient of dt_bias, and what sums over a head's channels to that of A_log, added in an order that depends on the shape only.
int oryx_kda_decay_backward(const float* d_g, const float* x, const float* A_log, const float* dt_bias, float* d_x, float* sums, float* workspace, int64_t rows, int heads,
                            int width, cudaStream_t stream);
}
