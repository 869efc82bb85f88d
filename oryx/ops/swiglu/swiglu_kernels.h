// Vector kernels of SwiGLU: flat arrays of n elements. bfloat16 is passed as its bits, arithmetic is float32.
#pragma once

#include <cstdint>

namespace oryx::ops::kernels {

void swiglu_forward(const float* gate, const float* up, float* y, int64_t n);
void swiglu_forward(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t n);
// d_gate = d_y * up * silu'(gate), d_up = d_y * silu(gate)
void swiglu_backward(const float* d_y, const float* gate, const float* up, float* d_gate, float* d_up, int64_t n);
void swiglu_backward(const uint16_t* d_y, const uint16_t* gate, const uint16_t* up, uint16_t* d_gate, uint16_t* d_up,
                     int64_t n);

}  // namespace oryx::ops::kernels
