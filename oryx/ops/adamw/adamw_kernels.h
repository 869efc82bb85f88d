// Vector kernels of AdamW: flat arrays of n float32.
#pragma once

#include <cstdint>

namespace oryx::ops::kernels {

// The step's constants, made in double.
struct AdamwConstants {
  float grad_scale;
  float keep;  // 1 - lr * weight_decay
  float beta1, one_less_beta1;
  float beta2, one_less_beta2;
  float step_size;     // lr / (1 - beta1^n)
  float inverse_root;  // 1 / sqrt(1 - beta2^n)
  float eps;
};

void adamw(const AdamwConstants& c, float* p, const float* g, float* m, float* v, int64_t n);

// Sum of squares, in double.
double sum_of_squares(const float* x, int64_t n);

}  // namespace oryx::ops::kernels
