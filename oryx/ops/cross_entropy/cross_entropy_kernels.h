// Vector kernels of cross-entropy on rows of logits [rows, classes]. bfloat16 is passed as its bits, arithmetic is
// float32.
#pragma once

#include <cstdint>

namespace oryx::ops::kernels {

// What softmax needs of each row; every pointer [rows].
struct SoftmaxRows {
  const int64_t* targets;  // ignore_index, or a class
  int64_t classes, ignore_index;
  float *nll, *lse;
  float *max, *inverse_sum;  // p_c = exp(x_c - max) * inverse_sum
};

// Fills nll, lse, max and inverse_sum of rows [begin, end): one pass over memory (the maximum is found as it goes).
void softmax_forward(const SoftmaxRows& rows, const float* logits, int64_t begin, int64_t end);
void softmax_forward(const SoftmaxRows& rows, const uint16_t* logits, int64_t begin, int64_t end);

// d_logits = scale * (p * (1 + 2 z_coef lse) - [c = target]), 0 in ignored rows. d_logits may be logits.
void softmax_backward(const SoftmaxRows& rows, const float* logits, float* d_logits, float scale, float z_coef,
                      int64_t begin, int64_t end);
void softmax_backward(const SoftmaxRows& rows, const uint16_t* logits, uint16_t* d_logits, float scale, float z_coef,
                      int64_t begin, int64_t end);

}  // namespace oryx::ops::kernels
