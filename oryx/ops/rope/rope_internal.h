// What the devices' files of this operator share.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::ops {

// Throws oryx::Error, one line, on arguments that do not fit the contract in rope.h.
void check_rope(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim);

}  // namespace oryx::ops
