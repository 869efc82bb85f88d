// SwiGLU on CUDA: hands tensors to the launchers of cuda/swiglu.cu.
#include <torch/library.h>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/swiglu/cuda/swiglu_launch.h"

namespace oryx::ops {
namespace {

at::Tensor forward_cuda(const at::Tensor& gate, const at::Tensor& up) {
  const c10::cuda::CUDAGuard guard(gate.device());
  const int dtype = cuda::kernel_dtype("swiglu", gate);
  const at::Tensor g = gate.contiguous(), u = up.contiguous();
  const at::Tensor y = at::empty_like(g);
  cuda::check("swiglu", oryx_swiglu_forward(dtype, g.const_data_ptr(), u.const_data_ptr(), y.mutable_data_ptr(), g.numel(),
                                            cuda::stream_of(g)));
  return y;
}

std::tuple<at::Tensor, at::Tensor> backward_cuda(const at::Tensor& d_y, const at::Tensor& gate, const at::Tensor& up) {
  const c10::cuda::CUDAGuard guard(gate.device());
  const int dtype = cuda::kernel_dtype("swiglu", gate);
  const at::Tensor dy = d_y.to(gate.scalar_type()).contiguous(), g = gate.contiguous(), u = up.contiguous();
  const at::Tensor d_gate = at::empty_like(g), d_up = at::empty_like(u);
  cuda::check("swiglu", oryx_swiglu_backward(dtype, dy.const_data_ptr(), g.const_data_ptr(), u.const_data_ptr(),
                                             d_gate.mutable_data_ptr(), d_up.mutable_data_ptr(), g.numel(), cuda::stream_of(g)));
  return {d_gate, d_up};
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("_swiglu", forward_cuda);
  m.impl("_swiglu_backward", backward_cuda);
}

}  // namespace oryx::ops
