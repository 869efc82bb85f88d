// A float32 matrix as a sum of two in bfloat16, for products on a GPU that must be exact: hi + lo has 16 bits of mantissa.
//
//   hi = bf16(w),  lo = bf16(w - hi)
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::ops {

// parts [n_i, in] float32 on one GPU, one to four -> [2 sum n_i, in] bfloat16: the hi of all rows, then the lo of all. No gradients.
at::Tensor bfloat16_halves(at::TensorList parts);

}  // namespace oryx::ops
