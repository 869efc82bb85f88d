// Launchers of decay and write strength on CUDA. Formula and letters: oryx/ops/gated_delta/gates.h. Everything float32 and contiguous; return a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {
// ba [rows, 2 heads] -> g, beta [rows, heads]
int oryx_gates_forward(const float* ba, const float* A_log, const float* dt_bias, float strength, float* g, float* beta, int64_t rows, int heads,
                       cudaStream_t stream);
// The floats of workspace that the backward pass wants.
int64_t oryx_gates_backward_workspace(int64_t rows, int heads);
// d_sums [2, heads]: the gradients of A_log and dt_bias, added in an order that depends on the shape only.
int oryx_gates_backward(const float* d_g, const float* d_beta, const float* ba, const float* A_log, const float* dt_bias, float strength, float* d_ba,
                        float* d_sums, float* workspace, int64_t rows, int heads, cudaStream_t stream);
}
