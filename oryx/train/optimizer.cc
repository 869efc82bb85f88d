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
  for (size_t i = 0; i < parameters_.size(); ++i) {
    ops::AdamwOptions o = options_;
    o.lr = lr;
    if (!specs_[i].weight_decay) o.weight_decay = 0;
    const at::Tensor g = parameters_[i].grad();
    ops::adamw_step(parameters_[i], g.defined() ? g : at::zeros_like(parameters_[i]), m_[i], v_[i], steps_, o, grad_scale);
  }
}

void Optimizer::zero_gradients() {
  for (auto& p : parameters_) {
    if (p.grad().defined()) {
      p.mutable_grad().zero_();
    } else {
      p.mutable_grad() = at::zeros_like(p);
    }
  }
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
