#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/adamw/adamw.h"
#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

// Both forms are the operator: in float64 it is plain tensor operations (adamw_step_in_double).
Tensors two_steps(const Tensors& x) {
  Tensors p{x[0].clone(), x[1].clone()}, m{at::zeros_like(x[0]), at::zeros_like(x[1])}, v{at::zeros_like(x[0]), at::zeros_like(x[1])};
  for (int64_t step = 1; step <= 2; ++step) adamw_step_all(p, {x[2], x[3]}, m, v, step, {.lr = 0.1}, 0.5);
  return {p[0], p[1], m[0], v[0]};
}

std::vector<SelftestCase> cases(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t n : selftest_lengths(quick)) {
    SelftestCase c{fmt::format("{} and 77 x 33", n),
                   {{selftest_random({n}, 1), true}, {selftest_random({77, 33}, 2), true}, {selftest_random({n}, 3)}, {selftest_random({77, 33}, 4)}},
                   two_steps, two_steps};
    c.gradients = false;
    all.push_back(c);
  }
  return all;
}

std::vector<SelftestCase> norms(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t n : selftest_lengths(quick)) {
    const auto norm = [](const Tensors& x) { return Tensors{at::scalar_tensor(global_norm({x[0], x[1]}), at::kDouble)}; };
    const auto naive = [](const Tensors& x) { return Tensors{(x[0].to(at::kDouble).square().sum() + x[1].to(at::kDouble).square().sum()).sqrt().cpu()}; };
    SelftestCase c{fmt::format("{} and 77 x 33", n), {{selftest_random({n}, 1)}, {selftest_random({77, 33}, 2)}}, norm, naive};
    c.gradients = false;
    all.push_back(c);
  }
  return all;
}

std::vector<SelftestCase> squares(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t n : selftest_lengths(quick)) {
    const auto sum = [](const Tensors& x) { return Tensors{sum_of_squares({x[0], x[1]}).cpu()}; };
    const auto naive = [](const Tensors& x) { return Tensors{(x[0].to(at::kDouble).square().sum() + x[1].to(at::kDouble).square().sum()).cpu()}; };
    SelftestCase c{fmt::format("{} and 77 x 33", n), {{selftest_random({n}, 1)}, {selftest_random({77, 33}, 2)}}, sum, naive};
    c.gradients = false;
    all.push_back(c);
  }
  return all;
}

ORYX_SELFTEST(adamw, cases);
ORYX_SELFTEST(global_norm, norms);
ORYX_SELFTEST(sum_of_squares, squares);

}  // namespace
}  // namespace oryx::ops
