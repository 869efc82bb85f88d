// What the devices' files of this operator share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>

#include "oryx/ops/adamw/adamw.h"

namespace oryx::ops {

// Checks one parameter's tensors; throws c10::Error.
void check_adamw(const at::Tensor& p, const at::Tensor& g, const at::Tensor& m, const at::Tensor& v);

// The formula in float64 by ATen, on any device.
void adamw_step_in_double(at::Tensor p, const at::Tensor& grad, at::Tensor m, at::Tensor v, int64_t step, const AdamwOptions& o,
                          double grad_scale);

// The constants of a step, made in double, as either device takes them (kernels::AdamwConstants, OryxAdamwConstants).
template <class Constants>
Constants adamw_constants(int64_t step, const AdamwOptions& o, double grad_scale) {
  const double n = static_cast<double>(step);
  Constants c{};
  c.grad_scale = static_cast<float>(grad_scale);
  c.keep = static_cast<float>(1 - o.lr * o.weight_decay);
  c.beta1 = static_cast<float>(o.beta1), c.one_less_beta1 = static_cast<float>(1 - o.beta1);
  c.beta2 = static_cast<float>(o.beta2), c.one_less_beta2 = static_cast<float>(1 - o.beta2);
  c.step_size = static_cast<float>(o.lr / (1 - std::pow(o.beta1, n)));
  c.inverse_root = static_cast<float>(1 / std::sqrt(1 - std::pow(o.beta2, n)));
  c.eps = static_cast<float>(o.eps);
  return c;
}

}  // namespace oryx::ops
