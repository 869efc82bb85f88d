// Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a block's activations are dropped after the forward pass and computed
// again in the backward pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <utility>

namespace oryx {

using PairFunction = std::function<std::pair<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&)>;

// f(a, b) without keeping what is inside; b may be undefined. Leaf parameters that f reads get their gradients as if f had been called
// plainly. What f reads besides a and b must outlive the backward pass and be unchanged.
std::pair<at::Tensor, at::Tensor> checkpointed(const PairFunction& f, const at::Tensor& a, const at::Tensor& b);

}  // namespace oryx
