// What the tests of a million steps of a recurrence share: sizes, bounds, random inputs by piece, and the error against float64.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "oryx/common/random.h"

namespace oryx::ops::long_test {

constexpr int64_t kHeads = 4, kDim = 4, kPiece = 1000, kSteps = 1000000;
// Largest error of S and of the last output against float64, relative to the largest value, at 1,000, 10,000, 100,000 and 1,000,000 steps.
constexpr double kBound = 1e-5;

// The inputs of one piece, drawn by its index alone.
struct Draw {
  explicit Draw(int64_t index) : generator(7, static_cast<uint64_t>(index)) {}

  float uniform() { return static_cast<float>(generator.below(1 << 24)) / (1 << 24); }  // [0, 1)
  template <typename F>
  at::Tensor fill(std::vector<int64_t> shape, F f) {  // f(index) in order
    at::Tensor t = at::empty(shape, at::kFloat);
    for (int64_t i = 0; i < t.numel(); ++i) t.mutable_data_ptr<float>()[i] = f(i);
    return t;
  }
  at::Tensor vectors() {  // [1, kPiece, kHeads, kDim] in [-1, 1)
    return fill({1, kPiece, kHeads, kDim}, [&](int64_t) { return 2 * uniform() - 1; });
  }

  CounterRng generator;
};

// max|x - ref| / max|ref|, the worst of the heads [first, last); infinity for NaN.
inline double error(const at::Tensor& x, const std::vector<double>& ref, int64_t first = 0, int64_t last = kHeads) {
  const at::Tensor r = at::tensor(ref, at::kDouble).view({kHeads, -1}), d = (x.to(at::kDouble).reshape({kHeads, -1}) - r).abs();
  const double worst = (d.amax(1) / r.abs().amax(1)).narrow(0, first, last - first).max().item<double>();
  return std::isfinite(worst) ? worst : INFINITY;
}

}  // namespace oryx::ops::long_test
