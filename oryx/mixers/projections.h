// The matrix products that read one activation.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <utility>
#include <vector>

namespace oryx {

// y = x W^T with the weight cast to x's dtype. x [..., in], weight [out, in].
at::Tensor project(const at::Tensor& x, const at::Tensor& weight);

// o with the rows `index` of `part` in their place; both [B, T, ...] and zero outside of their own rows, o's being the others. o is overwritten where nothing keeps it
// for a backward pass: on a GPU, else the sum is made.
at::Tensor join_rows(const at::Tensor& o, const at::Tensor& part, const at::Tensor& index);
// The same where the rows are those at which `mask` [B, T] is true.
at::Tensor join_where(const at::Tensor& o, const at::Tensor& part, const at::Tensor& mask);

// Several such products of one x. In a backward pass on a GPU their shares of x's gradient are added up inside of the products (beta = 1) instead of
// one by one in passes over memory.
class Projections {
 public:
  explicit Projections(const at::Tensor& x);

  // x, for everybody else who reads it.
  const at::Tensor& input() const { return x_; }

  // The products of those of the weights that stand one behind the other in memory, with one shape, by one launch: operator() has them then. On a GPU without gradients, for few rows, of
  // which one product leaves most of the device idle; nothing elsewhere.
  void ahead(at::TensorList weights);
  // [..., out], as project().
  at::Tensor operator()(const at::Tensor& weight) const;
  // Of the rows `index` (int64, each at most once) of x flattened to [rows, in]: [n, out].
  at::Tensor rows(const at::Tensor& weight, const at::Tensor& index) const;
  // In float32 from float32 weights, whose rows stand below each other, also where x is bfloat16: [..., out]. For narrow products whose result must be exact: decays, steps.
  at::Tensor wide(at::TensorList weights) const;

 private:
  bool collects() const { return sink_.isCapsule(); }

  at::Tensor x_;
  std::vector<std::pair<const void*, at::Tensor>> made_;  // by the weight's memory
  c10::IValue sink_;  // where the products' shares of the gradient meet; none on the CPU or without gradients
};

}  // namespace oryx
