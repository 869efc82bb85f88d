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
  int32_t g_dtype;  // 0 float32, 1 bfloat16
  int32_t decays;   // 0: without weight decay
};
// The step's constants, made in double.
struct OryxAdamwConstants {
  float grad_scale, keep, beta1, one_less_beta1, beta2, one_less_beta2, step_size, inverse_root, eps;
};
// A step decided on the device. Rates and clipping as in adamw.h; `clip` 0: none; `lr` below 0: the control's.
struct OryxAdamwRates {
  double lr, beta1, beta2, eps, weight_decay, clip;
};
// What oryx_adamw_control leaves on the device. taken: 0 where loss or norm are not finite, and nothing is to be updated.
struct OryxAdamwControl {
  double loss, norm, taken, steps;  // steps: taken so far, this one included
  double lr;                        // read where the rates have none
  struct OryxAdamwConstants constants;
};
// From the sum of squares of the gradients, the loss (float32; null: 0) and the steps taken before (control->steps, in place).
int oryx_adamw_control(const double* sum_of_squares, const float* loss, const struct OryxAdamwRates* rates, struct OryxAdamwControl* control,
                       cudaStream_t stream);
// Updates as `control` (on the device) says; up to 400 tensors a launch.
int oryx_adamw_controlled(const struct OryxAdamwTensor* tensors, int64_t count, const struct OryxAdamwControl* control, cudaStream_t stream);
// Updates p, m, v and weight of all `count` tensors (an array on the host), up to 400 a launch. All decay as `constants` says.
int oryx_adamw(const struct OryxAdamwTensor* tensors, int64_t count, const struct OryxAdamwConstants* constants,
               cudaStream_t stream);

// The doubles of workspace that oryx_sum_of_squares wants, and the sum of squares of all g's into *total (on the device), added
// in double in an order that depends on the shapes only.
int64_t oryx_sum_of_squares_workspace(const struct OryxAdamwTensor* tensors, int64_t count);
int oryx_sum_of_squares(const struct OryxAdamwTensor* tensors, int64_t count, double* workspace, double* total,
                        cudaStream_t stream);
}
