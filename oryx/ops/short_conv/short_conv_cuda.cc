// The short convolution on CUDA: hands tensors to the launchers of cuda/short_conv_*.cu. float64, for checks only, is computed on the CPU.
#include <torch/library.h>

#include "oryx/common/log.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/sequences.h"
#include "oryx/ops/short_conv/cuda/short_conv_launch.h"

namespace oryx::ops {
namespace {

using Optional = std::optional<at::Tensor>;
constexpr int64_t kMaxWidth = 8;

bool given(const Optional& t) { return t.has_value() && t->defined(); }
Optional on_cpu(const Optional& t) { return given(t) ? Optional(t->cpu()) : Optional(); }

void notice() { log::warn_once("short_conv: float64 on CUDA is computed on the CPU, slowly"); }

// The arguments as the launchers want them; the tensors keep the memory alive.
struct Prepared {
  at::Tensor x, weight, bias, history, cu_seqlens;
  int64_t B, T, C, N, width;
  int dtype, weight_dtype;

  Prepared(const at::Tensor& x_in, const at::Tensor& weight_in, const Optional& bias_in, const Optional& state, const Optional& cu) {
    TORCH_CHECK(x_in.dim() == 3, "short_conv: x must be [B, T, C], got ", x_in.sizes());
    B = x_in.size(0), T = x_in.size(1), C = x_in.size(2);
    N = count_sequences("short_conv", B, T, cu);
    TORCH_CHECK(weight_in.dim() == 2 && weight_in.size(0) == C, "short_conv: weight must be [C = ", C, ", w], got ", weight_in.sizes());
    width = weight_in.size(1);
    TORCH_CHECK(width >= 1 && width <= kMaxWidth, "short_conv: width ", width, " is outside 1 .. ", kMaxWidth);
    TORCH_CHECK(!given(bias_in) || bias_in->sizes() == at::IntArrayRef({C}), "short_conv: bias must be [", C, "], got ", bias_in->sizes());
    TORCH_CHECK(!given(state) || state->sizes() == at::IntArrayRef({N, C, width - 1}), "short_conv: initial_state must be [", N, ", ", C, ", ",
                width - 1, "], got ", state->sizes());
    x = x_in.contiguous();
    dtype = cuda::kernel_dtype("short_conv", x);
    weight = cuda::as_parameter(weight_in);
    weight_dtype = cuda::kernel_dtype("short_conv", weight);
    if (given(bias_in)) bias = bias_in->to(weight.scalar_type()).contiguous();
    if (given(state)) history = state->to(x.scalar_type()).contiguous();
    if (given(cu)) cu_seqlens = cu->to(x.device(), at::kInt).contiguous();
  }
  const int32_t* bounds() const { return cu_seqlens.defined() ? cu_seqlens.const_data_ptr<int32_t>() : nullptr; }
};

using Two = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Two short_conv_cuda(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const Optional& initial_state,
                    const Optional& cu_seqlens, bool silu) {
  if (x.scalar_type() == at::kDouble) {
    notice();
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::short_conv", "").typed<decltype(short_conv_cuda)>();
    auto [y, state] = op.call(x.cpu(), weight.cpu(), on_cpu(bias), on_cpu(initial_state), on_cpu(cu_seqlens), silu);
    return {y.to(x.device()), state.to(x.device())};
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const Prepared p(x, weight, bias, initial_state, cu_seqlens);
  const at::Tensor y = at::empty_like(p.x), state = at::empty({p.N, p.C, p.width - 1}, p.x.options());
  cuda::check("short_conv", oryx_short_conv_forward(p.dtype, p.weight_dtype, p.x.const_data_ptr(), p.weight.const_data_ptr(),
                                                    cuda::read_or_null(p.bias), cuda::read_or_null(p.history), p.bounds(),
                                                    y.mutable_data_ptr(), state.mutable_data_ptr(), p.B, p.T, p.C, p.N,
                                                    static_cast<int>(p.width), silu ? 1 : 0, cuda::stream_of(x)));
  return {y, state};
}

Four short_conv_backward_cuda(const at::Tensor& d_y, const Optional& d_final_state, const at::Tensor& x, const at::Tensor& weight,
                              const Optional& bias, const Optional& initial_state, const Optional& cu_seqlens, bool silu) {
  if (x.scalar_type() == at::kDouble) {
    notice();
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("oryx::short_conv_backward", "").typed<decltype(short_conv_backward_cuda)>();
    auto [dx, dw, db, ds] = op.call(d_y.cpu(), on_cpu(d_final_state), x.cpu(), weight.cpu(), on_cpu(bias), on_cpu(initial_state),
                                    on_cpu(cu_seqlens), silu);
    const auto back = [&](const at::Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
    return {back(dx), back(dw), back(db), back(ds)};
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const Prepared p(x, weight, bias, initial_state, cu_seqlens);
  TORCH_CHECK(d_y.sizes() == x.sizes(), "short_conv_backward: d_y is ", d_y.sizes(), ", expected ", x.sizes());
  const at::Tensor dy = d_y.to(x.scalar_type()).contiguous();
  const at::Tensor df = given(d_final_state) ? d_final_state->to(x.scalar_type()).contiguous() : at::Tensor();
  const at::Tensor d_x = at::empty_like(p.x), d_weight = at::empty_like(p.weight);
  const at::Tensor d_bias = p.bias.defined() ? at::empty_like(p.bias) : at::Tensor();
  const at::Tensor d_state = p.history.defined() ? at::empty_like(p.history) : at::Tensor();
  const int64_t floats = oryx_short_conv_backward_workspace(p.dtype, p.B, p.T, p.C, static_cast<int>(p.width));
  const at::Tensor workspace = at::empty({floats}, x.options().dtype(at::kFloat));
  cuda::check("short_conv", oryx_short_conv_backward(p.dtype, p.weight_dtype, dy.const_data_ptr(), cuda::read_or_null(df), p.x.const_data_ptr(),
                                                     p.weight.const_data_ptr(), cuda::read_or_null(p.bias), cuda::read_or_null(p.history),
                                                     p.bounds(), d_x.mutable_data_ptr(), d_weight.mutable_data_ptr(),
                                                     cuda::write_or_null(d_bias), cuda::write_or_null(d_state),
                                                     workspace.mutable_data_ptr<float>(), p.B, p.T, p.C, p.N, static_cast<int>(p.width),
                                                     silu ? 1 : 0, cuda::stream_of(x)));
  return {d_x, d_weight.to(weight.scalar_type()), d_bias.defined() ? d_bias.to(bias->scalar_type()) : d_bias,
          d_state.defined() ? d_state.to(initial_state->scalar_type()) : d_state};
}

at::Tensor short_conv_step_cuda(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, at::Tensor& state, bool silu) {
  TORCH_CHECK(x.dim() == 2, "short_conv_step: x must be [N, C], got ", x.sizes());
  if (x.scalar_type() == at::kDouble) {
    notice();
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::short_conv_step", "").typed<decltype(short_conv_step_cuda)>();
    at::Tensor host = state.cpu();
    const at::Tensor y = op.call(x.cpu(), weight.cpu(), on_cpu(bias), host, silu);
    state.copy_(host);
    return y.to(x.device());
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const Prepared p(x.unsqueeze(1), weight, bias, state, {});
  const auto t = state.scalar_type();
  const at::Tensor work = (t == at::kFloat || t == at::kBFloat16 ? state : state.to(at::kFloat)).contiguous();
  const at::Tensor y = at::empty({p.N, p.C}, p.x.options());
  cuda::check("short_conv_step",
              oryx_short_conv_step(p.dtype, p.weight_dtype, cuda::kernel_dtype("short_conv_step", work), p.x.const_data_ptr(),
                                   p.weight.const_data_ptr(), cuda::read_or_null(p.bias), work.mutable_data_ptr(), y.mutable_data_ptr(), p.N,
                                   p.C, static_cast<int>(p.width), silu ? 1 : 0, cuda::stream_of(x)));
  if (!work.is_same(state)) state.copy_(work);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("short_conv", short_conv_cuda);
  m.impl("short_conv_backward", short_conv_backward_cuda);
  m.impl("short_conv_step", short_conv_step_cuda);
}

}  // namespace oryx::ops
