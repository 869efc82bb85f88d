// Vector kernel of the rotary embedding. No torch headers: pointers and strides (in elements).
#pragma once

#include <cstdint>

namespace oryx::ops::rope_cpu {

// One token: rotates the first 2 * half of `dim` values of each of `heads` heads and copies the rest.
// cosine, sine [half]; sign -1 rotates back.
void rotate_token(const float* cosine, const float* sine, float sign, const float* x, float* y, int64_t heads,
                  int64_t x_head_stride, int64_t y_head_stride, int64_t half, int64_t dim);

}  // namespace oryx::ops::rope_cpu
