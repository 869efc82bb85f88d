// Launchers of the causal short convolution on CUDA. Formula: oryx/ops/short_conv/short_conv.h. dtype (x, y, d_y, d_x, the
// states): 0 float32, 1 bfloat16; weight_dtype (weight, bias and their gradients) likewise. Widths 1 to 8.
//   x, y, d_y, d_x [B, T, C] contiguous; weight [C, w]; bias [C] or null; states [N, C, w - 1] or null (zeros)
//   cu_seqlens [N + 1] int32 on the device, or null: then N = B
// Return a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {
// final_state may be null.
int oryx_short_conv_forward(int dtype, int weight_dtype, const void* x, const void* weight, const void* bias,
                            const void* initial_state, const int32_t* cu_seqlens, void* y, void* final_state, int64_t B,
                            int64_t T, int64_t C, int64_t N, int width, int silu, cudaStream_t stream);

// The float32 elements of workspace that oryx_short_conv_backward wants.
int64_t oryx_short_conv_backward_workspace(int dtype, int64_t B, int64_t T, int64_t C, int width);

// d_final_state, d_bias and d_initial_state may be null. The gradients of weight and bias are the same from run to run.
int oryx_short_conv_backward(int dtype, int weight_dtype, const void* d_y, const void* d_final_state, const void* x,
                             const void* weight, const void* bias, const void* initial_state, const int32_t* cu_seqlens,
                             void* d_x, void* d_weight, void* d_bias, void* d_initial_state, float* workspace, int64_t B,
                             int64_t T, int64_t C, int64_t N, int width, int silu, cudaStream_t stream);

// One token of N sequences: x, y [N, C]; state [N, C, w - 1] is updated in place.
int oryx_short_conv_step(int dtype, int weight_dtype, int state_dtype, const void* x, const void* weight, const void* bias,
                         void* state, void* y, int64_t N, int64_t C, int width, int silu, cudaStream_t stream);
}
