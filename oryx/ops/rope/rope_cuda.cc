// Rotary position embedding on CUDA: hands tensors to the launcher of cuda/rope.cu. float64, for checks only, by the naive form.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "oryx/common/error.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/rope/cuda/rope_launch.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/rope/rope_internal.h"

namespace oryx::ops {
namespace {

// Positions below 0 are not looked for, which would wait for the device.
at::Tensor rotate(const at::Tensor& x_in, const at::Tensor& positions_in, double theta, int64_t rotary_dim, bool inverse) {
  if (x_in.numel() == 0) return at::empty_like(x_in, at::MemoryFormat::Contiguous);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor positions = positions_in.to(x_in.device()).contiguous();
  if (x_in.scalar_type() == at::kDouble) return rope_naive(x_in, inverse ? positions.neg() : positions, theta, rotary_dim);
  const at::Tensor x = x_in.stride(3) == 1 ? x_in : x_in.contiguous();
  const int64_t rotated = rotary_dim > 0 ? rotary_dim : x.size(3);
  if (rotated > kOryxRopeMaxRotaryDim) fail("rope: rotates {} values of a head, expected at most {} on CUDA", rotated, int{kOryxRopeMaxRotaryDim});
  const at::Tensor y = at::empty(x.sizes(), x.options());
  cuda::check("rope", oryx_rope(cuda::kernel_dtype("rope", x), x.const_data_ptr(), positions.const_data_ptr<int32_t>(), y.mutable_data_ptr(),
                                x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0), x.stride(1), x.stride(2), rotated, theta,
                                inverse ? 1 : 0, cuda::stream_of(x)));
  return y;
}

at::Tensor rope_cuda(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim) {
  check_rope(x, positions, theta, rotary_dim);
  return rotate(x, positions, theta, rotary_dim, false);
}

// The transpose of a rotation by an angle is the rotation by minus that angle.
struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& positions, double theta,
                            int64_t rotary_dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({positions});
    ctx->saved_data["theta"] = theta;
    ctx->saved_data["rotary_dim"] = rotary_dim;
    return rope_cuda(x, positions, theta, rotary_dim);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor dx = rotate(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["theta"].toDouble(),
                                 ctx->saved_data["rotary_dim"].toInt(), true);
    return {dx, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor rope_autograd(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim) {
  return RopeFunction::apply(x, positions, theta, rotary_dim);
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) { m.impl("rope", rope_cuda); }
TORCH_LIBRARY_IMPL(oryx, AutogradCUDA, m) { m.impl("rope", rope_autograd); }

}  // namespace oryx::ops
