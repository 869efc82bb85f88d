// What the devices' files of this operator share.
#pragma once

#include <ATen/core/Tensor.h>

#include "oryx/ops/adamw/adamw.h"

namespace oryx::ops {

// Checks one parameter's tensors; throws c10::Error.
void check_adamw(const at::Tensor& p, const at::Tensor& g, const at::Tensor& m, const at::Tensor& v);

// The formula in float64 by ATen, on any device.
void adamw_step_in_double(at::Tensor p, const at::Tensor& grad, at::Tensor m, at::Tensor v, int64_t step, const AdamwOptions& o,
                          double grad_scale);

}  // namespace oryx::ops
