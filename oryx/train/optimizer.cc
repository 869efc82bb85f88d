#include "oryx/train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "oryx/common/error.h"

namespace oryx {

Optimizer::Optimizer(const LanguageModel& model, ops::AdamwOptions options)
    : specs_(model.specs()), parameters_(model.parameters()), options_(options) {
  for (const auto& p : parameters_) {
    m_.push_back(at::zeros_like(p));
    v_.push_back(at::zeros_like(p));
  }
}

double Optimizer::gradient_norm() const {
  std::vector<at::Tensor> gradients;
  for (const auto& p : parameters_) gradients.push_back(p.grad());
  return ops::global_norm(gradients);
}

void Optimizer::step(double lr, double grad_scale) {
  at::NoGradGuard no_grad;
  ++steps_;
  ops::AdamwOptions o = options_;
  o.lr = lr;
  step_group(true, o, grad_scale);
  o.weight_decay = 0;
  step_group(false, o, grad_scale);
}

void Optimizer::step_group(bool decays, const ops::AdamwOptions& options, double grad_scale) {
  std::vector<at::Tensor> parameters, gradients, m, v;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (specs_[i].weight_decay != decays) continue;
    const at::Tensor& g = parameters_[i].grad();
    parameters.push_back(parameters_[i]);
    gradients.push_back(g.defined() ? g : at::zeros_like(parameters_[i]));
    m.push_back(m_[i]);
    v.push_back(v_[i]);
  }
  ops::adamw_step_all(parameters, gradients, m, v, steps_, options, grad_scale);
}

void Optimizer::clear_gradients() {
  for (auto& p : parameters_) p.mutable_grad().reset();
}

NamedTensors Optimizer::state() const {
  NamedTensors out;
  for (size_t i = 0; i < specs_.size(); ++i) {
    out.emplace_back("m." + specs_[i].name, m_[i]);
    out.emplace_back("v." + specs_[i].name, v_[i]);
  }
  return out;
}

void Optimizer::load(const SafetensorsReader& file, int64_t steps) {
  at::NoGradGuard no_grad;
  for (const auto& [name, t] : state()) {
    const at::Tensor stored = file.load(name);
    if (stored.sizes() != t.sizes() || stored.scalar_type() != t.scalar_type()) {
      fail("{}: tensor '{}' is {} {}, the model wants {} {}", file.path(), name, at::toString(stored.scalar_type()),
           fmt::join(stored.sizes(), "x"), at::toString(t.scalar_type()), fmt::join(t.sizes(), "x"));
    }
    at::Tensor target = t;
    target.copy_(stored);
  }
  steps_ = steps;
}

}  // namespace oryx
