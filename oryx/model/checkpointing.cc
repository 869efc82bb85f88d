#include "oryx/model/checkpointing.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace oryx {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Checkpointed : torch::autograd::Function<Checkpointed> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& b, const PairFunction& f) {
    ctx->save_for_backward({a, b});
    ctx->saved_data["f"] = c10::IValue::make_capsule(c10::make_intrusive<Holder>(f));
    at::NoGradGuard no_grad;
    const auto [x, y] = f(a, b);
    // An output that is an input would not be a new node of the graph.
    return {x.is_same(a) ? x.clone() : x, y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor a = saved[0].detach().requires_grad_(true), b = saved[1].detach().requires_grad_(true);
    const auto holder = ctx->saved_data["f"].toCapsule();
    at::AutoGradMode enable(true);
    const auto [x, y] = static_cast<Holder*>(holder.get())->f(a, b);
    std::vector<at::Tensor> roots, upstream;
    for (const auto& [out, g] : {std::pair{x, grads[0]}, std::pair{y, grads[1]}}) {
      if (!g.defined() || !out.requires_grad()) continue;
      roots.push_back(out);
      upstream.push_back(g);
    }
    torch::autograd::backward(roots, upstream);
    return {a.grad(), b.grad(), at::Tensor()};
  }

  struct Holder : torch::CustomClassHolder {
    explicit Holder(PairFunction function) : f(std::move(function)) {}
    PairFunction f;
  };
};

}  // namespace

std::pair<at::Tensor, at::Tensor> checkpointed(const PairFunction& f, const at::Tensor& a, const at::Tensor& b) {
  if (!b.defined()) {
    // The autograd engine wants every input defined: an empty tensor stands in.
    const auto without_b = [f](const at::Tensor& x, const at::Tensor&) { return f(x, at::Tensor()); };
    const auto out = Checkpointed::apply(a, at::empty({0}, a.options()), PairFunction(without_b));
    return {out[0], out[1]};
  }
  const auto out = Checkpointed::apply(a, b, f);
  return {out[0], out[1]};
}

}  // namespace oryx
