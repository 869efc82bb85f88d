// The step that is decided on the device, against the one that the host decides. Skipped, saying so, where there is no CUDA.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <limits>

#include "oryx/ops/adamw/adamw.h"

namespace oryx::ops {
namespace {

class CudaUpdate : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
    at::manual_seed(1);
  }

  AdamwUpdate lists() {
    AdamwUpdate u;
    for (const int64_t n : {1, 63, 30001}) {
      const auto on = at::TensorOptions(at::kCUDA).dtype(at::kFloat);
      u.p.push_back(at::randn({n}, on));
      u.m.push_back(at::zeros({n}, on));
      u.v.push_back(at::zeros({n}, on));
      const bool narrow = n != 63;
      u.g.push_back(at::randn({n}, on).to(narrow ? at::kBFloat16 : at::kFloat));
      u.weight.push_back(narrow ? u.p.back().to(at::kBFloat16) : at::Tensor());
      u.decays.push_back(n != 1);
    }
    return u;
  }
};

TEST_F(CudaUpdate, IsTheStepThatTheHostDecides) {
  AdamwUpdate u = lists();
  std::vector<at::Tensor> p, m = {}, v = {};
  for (const auto& t : u.p) {
    p.push_back(t.cpu().to(at::kDouble));
    m.push_back(at::zeros_like(p.back()));
    v.push_back(at::zeros_like(p.back()));
  }
  const at::Tensor control = at::zeros({kAdamwControl}, at::TensorOptions(at::kCUDA).dtype(at::kDouble));
  const at::Tensor loss = at::full({}, 2.5f, u.p[0].options());
  const AdamwOptions options{.lr = 0.1};
  for (int64_t step = 1; step <= 3; ++step) {
    std::vector<at::Tensor> g;
    for (const auto& t : u.g) g.push_back(t.cpu().to(at::kDouble));
    const double norm = global_norm(g), scale = norm > 1 ? 1 / norm : 1.0;
    for (size_t i = 0; i < p.size(); ++i) {
      AdamwOptions o = options;
      if (!u.decays[i]) o.weight_decay = 0;
      adamw_step(p[i], g[i], m[i], v[i], step, o, scale);
    }
    adamw_update(u, control, loss, options, 1);
    const at::Tensor c = control.cpu();
    EXPECT_EQ(c[0].item<double>(), 2.5);
    EXPECT_NEAR(c[1].item<double>() / norm, 1, 1e-6);
    EXPECT_EQ(c[2].item<double>(), 1);
    EXPECT_EQ(c[3].item<double>(), static_cast<double>(step));
  }
  for (size_t i = 0; i < p.size(); ++i) {
    const at::Tensor found = u.p[i].cpu().to(at::kDouble);
    EXPECT_LE(((found - p[i]).norm() / p[i].norm()).item<double>(), 5e-6) << i;  // one value alone may have shrunk to what it keeps few digits of
    if (!u.weight[i].defined()) continue;
    EXPECT_TRUE(at::equal(u.weight[i], u.p[i].to(at::kBFloat16))) << i;
  }
}

TEST_F(CudaUpdate, TakesTheRateThatLiesOnTheDevice) {
  AdamwUpdate given = lists(), read;
  for (auto [from, to] : {std::pair{&given.p, &read.p}, {&given.m, &read.m}, {&given.v, &read.v}, {&given.g, &read.g}, {&given.weight, &read.weight}}) {
    for (const auto& t : *from) to->push_back(t.defined() ? t.clone() : t);
  }
  read.decays = given.decays;
  const at::Tensor loss = at::full({}, 2.5f, given.p[0].options());
  const at::Tensor one = at::zeros({kAdamwControl}, at::TensorOptions(at::kCUDA).dtype(at::kDouble)), two = one.clone();
  for (const double lr : {0.1, 0.037}) {
    adamw_update(given, one, loss, {.lr = lr}, 1);
    two[kAdamwRate].fill_(lr);
    adamw_update(read, two, loss, {.lr = -1}, 1);
    for (size_t i = 0; i < read.p.size(); ++i) EXPECT_TRUE(at::equal(given.p[i], read.p[i])) << i;
  }
}

TEST_F(CudaUpdate, NothingMovesWhereSomethingIsNotFinite) {
  for (const bool in_loss : {false, true}) {
    AdamwUpdate u = lists();
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (!in_loss) u.g[2].fill_(nan);
    const at::Tensor before = u.p[2].clone(), weight = u.weight[2].clone();
    const at::Tensor control = at::zeros({kAdamwControl}, at::TensorOptions(at::kCUDA).dtype(at::kDouble));
    adamw_update(u, control, at::full({}, in_loss ? nan : 1.0, u.p[0].options()), {}, 1);
    EXPECT_EQ(control[2].item<double>(), 0);
    EXPECT_EQ(control[3].item<double>(), 0);
    EXPECT_TRUE(at::equal(before, u.p[2]) && at::equal(weight, u.weight[2]) && u.m[2].abs().max().item<double>() == 0);
  }
}

}  // namespace
}  // namespace oryx::ops
