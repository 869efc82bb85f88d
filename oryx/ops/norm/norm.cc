#include "oryx/ops/norm/norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "oryx/ops/norm/norm_kernels.h"

namespace oryx::ops {
namespace {

using kernels::NormForm;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// ---- argument checks

void check_weight(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": weight ", weight.sizes(),
              " does not fit the last axis of x ", x.sizes());
  TORCH_CHECK(x.size(-1) > 0, op, ": the last axis of x is empty");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), op, ": x is ", x.scalar_type());
}

void check_shape(const char* op, const char* name, const at::Tensor& x, const at::Tensor& other) {
  TORCH_CHECK(other.sizes() == x.sizes(), op, ": ", name, " ", other.sizes(), " and x ", x.sizes(), " differ in shape");
}

bool wants_grad(std::initializer_list<at::Tensor> inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor& t) { return t.requires_grad(); });
}

// ---- on the CPU. The kernels are float32; 16-bit tensors are widened first and the results rounded.

at::Tensor wide(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }

at::Tensor effective_weight(const at::Tensor& weight, bool zero_centred) {
  const at::Tensor w = wide(weight);
  return zero_centred ? w + 1 : w;
}

void run_forward(NormForm form, const kernels::NormForward& a, int64_t rows) {
  const int64_t grain = std::max<int64_t>(1, 16384 / a.dim);
  at::parallel_for(0, rows, grain, [&](int64_t b, int64_t e) { kernels::norm_forward(form, a, b, e); });
}

// The weight's gradient is summed over blocks of a size that depends on the shape only, and the blocks in their order:
// it is the same for any number of threads.
at::Tensor run_backward(NormForm form, const kernels::NormBackward& a, int64_t rows) {
  const int64_t width = a.dim * a.groups;
  const int64_t block = std::max<int64_t>(32, 32768 / width) * a.groups;
  const int64_t blocks = (rows + block - 1) / block;
  std::vector<float> partial(static_cast<size_t>(blocks * width), 0.0f);
  at::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      kernels::norm_backward(form, a, partial.data() + i * width, i * block, std::min(rows, (i + 1) * block));
    }
  });
  std::vector<double> total(static_cast<size_t>(width), 0.0);
  for (int64_t i = 0; i < blocks; ++i) {
    for (int64_t c = 0; c < width; ++c) total[c] += partial[i * width + c];
  }
  at::Tensor d_weight = at::empty({width}, at::kFloat);
  std::copy(total.begin(), total.end(), d_weight.mutable_data_ptr<float>());
  return d_weight;
}

Two rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps, bool zero_centred) {
  const at::Tensor in = wide(x), w = effective_weight(weight, zero_centred);
  const int64_t dim = x.size(-1), rows = x.numel() / dim;
  at::Tensor y = at::empty_like(in), rstd = at::empty({rows}, in.options());
  run_forward(NormForm::kPlain,
              {in.const_data_ptr<float>(), nullptr, nullptr, w.const_data_ptr<float>(), y.mutable_data_ptr<float>(),
               nullptr, rstd.mutable_data_ptr<float>(), dim, 1, static_cast<float>(eps)},
              rows);
  return {y.to(x.scalar_type()), rstd};
}

Three add_rms_norm_cpu(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  const at::Tensor in = wide(x), res = wide(residual), w = wide(weight);
  const int64_t dim = x.size(-1), rows = x.numel() / dim;
  at::Tensor y = at::empty_like(in), sum = at::empty_like(in), rstd = at::empty({rows}, in.options());
  run_forward(NormForm::kAdd,
              {in.const_data_ptr<float>(), res.const_data_ptr<float>(), nullptr, w.const_data_ptr<float>(),
               y.mutable_data_ptr<float>(), sum.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), dim, 1,
               static_cast<float>(eps)},
              rows);
  return {y.to(x.scalar_type()), sum.to(x.scalar_type()), rstd};
}

// x is the tensor that was normalised; d_sum, if given, is added to its gradient.
Two rms_norm_backward_cpu(const at::Tensor& d_y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd,
                          const std::optional<at::Tensor>& d_sum, bool zero_centred) {
  const at::Tensor dy = wide(d_y), in = wide(x), w = effective_weight(weight, zero_centred);
  const at::Tensor ds = d_sum.has_value() && d_sum->defined() ? wide(*d_sum) : at::Tensor();
  const int64_t dim = x.size(-1), rows = x.numel() / dim;
  at::Tensor d_x = at::empty_like(in);
  const at::Tensor d_weight =
      run_backward(NormForm::kPlain,
                   {dy.const_data_ptr<float>(), in.const_data_ptr<float>(), nullptr, w.const_data_ptr<float>(),
                    rstd.const_data_ptr<float>(), ds.defined() ? ds.const_data_ptr<float>() : nullptr,
                    d_x.mutable_data_ptr<float>(), nullptr, dim, 1},
                   rows);
  return {d_x.to(x.scalar_type()), d_weight.to(weight.scalar_type())};
}

Two gated_rms_norm_cpu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps,
                       bool gate_first, int64_t groups) {
  const at::Tensor in = wide(x), g = wide(gate), w = wide(weight);
  const int64_t dim = x.size(-1) / groups, rows = x.numel() / dim;
  at::Tensor y = at::empty_like(in), rstd = at::empty({rows}, in.options());
  run_forward(
      gate_first ? NormForm::kGateFirst : NormForm::kGateAfter,
      {in.const_data_ptr<float>(), nullptr, g.const_data_ptr<float>(), w.const_data_ptr<float>(),
       y.mutable_data_ptr<float>(), nullptr, rstd.mutable_data_ptr<float>(), dim, groups, static_cast<float>(eps)},
      rows);
  return {y.to(x.scalar_type()), rstd};
}

Three gated_rms_norm_backward_cpu(const at::Tensor& d_y, const at::Tensor& x, const at::Tensor& gate,
                                  const at::Tensor& weight, const at::Tensor& rstd, bool gate_first, int64_t groups) {
  const at::Tensor dy = wide(d_y), in = wide(x), g = wide(gate), w = wide(weight);
  const int64_t dim = x.size(-1) / groups, rows = x.numel() / dim;
  at::Tensor d_x = at::empty_like(in), d_gate = at::empty_like(in);
  const at::Tensor d_weight =
      run_backward(gate_first ? NormForm::kGateFirst : NormForm::kGateAfter,
                   {dy.const_data_ptr<float>(), in.const_data_ptr<float>(), g.const_data_ptr<float>(),
                    w.const_data_ptr<float>(), rstd.const_data_ptr<float>(), nullptr, d_x.mutable_data_ptr<float>(),
                    d_gate.mutable_data_ptr<float>(), dim, groups},
                   rows);
  return {d_x.to(x.scalar_type()), d_gate.to(gate.scalar_type()), d_weight.to(weight.scalar_type())};
}

// The operator `name` of the library, with F's signature.
template <class F>
auto operator_of(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

Two call_backward(const at::Tensor& d_y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd,
                  const std::optional<at::Tensor>& d_sum, bool zero_centred) {
  static const auto op = operator_of("oryx::_rms_norm_backward", rms_norm_backward_cpu);
  return op.call(d_y, x, weight, rstd, d_sum, zero_centred);
}

// ---- rms_norm

Two call_rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool zero_centred) {
  static const auto op = operator_of("oryx::_rms_norm", rms_norm_cpu);
  return op.call(x, weight, eps, zero_centred);
}

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, double eps,
                            bool zero_centred) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, rstd] = call_rms_norm(x, weight, eps, zero_centred);
    ctx->save_for_backward({x, weight, rstd});
    ctx->saved_data["zero_centred"] = zero_centred;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    auto [d_x, d_weight] =
        call_backward(grads[0], saved[0], saved[1], saved[2], std::nullopt, ctx->saved_data["zero_centred"].toBool());
    return {d_x, d_weight, {}, {}};
  }
};

at::Tensor rms_norm_composite(const at::Tensor& x, const at::Tensor& weight, double eps, bool zero_centred) {
  check_weight("rms_norm", x, weight);
  if (x.scalar_type() == at::kDouble) return rms_norm_naive(x, weight, eps, zero_centred);  // for checks, not for speed
  if (wants_grad({x, weight})) return RmsNormFunction::apply(x, weight, eps, zero_centred);
  return std::get<0>(call_rms_norm(x, weight, eps, zero_centred));
}

// ---- add_rms_norm

Three call_add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  static const auto op = operator_of("oryx::_add_rms_norm", add_rms_norm_cpu);
  return op.call(x, residual, weight, eps);
}

struct AddRmsNormFunction : torch::autograd::Function<AddRmsNormFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& residual,
                               const at::Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, sum, rstd] = call_add_rms_norm(x, residual, weight, eps);
    ctx->save_for_backward({sum, weight, rstd});
    ctx->set_materialize_grads(false);  // an unused output costs nothing
    return {y, sum};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (!grads[0].defined()) return {grads[1], grads[1], {}, {}};
    const auto saved = ctx->get_saved_variables();
    const auto d_sum = grads[1].defined() ? std::optional(grads[1]) : std::nullopt;
    auto [d_x, d_weight] = call_backward(grads[0], saved[0], saved[1], saved[2], d_sum, false);
    return {d_x, d_x, d_weight, {}};
  }
};

Two add_rms_norm_composite(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  check_weight("add_rms_norm", x, weight);
  check_shape("add_rms_norm", "residual", x, residual);
  if (x.scalar_type() != residual.scalar_type()) {  // a float32 stream and a 16-bit branch: the sum is float32
    const auto wider = at::promote_types(x.scalar_type(), residual.scalar_type());
    return add_rms_norm_composite(x.to(wider), residual.to(wider), weight, eps);
  }
  if (x.scalar_type() == at::kDouble) {
    const at::Tensor sum = x + residual;
    return {rms_norm_naive(sum, weight, eps), sum};
  }
  if (wants_grad({x, residual, weight})) {
    auto out = AddRmsNormFunction::apply(x, residual, weight, eps);
    return {out[0], out[1]};
  }
  auto [y, sum, rstd] = call_add_rms_norm(x, residual, weight, eps);
  return {y, sum};
}

// ---- gated_rms_norm

Two call_gated(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps, bool gate_first,
               int64_t groups) {
  static const auto op = operator_of("oryx::_gated_rms_norm", gated_rms_norm_cpu);
  return op.call(x, gate, weight, eps, gate_first, groups);
}

Three call_gated_backward(const at::Tensor& d_y, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                          const at::Tensor& rstd, bool gate_first, int64_t groups) {
  static const auto op = operator_of("oryx::_gated_rms_norm_backward", gated_rms_norm_backward_cpu);
  return op.call(d_y, x, gate, weight, rstd, gate_first, groups);
}

struct GatedRmsNormFunction : torch::autograd::Function<GatedRmsNormFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                            double eps, bool gate_first, int64_t groups) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, rstd] = call_gated(x, gate, weight, eps, gate_first, groups);
    ctx->save_for_backward({x, gate, weight, rstd});
    ctx->saved_data["gate_first"] = gate_first;
    ctx->saved_data["groups"] = groups;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    auto [d_x, d_gate, d_weight] =
        call_gated_backward(grads[0], saved[0], saved[1], saved[2], saved[3], ctx->saved_data["gate_first"].toBool(),
                            ctx->saved_data["groups"].toInt());
    return {d_x, d_gate, d_weight, {}, {}, {}};
  }
};

at::Tensor gated_rms_norm_composite(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps,
                                    bool gate_first, int64_t groups) {
  check_weight("gated_rms_norm", x, weight);
  check_shape("gated_rms_norm", "gate", x, gate);
  TORCH_CHECK(groups >= 1 && x.size(-1) % groups == 0, "gated_rms_norm: ", groups,
              " groups do not divide the last axis of x ", x.sizes());
  if (x.scalar_type() == at::kDouble) return gated_rms_norm_naive(x, gate, weight, eps, gate_first, groups);
  if (wants_grad({x, gate, weight})) return GatedRmsNormFunction::apply(x, gate, weight, eps, gate_first, groups);
  return std::get<0>(call_gated(x, gate, weight, eps, gate_first, groups));
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool zero_centred) {
  static const auto op = operator_of("oryx::rms_norm", rms_norm_composite);
  return op.call(x, weight, eps, zero_centred);
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const at::Tensor& weight, double eps) {
  static const auto op = operator_of("oryx::add_rms_norm", add_rms_norm_composite);
  return op.call(x, residual, weight, eps);
}

at::Tensor gated_rms_norm(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps,
                          bool gate_first, int64_t groups) {
  static const auto op = operator_of("oryx::gated_rms_norm", gated_rms_norm_composite);
  return op.call(x, gate, weight, eps, gate_first, groups);
}

// The forms with an underscore also return 1 / rms [rows], or make gradients; they are what a device implements.
TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centred=False) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)");
  m.def(
      "gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, bool gate_first=False, int groups=1) -> Tensor");
  m.def("_rms_norm(Tensor x, Tensor weight, float eps, bool zero_centred) -> (Tensor, Tensor)");
  m.def("_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_rms_norm_backward(Tensor d_y, Tensor x, Tensor weight, Tensor rstd, Tensor? d_sum, bool zero_centred) -> "
      "(Tensor, "
      "Tensor)");
  m.def(
      "_gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, bool gate_first, int groups) -> (Tensor, "
      "Tensor)");
  m.def(
      "_gated_rms_norm_backward(Tensor d_y, Tensor x, Tensor gate, Tensor weight, Tensor rstd, bool gate_first, int "
      "groups) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(oryx, CompositeImplicitAutograd, m) {
  m.impl("rms_norm", rms_norm_composite);
  m.impl("add_rms_norm", add_rms_norm_composite);
  m.impl("gated_rms_norm", gated_rms_norm_composite);
}

TORCH_LIBRARY_IMPL(oryx, CPU, m) {
  m.impl("_rms_norm", rms_norm_cpu);
  m.impl("_add_rms_norm", add_rms_norm_cpu);
  m.impl("_rms_norm_backward", rms_norm_backward_cpu);
  m.impl("_gated_rms_norm", gated_rms_norm_cpu);
  m.impl("_gated_rms_norm_backward", gated_rms_norm_backward_cpu);
}

}  // namespace oryx::ops
