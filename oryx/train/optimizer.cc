#include "oryx/train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <utility>

#include "oryx/common/error.h"

namespace oryx {

Optimizer::Optimizer(const LanguageModel& model, ops::AdamwOptions options, ProcessGroup* group)
    : model_(model), specs_(model.specs()), shards_(group == nullptr ? nullptr : std::make_unique<Shards>(model, *group)), options_(options) {
  if (shards_ != nullptr) {
    const at::TensorOptions here = at::TensorOptions(model.device()).dtype(at::kFloat);
    for (size_t b = 0; b < shards_->buckets(); ++b) part_m_.push_back(at::zeros({shards_->part(b)}, here)), part_v_.push_back(at::zeros({shards_->part(b)}, here));
    for (const Shards::Piece& piece : shards_->pieces()) {
      parameters_.push_back(piece.p);
      weights_.push_back(piece.weight);
      decays_.push_back(specs_[piece.parameter].weight_decay);
      m_.push_back(part_m_[piece.bucket].narrow(0, piece.at, piece.p.numel()));
      v_.push_back(part_v_[piece.bucket].narrow(0, piece.at, piece.p.numel()));
    }
  } else {
    parameters_ = model.parameters();
    for (size_t i = 0; i < parameters_.size(); ++i) {
      decays_.push_back(specs_[i].weight_decay);
      m_.push_back(at::zeros_like(parameters_[i]));
      v_.push_back(at::zeros_like(parameters_[i]));
    }
  }
  if (!model.device().is_cpu()) control_ = at::zeros({ops::kAdamwControl}, at::TensorOptions(model.device()).dtype(at::kDouble));
}

at::Tensor Optimizer::gradient(size_t i) const {
  if (shards_ != nullptr) return shards_->pieces()[i].g;
  if (!sums_.empty() && sums_[i].defined()) return sums_[i];
  return model_.leaf(i).grad();
}

at::Tensor Optimizer::weight(size_t i) const {
  if (shards_ != nullptr) return weights_[i];
  return model_.copies().empty() || !model_.copies()[i].defined() ? at::Tensor() : model_.copies()[i].detach();
}

std::vector<at::Tensor> Optimizer::gradients() const {
  std::vector<at::Tensor> all;
  for (size_t i = 0; i < parameters_.size(); ++i) all.push_back(gradient(i));
  return all;
}

void Optimizer::begin(int64_t passes) {
  clear_gradients();
  if (shards_ != nullptr) shards_->begin(passes, early_);
}

void Optimizer::next_pass() {
  if (shards_ != nullptr) return shards_->next_pass();
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

void Optimizer::end(const at::Tensor& loss) {
  if (shards_ != nullptr) shards_->end(loss);
}

at::Tensor Optimizer::sum_over_processes(const at::Tensor& loss) {
  if (shards_ == nullptr) return loss;
  shards_->reduce();
  return shards_->loss();
}

ops::AdamwUpdate Optimizer::lists_of(size_t begin, size_t end) const {
  ops::AdamwUpdate lists;
  for (size_t i = begin; i < end; ++i) {
    const at::Tensor g = gradient(i);
    lists.p.push_back(parameters_[i].detach());
    lists.g.push_back(g.defined() ? g : at::zeros_like(parameters_[i]));
    lists.m.push_back(m_[i]);
    lists.v.push_back(v_[i]);
    lists.weight.push_back(weight(i));
    lists.decays.push_back(decays_[i]);
  }
  return lists;
}

void Optimizer::update(const at::Tensor& loss, double lr, double clip) {
  ops::AdamwOptions o = options_;
  o.lr = lr;
  if (shards_ == nullptr) return ops::adamw_update(lists_of(0, parameters_.size()), control_, loss, o, clip);
  at::Tensor squares = ops::sum_of_squares(gradients());
  if (!squares.defined()) squares = at::zeros({}, control_.options());
  shards_->group().all_reduce(squares);
  shards_->group().finish();
  // A bucket's new weights travel while the next one is stepped. Pieces lie in the buckets' order.
  const auto& pieces = shards_->pieces();
  bool decided = false;
  for (size_t bucket = 0, at = 0; bucket < shards_->buckets(); ++bucket) {
    const size_t begin = at;
    while (at < pieces.size() && pieces[at].bucket == bucket) ++at;
    if (begin < at) ops::adamw_update(lists_of(begin, at), control_, loss, o, clip, squares, std::exchange(decided, true));
    shards_->gather_weights(bucket);
  }
  shards_->finish_weights();
}

void Optimizer::set_rate(double lr) { control_[ops::kAdamwRate].fill_(lr); }

at::Tensor Optimizer::record() const { return control_.narrow(0, 0, 4).clone(); }

int64_t Optimizer::steps() const { return on_device() ? static_cast<int64_t>(control_[3].item<double>()) : steps_; }

void Optimizer::set_steps(int64_t steps) {
  steps_ = steps;
  if (on_device()) control_[3].fill_(static_cast<double>(steps));
}

double Optimizer::gradient_norm() const {
  const double own = ops::global_norm(gradients());
  if (shards_ == nullptr) return own;
  const at::Tensor squares = at::full({}, own * own, at::kDouble).to(model_.device());
  shards_->group().all_reduce(squares);
  shards_->group().finish();
  return std::sqrt(squares.item<double>());
}

void Optimizer::step(double lr, double grad_scale) {
  at::NoGradGuard no_grad;
  ++steps_;
  ops::AdamwOptions o = options_;
  o.lr = lr;
  step_group(true, o, grad_scale);
  o.weight_decay = 0;
  step_group(false, o, grad_scale);
  if (shards_ == nullptr) return;
  for (size_t bucket = 0; bucket < shards_->buckets(); ++bucket) shards_->gather_weights(bucket);
  shards_->finish_weights();
}

void Optimizer::step_group(bool decays, const ops::AdamwOptions& options, double grad_scale) {
  std::vector<at::Tensor> parameters, gradients, m, v;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (decays_[i] != decays) continue;
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
  for (size_t i = 0; i < specs_.size(); ++i) model_.leaf(i).mutable_grad().reset();
}

void Optimizer::assemble() {
  if (shards_ == nullptr) return;
  shards_->assemble_parameters();
  const bool keeps = shards_->group().first();
  NamedTensors m(specs_.size()), v(specs_.size());
  const auto taker = [&](const char* prefix, NamedTensors& into) {
    return [&, prefix](size_t i, const at::Tensor& whole) {
      if (keeps) into[i] = {prefix + specs_[i].name, whole.cpu().clone()};
    };
  };
  shards_->assemble([&](size_t bucket) { return part_m_[bucket]; }, taker("m.", m));
  shards_->assemble([&](size_t bucket) { return part_v_[bucket]; }, taker("v.", v));
  assembled_.clear();
  for (size_t i = 0; keeps && i < specs_.size(); ++i) assembled_.push_back(std::move(m[i])), assembled_.push_back(std::move(v[i]));
}

void Optimizer::drop_assembled() {
  assembled_.clear();
  if (shards_ != nullptr) shards_->release_parameters();
}

void Optimizer::prepare_load() {
  if (shards_ != nullptr) shards_->hold_parameters();
}

NamedTensors Optimizer::state() const {
  if (shards_ != nullptr) {
    TORCH_CHECK(!assembled_.empty(), "optimizer: the moments of several processes are whole between assemble() and drop_assembled(), on rank 0");
    return assembled_;
  }
  NamedTensors out;
  for (size_t i = 0; i < specs_.size(); ++i) {
    out.emplace_back("m." + specs_[i].name, m_[i]);
    out.emplace_back("v." + specs_[i].name, v_[i]);
  }
  return out;
}

void Optimizer::load(const SafetensorsReader& file, int64_t steps) {
  at::NoGradGuard no_grad;
  const auto read = [&](const char* prefix, size_t i) {
    const std::string name = prefix + specs_[i].name;
    const at::Tensor stored = file.load(name);
    if (stored.sizes() != at::IntArrayRef(specs_[i].shape) || stored.scalar_type() != model_.parameters()[i].scalar_type()) {
      fail("{}: tensor '{}' is {} {}, the model wants {} {}", file.path(), name, at::toString(stored.scalar_type()),
           fmt::join(stored.sizes(), "x"), at::toString(model_.parameters()[i].scalar_type()), fmt::join(specs_[i].shape, "x"));
    }
    return stored;
  };
  if (shards_ != nullptr) {
    shards_->take_parameters();
    for (size_t k = 0; k < parameters_.size(); ++k) {
      const Shards::Piece& piece = shards_->pieces()[k];
      m_[k].copy_(read("m.", piece.parameter).view({-1}).narrow(0, piece.from, m_[k].numel()));
      v_[k].copy_(read("v.", piece.parameter).view({-1}).narrow(0, piece.from, v_[k].numel()));
    }
    return set_steps(steps);
  }
  for (size_t i = 0; i < specs_.size(); ++i) {
    m_[i].copy_(read("m.", i));
    v_[i].copy_(read("v.", i));
  }
  set_steps(steps);
}

}  // namespace oryx
