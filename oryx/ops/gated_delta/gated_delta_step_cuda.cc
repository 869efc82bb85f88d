// The one-token step of the gated delta rule on CUDA: hands tensors to the launcher of cuda/gated_delta_step.cu. float64, for checks only, by tensor operations.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/gated_delta/cuda/gated_delta_step.h"
#include "oryx/ops/gated_delta/gated_delta_internal.h"

namespace oryx::ops {
namespace {

at::Tensor step_cuda(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& g_in, const at::Tensor& beta_in, at::Tensor& state,
                     std::optional<double> scale, double l2_eps) {
  const at::NoGradGuard no_grad;
  const gated_delta::Problem p = gated_delta::check_step("gated_delta_step", q_in, k_in, v_in, g_in, beta_in, state, scale, l2_eps);
  const c10::cuda::CUDAGuard guard(q_in.device());
  if (state.scalar_type() == at::kDouble) return gated_delta::plain_step(p, {q_in, k_in, v_in, g_in, beta_in, {}}, state);
  const at::Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous(), g = g_in.contiguous(), beta = beta_in.contiguous();
  const bool dense = state.stride(3) == 1 && state.stride(2) == p.K;
  at::Tensor S = dense ? state : state.contiguous();
  const int64_t N = q.size(0), Hq = q.size(1), Hk = k.size(1), Hv = v.size(1), V = v.size(2);
  at::Tensor o = at::empty({N, std::max({Hq, Hk, Hv}), V}, v.options());
  cuda::check("gated_delta_step",
              oryx_gated_delta_step(q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), g.const_data_ptr<float>(), beta.const_data_ptr<float>(),
                                    S.mutable_data_ptr<float>(), o.mutable_data_ptr(), cuda::kernel_dtype("gated_delta_step", v), N, Hq, Hk, Hv, p.K, V, S.stride(0),
                                    S.stride(1), static_cast<float>(p.scale), static_cast<float>(l2_eps), cuda::stream_of(q)));
  if (!dense) state.copy_(S);
  return o;
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) { m.impl("gated_delta_step", step_cuda); }

}  // namespace oryx::ops
