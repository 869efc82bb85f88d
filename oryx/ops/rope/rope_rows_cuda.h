// The rotary table on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::ops {

// [rows, 2, rotary_dim / 2] float32 with at least n rows: cosines and sines of position p in row p, from float64 angles. Kept for the life of the process, one for each
// (device, theta, rotary_dim), and grown by powers of two; a grown one is a new tensor. Waits for the device only when it grows. Thread-safe.
at::Tensor rope_rows_on(at::Device device, int64_t n, double theta, int64_t rotary_dim);

}  // namespace oryx::ops
