// Products that share one input: on a GPU their gradients meet inside of the products. Against the same products one by one.
#include "oryx/mixers/projections.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

namespace oryx {
namespace {

using Tensors = std::vector<at::Tensor>;

at::Tensor rows_index(const at::Tensor& like) { return at::tensor(std::vector<int64_t>{3, 0, 11, 7}, at::kLong).to(like.device()); }

// x, plain weight twice, weight over rows, weight in float32; x is also read directly.
at::Tensor together(const Tensors& t) {
  const Projections p(t[0]);
  return p(t[1]).to(at::kFloat).square().sum() + p(t[2]).to(at::kFloat).sum() + p.rows(t[3], rows_index(t[0])).to(at::kFloat).square().sum() +
         p.wide({t[4]}).square().sum() + p.input().to(at::kFloat).pow(3).sum();
}

at::Tensor apart(const Tensors& t) {
  const at::Tensor flat = t[0].view({-1, t[0].size(-1)});
  return at::linear(t[0], t[1]).square().sum() + at::linear(t[0], t[2]).sum() + at::linear(flat.index_select(0, rows_index(t[0])), t[3]).square().sum() +
         at::linear(t[0], t[4]).square().sum() + t[0].pow(3).sum();
}

void expect_same(at::Device device, at::ScalarType dtype, double limit) {
  at::manual_seed(2);
  Tensors exact, own;
  for (const auto& shape : std::vector<std::vector<int64_t>>{{2, 6, 32}, {24, 32}, {8, 32}, {16, 32}, {4, 32}}) {
    const bool wide = shape[0] == 4;
    const at::Tensor x = at::randn(shape, at::kDouble).to(wide ? at::kFloat : dtype);
    exact.push_back(x.to(at::kDouble).requires_grad_(true));
    own.push_back(x.to(device, x.scalar_type(), false, true).requires_grad_(true));
  }
  const at::Tensor a = apart(exact), b = together(own);
  EXPECT_NEAR(b.item<double>() / a.item<double>(), 1, limit);
  torch::autograd::backward({a}, {});
  torch::autograd::backward({b}, {});
  for (size_t i = 0; i < exact.size(); ++i) {
    const at::Tensor e = exact[i].grad(), f = own[i].grad().cpu().to(at::kDouble);
    EXPECT_LE(((f - e).norm() / e.norm()).item<double>(), limit) << i;
    EXPECT_EQ(own[i].grad().scalar_type(), own[i].scalar_type());
  }
}

TEST(Projections, OnTheCpu) { expect_same(at::kCPU, at::kFloat, 1e-5); }

TEST(Projections, CudaGradientsMeet) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  expect_same(at::kCUDA, at::kFloat, 1e-5);
  expect_same(at::kCUDA, at::kBFloat16, 1e-2);
}

TEST(Projections, CudaRowsAreJoinedInPlace) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  const auto options = at::TensorOptions(at::kCUDA).dtype(at::kFloat);
  const at::Tensor base = at::ones({2, 3, 4}, options).requires_grad_(true), part = at::full({2, 3, 4}, 2.0, options).requires_grad_(true);
  const at::Tensor index = at::tensor(std::vector<int64_t>{1, 4}, at::kLong).to(at::kCUDA);
  const at::Tensor o = base * 1;  // not a leaf, as an operator's output is
  const at::Tensor joined = join_rows(o, part * 1, index);
  EXPECT_EQ(joined.data_ptr(), o.data_ptr());
  const at::Tensor rows = joined.view({6, 4}).cpu();
  for (int64_t r = 0; r < 6; ++r) EXPECT_EQ(rows[r][0].item<double>(), r == 1 || r == 4 ? 2 : 1);
  torch::autograd::backward({joined.sum()}, {});
  EXPECT_TRUE(base.grad().defined() && part.grad().defined());
}

// Made ahead or one by one: the same products; weights that stand by themselves, or of another form, are left to be made when they are asked for.
TEST(ProjectionsCuda, AheadIsEach) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  const at::NoGradGuard no_grad;
  at::manual_seed(4);
  const auto random = [](at::IntArrayRef shape) { return at::randn(shape, at::device(at::kCUDA).dtype(at::kBFloat16)); };
  const at::Tensor four = random({4, 192, 96}), lone = random({192, 96}), narrow = random({64, 96});
  for (const int64_t rows : {2, 65, 700}) {
    const at::Tensor x = random({1, rows, 96});
    Projections made(x), plain(x);
    made.ahead({four[0], four[1], narrow, lone, four[2], four[3]});
    for (const at::Tensor& weight : {four[0], four[1], four[2], four[3], lone, narrow}) {
      const at::Tensor a = made(weight).to(at::kFloat), b = plain(weight).to(at::kFloat);
      ASSERT_EQ(a.sizes(), b.sizes());
      EXPECT_TRUE(made(weight).is_contiguous());
      EXPECT_LT(((a - b).norm() / b.norm()).item<double>(), 5e-3);
    }
  }
}

}  // namespace
}  // namespace oryx
