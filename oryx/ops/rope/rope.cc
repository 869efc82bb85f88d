#include "oryx/ops/rope/rope.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/ops/rope/rope_internal.h"
#include "oryx/ops/rope/rope_kernels.h"
#include "oryx/ops/rope/rope_table.h"

namespace oryx::ops {

void check_rope(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim) {
  if (x.dim() != 4) fail("rope: x has {} dimensions, expected 4: [B, T, H, d]", x.dim());
  const auto dtype = x.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kDouble) {
    fail("rope: x is {}, expected float32, bfloat16 or float64", c10::toString(dtype));
  }
  if (positions.scalar_type() != at::kInt || positions.dim() != 2 || positions.size(0) != x.size(0) ||
      positions.size(1) != x.size(1)) {
    fail("rope: positions is {} of shape {}, expected Int of [B, T] = [{}, {}]", c10::toString(positions.scalar_type()),
         c10::str(positions.sizes()), x.size(0), x.size(1));
  }
  const int64_t d = x.size(3), rotated = rotary_dim > 0 ? rotary_dim : d;
  if (rotary_dim < 0 || rotated > d || rotated % 2 != 0) {
    fail("rope: rotates {} of {} values of a head, expected an even number of them",
         rotary_dim < 0 ? rotary_dim : rotated, d);
  }
  if (!std::isfinite(theta) || theta <= 0) fail("rope: theta is {}, expected a positive number", theta);
}

namespace {

// x [B, T, H, d] of float32, positions [B, T] contiguous.
at::Tensor rotate_float(const at::Tensor& x_in, const at::Tensor& positions, double theta, int64_t rotary_dim,
                        float sign) {
  const at::Tensor x = x_in.stride(3) == 1 ? x_in : x_in.contiguous();
  const int64_t B = x.size(0), T = x.size(1), H = x.size(2), d = x.size(3), half = rotary_dim / 2;
  at::Tensor y = at::empty({B, T, H, d}, x.options());
  const int32_t* position = positions.const_data_ptr<int32_t>();
  const auto table = rope_table(position, B * T, theta, rotary_dim);
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, H * d));
  at::parallel_for(0, B * T, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = table->rows.empty() ? position[i] : table->rows[static_cast<size_t>(i)];
      rope_cpu::rotate_token(table->cosine.data() + row * half, table->sine.data() + row * half, sign,
                             in + (i / T) * x.stride(0) + (i % T) * x.stride(1), out + i * H * d, H, x.stride(2), d,
                             half, d);
    }
  });
  return y;
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& positions_in, double theta, int64_t rotary_dim, int sign) {
  if (x.numel() == 0) return at::empty_like(x, at::MemoryFormat::Contiguous);
  const at::Tensor positions = positions_in.contiguous();
  if (positions.min().item<int>() < 0) fail("rope: position {}, expected none below 0", positions.min().item<int>());
  if (x.scalar_type() == at::kDouble) return rope_naive(x, sign < 0 ? positions.neg() : positions, theta, rotary_dim);
  const int64_t rotated = rotary_dim > 0 ? rotary_dim : x.size(3);
  const at::Tensor y = rotate_float(x.to(at::kFloat), positions, theta, rotated, static_cast<float>(sign));
  return y.to(x.scalar_type());
}

at::Tensor rope_cpu_kernel(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim) {
  check_rope(x, positions, theta, rotary_dim);
  return rotate(x, positions, theta, rotary_dim, 1);
}

// The transpose of a rotation by an angle is the rotation by minus that angle.
struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& positions,
                            double theta, int64_t rotary_dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({positions});
    ctx->saved_data["theta"] = theta;
    ctx->saved_data["rotary_dim"] = rotary_dim;
    return rope_cpu_kernel(x, positions, theta, rotary_dim);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const at::Tensor positions = ctx->get_saved_variables()[0];
    const at::Tensor dx =
        rotate(grads[0], positions, ctx->saved_data["theta"].toDouble(), ctx->saved_data["rotary_dim"].toInt(), -1);
    return {dx, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor rope_autograd(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim) {
  return RopeFunction::apply(x, positions, theta, rotary_dim);
}

}  // namespace

at::Tensor rope(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("oryx::rope", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, double, int64_t)>();
  return op.call(x, positions, theta, rotary_dim);
}

at::Tensor sequence_positions(int64_t B, int64_t T, const std::optional<at::Tensor>& cu_seqlens,
                              const std::optional<at::Tensor>& offset) {
  at::Tensor positions = at::arange(T, at::kInt).unsqueeze(0).repeat({B, 1});
  if (!cu_seqlens) return offset ? positions + offset->to(at::kInt).view({B, 1}) : positions;
  if (B != 1) fail("sequence_positions: cu_seqlens with {} rows, expected packed sequences in one row", B);
  const at::Tensor cu = cu_seqlens->to(at::kLong);
  const int64_t sequences = cu.numel() - 1;
  const at::Tensor lengths = cu.diff();
  if (sequences < 0 || cu[0].item<int64_t>() != 0 || cu[-1].item<int64_t>() != T || (lengths < 0).any().item<bool>()) {
    fail("sequence_positions: cu_seqlens does not rise from 0 to the {} tokens", T);
  }
  at::Tensor shift = -cu.narrow(0, 0, sequences);  // [N]
  if (offset) shift = shift + offset->to(at::kLong).view({sequences});
  return positions + shift.repeat_interleave(lengths).to(at::kInt).unsqueeze(0);
}

}  // namespace oryx::ops

TORCH_LIBRARY_FRAGMENT(oryx, m) { m.def("rope(Tensor x, Tensor positions, float theta, int rotary_dim=0) -> Tensor"); }
TORCH_LIBRARY_IMPL(oryx, CPU, m) { m.impl("rope", oryx::ops::rope_cpu_kernel); }
TORCH_LIBRARY_IMPL(oryx, AutogradCPU, m) { m.impl("rope", oryx::ops::rope_autograd); }
