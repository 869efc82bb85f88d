// Decay and write strength on CUDA: hands tensors to the launchers of cuda/gates.cu.
#include <torch/library.h>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/gated_delta/cuda/gates_launch.h"

namespace oryx::ops {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::Tensor plain(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }

Two gates_cuda(const at::Tensor& ba_in, const at::Tensor& A_log_in, const at::Tensor& dt_bias_in, double strength) {
  const c10::cuda::CUDAGuard guard(ba_in.device());
  const at::Tensor ba = plain(ba_in), A_log = plain(A_log_in), dt_bias = plain(dt_bias_in);
  const int64_t heads = A_log.numel(), rows = ba.numel() / (2 * heads);
  auto sizes = ba.sizes().vec();
  sizes.back() = heads;
  const at::Tensor g = at::empty(sizes, ba.options()), beta = at::empty(sizes, ba.options());
  cuda::check("gated_delta_gates", oryx_gates_forward(ba.const_data_ptr<float>(), A_log.const_data_ptr<float>(), dt_bias.const_data_ptr<float>(),
                                                      static_cast<float>(strength), g.mutable_data_ptr<float>(), beta.mutable_data_ptr<float>(), rows,
                                                      static_cast<int>(heads), cuda::stream_of(ba)));
  return {g, beta};
}

Three gates_backward_cuda(const at::Tensor& d_g_in, const at::Tensor& d_beta_in, const at::Tensor& ba_in, const at::Tensor& A_log_in,
                          const at::Tensor& dt_bias_in, double strength) {
  const c10::cuda::CUDAGuard guard(ba_in.device());
  const at::Tensor ba = plain(ba_in), A_log = plain(A_log_in), dt_bias = plain(dt_bias_in), d_g = plain(d_g_in), d_beta = plain(d_beta_in);
  const int64_t heads = A_log.numel(), rows = ba.numel() / (2 * heads);
  const at::Tensor d_ba = at::empty_like(ba), d_sums = at::empty({2, heads}, ba.options());
  const at::Tensor workspace = at::empty({oryx_gates_backward_workspace(rows, static_cast<int>(heads))}, ba.options());
  cuda::check("gated_delta_gates",
              oryx_gates_backward(d_g.const_data_ptr<float>(), d_beta.const_data_ptr<float>(), ba.const_data_ptr<float>(), A_log.const_data_ptr<float>(),
                                  dt_bias.const_data_ptr<float>(), static_cast<float>(strength), d_ba.mutable_data_ptr<float>(),
                                  d_sums.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(), rows, static_cast<int>(heads),
                                  cuda::stream_of(ba)));
  return {d_ba, d_sums[0], d_sums[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("_gated_delta_gates", gates_cuda);
  m.impl("_gated_delta_gates_backward", gates_backward_cuda);
}

}  // namespace oryx::ops
