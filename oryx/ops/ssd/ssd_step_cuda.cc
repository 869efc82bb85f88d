// The one-token step of SSD on CUDA: hands tensors to the launcher of cuda/ssd_step.cu. float64, for checks only, by tensor operations.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/ssd/cuda/ssd_step.h"
#include "oryx/ops/ssd/ssd_internal.h"

namespace oryx::ops {
namespace {

at::Tensor ssd_step_cuda(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& dt_raw, const at::Tensor& dt_bias,
                         const at::Tensor& A_log, const at::Tensor& D, at::Tensor& state) {
  TORCH_CHECK(q_in.dim() == 3 && k_in.dim() == 3 && v_in.dim() == 3 && dt_raw.dim() == 2, "ssd_step: q, k, v must be [N, heads, dim] and dt_raw [N, Hs], got ",
              q_in.sizes(), ", ", k_in.sizes(), ", ", v_in.sizes(), ", ", dt_raw.sizes());
  const SsdInputs in{q_in.unsqueeze(1), k_in.unsqueeze(1), v_in.unsqueeze(1), dt_raw.unsqueeze(1), dt_bias, A_log, D, state, {}, {}};
  const SsdSizes s = ssd_sizes("ssd_step", in);
  const c10::cuda::CUDAGuard guard(q_in.device());
  if (v_in.scalar_type() == at::kDouble) return ssd_step_general(q_in, k_in, v_in, dt_raw, dt_bias, A_log, D, state);
  const auto wide = [](const at::Tensor& x) { return x.to(at::kFloat).contiguous(); };
  const at::Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous(), dt = wide(dt_raw), bias = wide(dt_bias), decay = wide(A_log), skip = wide(D);
  const bool dense = state.scalar_type() == at::kFloat && state.stride(3) == 1 && state.stride(2) == s.K;
  at::Tensor S = dense ? state : wide(state);
  at::Tensor o = at::empty({s.B, s.Ho, s.V}, v.options());
  cuda::check("ssd_step", oryx_ssd_step(q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), dt.const_data_ptr<float>(), bias.const_data_ptr<float>(),
                                        decay.const_data_ptr<float>(), skip.const_data_ptr<float>(), S.mutable_data_ptr<float>(), o.mutable_data_ptr(),
                                        cuda::kernel_dtype("ssd_step", v), s.B, s.Hq, s.Hk, s.Hv, s.K, s.V, S.stride(0), S.stride(1), cuda::stream_of(q)));
  if (!dense) state.copy_(S);
  return o;
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) { m.impl("ssd_step", ssd_step_cuda); }

}  // namespace oryx::ops
