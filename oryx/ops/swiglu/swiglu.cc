#include "oryx/ops/swiglu/swiglu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "oryx/ops/swiglu/swiglu_kernels.h"

namespace oryx::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kGrain = 16384;  // elements a thread must have at least: about 10 us

void check(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK(gate.sizes() == up.sizes(), "swiglu: gate ", gate.sizes(), " and up ", up.sizes(), " differ in shape");
  TORCH_CHECK(gate.scalar_type() == up.scalar_type(), "swiglu: gate is ", gate.scalar_type(), ", up is ",
              up.scalar_type());
}

// ---- on the CPU: T is the element as the kernels see it, S as ATen does

template <class T, class S>
void forward_as(const at::Tensor& gate, const at::Tensor& up, at::Tensor& y) {
  const T* g = reinterpret_cast<const T*>(gate.const_data_ptr<S>());
  const T* u = reinterpret_cast<const T*>(up.const_data_ptr<S>());
  T* out = reinterpret_cast<T*>(y.mutable_data_ptr<S>());
  at::parallel_for(0, gate.numel(), kGrain,
                   [=](int64_t b, int64_t e) { kernels::swiglu_forward(g + b, u + b, out + b, e - b); });
}

template <class T, class S>
void backward_as(const at::Tensor& d_y, const at::Tensor& gate, const at::Tensor& up, at::Tensor& d_gate,
                 at::Tensor& d_up) {
  const T* dy = reinterpret_cast<const T*>(d_y.const_data_ptr<S>());
  const T* g = reinterpret_cast<const T*>(gate.const_data_ptr<S>());
  const T* u = reinterpret_cast<const T*>(up.const_data_ptr<S>());
  T* dg = reinterpret_cast<T*>(d_gate.mutable_data_ptr<S>());
  T* du = reinterpret_cast<T*>(d_up.mutable_data_ptr<S>());
  at::parallel_for(0, gate.numel(), kGrain, [=](int64_t b, int64_t e) {
    kernels::swiglu_backward(dy + b, g + b, u + b, dg + b, du + b, e - b);
  });
}

at::Tensor forward_cpu(const at::Tensor& gate, const at::Tensor& up) {
  const at::Tensor g = gate.contiguous(), u = up.contiguous();
  at::Tensor y = at::empty_like(g);
  if (g.scalar_type() == at::kFloat) {
    forward_as<float, float>(g, u, y);
  } else {
    TORCH_CHECK(g.scalar_type() == at::kBFloat16, "swiglu: no kernel for ", g.scalar_type());
    forward_as<uint16_t, at::BFloat16>(g, u, y);
  }
  return y;
}

std::tuple<at::Tensor, at::Tensor> backward_cpu(const at::Tensor& d_y, const at::Tensor& gate, const at::Tensor& up) {
  const at::Tensor dy = d_y.contiguous(), g = gate.contiguous(), u = up.contiguous();
  at::Tensor d_gate = at::empty_like(g), d_up = at::empty_like(u);
  if (g.scalar_type() == at::kFloat) {
    backward_as<float, float>(dy, g, u, d_gate, d_up);
  } else {
    backward_as<uint16_t, at::BFloat16>(dy, g, u, d_gate, d_up);
  }
  return {d_gate, d_up};
}

// ---- through the dispatcher

at::Tensor forward(const at::Tensor& gate, const at::Tensor& up) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::_swiglu", "").typed<decltype(forward_cpu)>();
  return op.call(gate, up);
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& d_y, const at::Tensor& gate, const at::Tensor& up) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::_swiglu_backward", "").typed<decltype(backward_cpu)>();
  return op.call(d_y, gate, up);
}

struct SwigluFunction : torch::autograd::Function<SwigluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up});
    return ops::forward(gate, up);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    auto [d_gate, d_up] = ops::backward(grads[0], saved[0], saved[1]);
    return {d_gate, d_up};
  }
};

at::Tensor swiglu_composite(const at::Tensor& gate, const at::Tensor& up) {
  check(gate, up);
  if (gate.scalar_type() == at::kDouble) return swiglu_naive(gate, up);  // for checks of gradients, not for speed
  if (at::GradMode::is_enabled() && (gate.requires_grad() || up.requires_grad()))
    return SwigluFunction::apply(gate, up);
  return forward(gate, up);
}

}  // namespace

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::swiglu", "").typed<decltype(swiglu_composite)>();
  return op.call(gate, up);
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("_swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("_swiglu_backward(Tensor d_y, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(oryx, CompositeImplicitAutograd, m) { m.impl("swiglu", swiglu_composite); }

TORCH_LIBRARY_IMPL(oryx, CPU, m) {
  m.impl("_swiglu", forward_cpu);
  m.impl("_swiglu_backward", backward_cpu);
}

}  // namespace oryx::ops
