// Launchers of AdamW over many tensors on CUDA. Formula: oryx/ops/adamw/adamw.h. Return a cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {
// One parameter: p, m, v float32; g float32 or bfloat16; weight, the bfloat16 copy of p, or null. n elements, contiguous.
struct OryxAdamwTensor {
  float *p, *m, *v;
  const void* g;
  void* weight;
  int64_t n;
  int64_t g_dtype;  // 0 float32, 1 bfloat16
};
// The step's constants, made in double.
struct OryxAdamwConstants {
  float grad_scale, keep, beta1, one_less_beta1, beta2, one_less_beta2, step_size, inverse_root, eps;
};
// Updates p, m, v and weight of all `count` tensors (an array on the host), up to 400 a launch.
int oryx_adamw(const struct OryxAdamwTensor* tensors, int64_t count, const struct OryxAdamwConstants* constants,
               cudaStream_t stream);

// The doubles of workspace that oryx_sum_of_squares wants, and the sum of squares of all g's into *total (on the device), added
// in double in an order that depends on the shapes only.
int64_t oryx_sum_of_squares_workspace(const struct OryxAdamwTensor* tensors, int64_t count);
int oryx_sum_of_squares(const struct OryxAdamwTensor* tensors, int64_t count, double* workspace, double* total,
                        cudaStream_t stream);
}
