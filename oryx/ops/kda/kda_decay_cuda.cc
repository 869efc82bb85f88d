// Log decays on CUDA: hands tensors to the launchers of cuda/kda_decay.cu.
#include <torch/library.h>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/kda/cuda/kda_decay.h"

namespace oryx::ops {
namespace {

at::Tensor full_and_plain(const at::Tensor& x) {
  const at::Tensor y = x.to(at::kFloat).contiguous();
  return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0 ? y : y.clone();
}

at::Tensor kda_decay_cuda(const at::Tensor& x_in, const at::Tensor& A_log_in, const at::Tensor& dt_bias_in) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = full_and_plain(x_in), A_log = full_and_plain(A_log_in), dt_bias = full_and_plain(dt_bias_in);
  const at::Tensor g = at::empty_like(x);
  const int64_t width = dt_bias.numel();
  cuda::check("kda_decay", oryx_kda_decay(x.const_data_ptr<float>(), A_log.const_data_ptr<float>(), dt_bias.const_data_ptr<float>(), g.mutable_data_ptr<float>(),
                                          x.numel() / width, static_cast<int>(A_log.numel()), static_cast<int>(width), cuda::stream_of(x)));
  return g.unflatten(-1, {A_log.numel(), -1});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> kda_decay_backward_cuda(const at::Tensor& d_g_in, const at::Tensor& x_in, const at::Tensor& A_log_in,
                                                                       const at::Tensor& dt_bias_in) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = full_and_plain(x_in), A_log = full_and_plain(A_log_in), dt_bias = full_and_plain(dt_bias_in), d_g = full_and_plain(d_g_in);
  const int64_t width = dt_bias.numel(), rows = x.numel() / width;
  const at::Tensor d_x = at::empty_like(x), sums = at::empty({2, width}, x.options());
  const at::Tensor workspace = at::empty({oryx_kda_decay_backward_workspace(rows, static_cast<int>(width))}, x.options());
  cuda::check("kda_decay", oryx_kda_decay_backward(d_g.const_data_ptr<float>(), x.const_data_ptr<float>(), A_log.const_data_ptr<float>(), dt_bias.const_data_ptr<float>(),
                                                   d_x.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(), rows,
                                                   static_cast<int>(A_log.numel()), static_cast<int>(width), cuda::stream_of(x)));
  return {d_x, sums[1].view({A_log.numel(), -1}).sum(-1), sums[0]};
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("_kda_decay", kda_decay_cuda);
  m.impl("_kda_decay_backward", kda_decay_backward_cuda);
}

}  // namespace oryx::ops
