#include "oryx/ops/rope/rope.h"

#include <ATen/ATen.h>

namespace oryx::ops {

at::Tensor rope_naive(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim) {
  const int64_t d = rotary_dim > 0 ? rotary_dim : x.size(3), half = d / 2;
  const at::Tensor m = at::arange(half, x.options().dtype(at::kDouble));
  const at::Tensor w = at::pow(at::scalar_tensor(theta, m.options()), m * (-2.0 / static_cast<double>(d)));  // [half]
  const at::Tensor angle = positions.to(at::kDouble).unsqueeze(-1) * w;  // [B, T, half]
  const auto inner = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor c = angle.cos().unsqueeze(2).to(inner), s = angle.sin().unsqueeze(2).to(inner);  // [B, T, 1, half]
  const at::Tensor a = x.narrow(3, 0, half).to(inner), b = x.narrow(3, half, half).to(inner);
  const at::Tensor rest = x.narrow(3, d, x.size(3) - d).to(inner);
  return at::cat({a * c - b * s, b * c + a * s, rest}, 3).to(x.scalar_type());
}

}  // namespace oryx::ops
