#include <ATen/ATen.h>

#include "oryx/ops/norm/norm.h"

namespace oryx::ops {
namespace {

at::Tensor at_least_float(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); }

at::Tensor unit_rms(const at::Tensor& x, double eps) { return x * at::rsqrt((x * x).mean(-1, /*keepdim=*/true) + eps); }

}  // namespace

at::Tensor rms_norm_naive(const at::Tensor& x, const at::Tensor& weight, double eps, bool zero_centred) {
  at::Tensor w = at_least_float(weight);
  if (zero_centred) w = w + 1;
  return (unit_rms(at_least_float(x), eps) * w).to(x.scalar_type());
}

at::Tensor gated_rms_norm_naive(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps,
                                bool gate_first, int64_t groups) {
  const at::Tensor silu = at_least_float(gate) * at::sigmoid(at_least_float(gate));
  at::Tensor u = gate_first ? at_least_float(x) * silu : at_least_float(x);
  const at::Tensor slices = u.unflatten(-1, {groups, u.size(-1) / groups});  // [..., groups, V / groups]
  at::Tensor y = unit_rms(slices, eps).flatten(-2) * at_least_float(weight);           // [..., V]
  if (!gate_first) y = y * silu;
  return y.to(x.scalar_type());
}

}  // namespace oryx::ops
