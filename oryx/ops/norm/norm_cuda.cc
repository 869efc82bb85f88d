// RMSNorm and its forms on CUDA: hands tensors to the launchers of cuda/norm.cu.
#include <torch/library.h>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/norm/cuda/norm_launch.h"

namespace oryx::ops {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

enum Form { kPlain = 0, kAdd = 1, kGateAfter = 2, kGateFirst = 3 };  // as in norm_launch.h

struct Rows {
  int64_t rows, dim, groups;
  Rows(const at::Tensor& x, int64_t groups_in) : rows(x.numel() / (x.size(-1) / groups_in)), dim(x.size(-1) / groups_in), groups(groups_in) {}
};

// residual and sum, or gate, are undefined where the form has none. Returns 1 / rms [rows].
at::Tensor forward(const char* op, Form form, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& gate,
                   const at::Tensor& weight, const at::Tensor& y, const at::Tensor& sum, int64_t groups, double eps, float offset) {
  const Rows r(x, groups);
  const at::Tensor rstd = at::empty({r.rows}, x.options().dtype(at::kFloat)), w = cuda::as_parameter(weight);
  cuda::check(op, oryx_norm_forward(form, cuda::kernel_dtype(op, x), cuda::kernel_dtype(op, w), x.const_data_ptr(),
                                    cuda::read_or_null(residual), cuda::read_or_null(gate), w.const_data_ptr(), y.mutable_data_ptr(),
                                    cuda::write_or_null(sum), rstd.mutable_data_ptr<float>(), r.rows, r.dim, r.groups,
                                    static_cast<float>(eps), offset, cuda::stream_of(x)));
  return rstd;
}

// Returns the weight's gradient.
at::Tensor backward(const char* op, Form form, const at::Tensor& d_y, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                    const at::Tensor& rstd, const at::Tensor& d_sum, const at::Tensor& d_x, const at::Tensor& d_gate, int64_t groups,
                    float offset) {
  const Rows r(x, groups);
  const int dtype = cuda::kernel_dtype(op, x);
  const at::Tensor w = cuda::as_parameter(weight), d_weight = at::empty_like(w);
  const at::Tensor workspace = at::empty({oryx_norm_backward_workspace(form, dtype, r.rows, r.dim, r.groups)}, rstd.options());
  cuda::check(op, oryx_norm_backward(form, dtype, cuda::kernel_dtype(op, w), d_y.const_data_ptr(), x.const_data_ptr(),
                                     cuda::read_or_null(gate), w.const_data_ptr(), rstd.const_data_ptr<float>(), cuda::read_or_null(d_sum),
                                     d_x.mutable_data_ptr(), cuda::write_or_null(d_gate), d_weight.mutable_data_ptr(),
                                     workspace.mutable_data_ptr<float>(), r.rows, r.dim, r.groups, offset, cuda::stream_of(x)));
  return d_weight.to(weight.scalar_type());
}

Two rms_norm_cuda(const at::Tensor& x, const at::Tensor& weight, double eps, bool zero_centred) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous(), y = at::empty_like(in);
  const at::Tensor rstd = forward("rms_norm", kPlain, in, {}, {}, weight, y, {}, 1, eps, zero_centred ? 1.0f : 0.0f);
  return {y, rstd};
}

Three add_rms_norm_cuda(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous(), y = at::empty_like(in), sum = at::empty_like(in);
  const at::Tensor rstd = forward("add_rms_norm", kAdd, in, residual.contiguous(), {}, weight, y, sum, 1, eps, 0.0f);
  return {y, sum, rstd};
}

Two rms_norm_backward_cuda(const at::Tensor& d_y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd,
                           const std::optional<at::Tensor>& d_sum, bool zero_centred) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous(), d_x = at::empty_like(in);
  const at::Tensor ds = d_sum.has_value() && d_sum->defined() ? d_sum->to(x.scalar_type()).contiguous() : at::Tensor();
  const at::Tensor d_weight = backward("rms_norm", kPlain, d_y.to(x.scalar_type()).contiguous(), in, {}, weight, rstd, ds, d_x, {}, 1,
                                       zero_centred ? 1.0f : 0.0f);
  return {d_x, d_weight};
}

Two gated_rms_norm_cuda(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps, bool gate_first, int64_t groups) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous(), y = at::empty_like(in);
  const at::Tensor rstd = forward("gated_rms_norm", gate_first ? kGateFirst : kGateAfter, in, {}, gate.to(x.scalar_type()).contiguous(), weight,
                                  y, {}, groups, eps, 0.0f);
  return {y, rstd};
}

Three gated_rms_norm_backward_cuda(const at::Tensor& d_y, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                                   const at::Tensor& rstd, bool gate_first, int64_t groups) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto t = x.scalar_type();
  const at::Tensor in = x.contiguous(), d_x = at::empty_like(in), d_gate = at::empty_like(in);
  const at::Tensor d_weight = backward("gated_rms_norm", gate_first ? kGateFirst : kGateAfter, d_y.to(t).contiguous(), in,
                                       gate.to(t).contiguous(), weight, rstd, {}, d_x, d_gate, groups, 0.0f);
  return {d_x, d_gate.to(gate.scalar_type()), d_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("_rms_norm", rms_norm_cuda);
  m.impl("_add_rms_norm", add_rms_norm_cuda);
  m.impl("_rms_norm_backward", rms_norm_backward_cuda);
  m.impl("_gated_rms_norm", gated_rms_norm_cuda);
  m.impl("_gated_rms_norm_backward", gated_rms_norm_backward_cuda);
}

}  // namespace oryx::ops
