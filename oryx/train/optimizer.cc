#include "oryx/train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "oryx/common/error.h"

namespace oryx {

Optimizer::Optimizer(const LanguageModel& model, ops::AdamwOptions options)
    : model_(model), specs_(model.specs()), parameters_(model.parameters()), options_(options) {
  for (const auto& p : parameters_) {
    m_.push_back(at::zeros_like(p));
    v_.push_back(at::zeros_like(p));
  }
  if (!model.device().is_cpu()) control_ = at::zeros({ops::kAdamwControl}, at::TensorOptions(model.device()).dtype(at::kDouble));
}

at::Tensor Optimizer::gradient(size_t i) const {
  if (!sums_.empty() && sums_[i].defined()) return sums_[i];
  return model_.leaf(i).grad();
}

void Optimizer::collect_gradients() {
  if (model_.copies().empty()) return;
  at::NoGradGuard no_grad;
  sums_.resize(parameters_.size());
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (!model_.copies()[i].defined()) continue;
    at::Tensor leaf = model_.copies()[i];
    if (!leaf.grad().defined()) continue;
    if (sums_[i].defined()) {
      sums_[i].add_(leaf.grad());
    } else {
      sums_[i] = leaf.grad().to(parameters_[i].scalar_type());
    }
    leaf.mutable_grad().reset();
  }
}

void Optimizer::update(const at::Tensor& loss, double lr, double clip) {
  ops::AdamwUpdate lists;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor g = gradient(i);
    lists.p.push_back(parameters_[i].detach());
    lists.g.push_back(g.defined() ? g : at::zeros_like(parameters_[i]));
    lists.m.push_back(m_[i]);
    lists.v.push_back(v_[i]);
    lists.weight.push_back(model_.copies().empty() ? at::Tensor() : model_.copies()[i]);
    if (lists.weight.back().defined()) lists.weight.back() = lists.weight.back().detach();
    lists.decays.push_back(specs_[i].weight_decay);
  }
  ops::AdamwOptions o = options_;
  o.lr = lr;
  ops::adamw_update(lists, control_, loss, o, clip);
}

void Optimizer::set_rate(double lr) { control_[ops::kAdamwRate].fill_(lr); }

at::Tensor Optimizer::record() const { return control_.narrow(0, 0, 4).clone(); }

int64_t Optimizer::steps() const { return on_device() ? static_cast<int64_t>(control_[3].item<double>()) : steps_; }

void Optimizer::set_steps(int64_t steps) {
  steps_ = steps;
  if (on_device()) control_[3].fill_(static_cast<double>(steps));
}

double Optimizer::gradient_norm() const {
  std::vector<at::Tensor> gradients;
  for (size_t i = 0; i < parameters_.size(); ++i) gradients.push_back(gradient(i));
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
    const at::Tensor g = gradient(i);
    parameters.push_back(parameters_[i]);
    gradients.push_back(g.defined() ? g : at::zeros_like(parameters_[i]));
    m.push_back(m_[i]);
    v.push_back(v_[i]);
  }
  ops::adamw_step_all(parameters, gradients, m, v, steps_, options, grad_scale);
}

void Optimizer::clear_gradients() {
  sums_.clear();
  for (size_t i = 0; i < parameters_.size(); ++i) model_.leaf(i).mutable_grad().reset();
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
  set_steps(steps);
}

}  // namespace oryx
