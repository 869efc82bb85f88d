// Kimi Delta Attention's CUDA kernels (bfloat16, K = V = 64 and 128) against the chunked form in float64 on the CPU. Skipped, saying so, where there is no CUDA.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "oryx/ops/gated_delta/delta_test_support.h"
#include "oryx/ops/kda/kda.h"
#include "oryx/ops/kda/kda_decay.h"

namespace oryx::ops::kda_cuda_test {
namespace {

using delta_test::kNames;
using delta_test::OneThread;
using delta_test::Shape;

class KdaCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  }
};

// The same numbers on the GPU.
delta_test::Case on_gpu(const delta_test::Case& c) {
  delta_test::Case d = c;
  for (at::Tensor* x : {&d.q, &d.k, &d.v, &d.g, &d.beta, &d.state}) {
    if (x->defined()) *x = x->detach().to(at::kCUDA).set_requires_grad(true);
  }
  for (at::Tensor* x : {&d.up_o, &d.up_state}) *x = x->to(at::kCUDA);
  for (auto* x : {&d.cu, &d.spans}) {
    if (x->has_value()) *x = (*x)->to(at::kCUDA);
  }
  return d;
}

double error(const at::Tensor& found, const at::Tensor& expected, double least) {
  const at::Tensor a = found.detach().to(at::kCPU, at::kDouble), b = expected.detach();
  return ((a - b).norm() / b.norm().clamp_min(least)).item<double>();  // NaN fails every comparison below
}

void expect_close(const delta_test::Case& host) {
  const delta_test::Case device = on_gpu(host);
  const auto expected = run(host.exact(), kda), found = run(device, kda), again = run(device, kda);
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_TRUE(found[i].is_cuda());
    EXPECT_TRUE(at::equal(found[i], again[i])) << kNames[i] << " differs from run to run";
    // Where everything decays within a token the gradient of g is nothing but rounding: it counts from 1e-3 on.
    const double least = i == 5 ? 1e-3 * std::sqrt(static_cast<double>(expected[i].numel())) : 1e-30;
    EXPECT_LE(error(found[i], expected[i], least), i < 2 ? 1e-2 : 2e-2) << kNames[i];
  }
}

TEST_F(KdaCuda, EqualsFloat64) {
  const OneThread one_thread;
  for (const int64_t D : {64, 128}) {
    // Lengths around a chunk's; grouped heads, packed documents of which one is empty, a readout of some tokens; no state.
    for (const Shape& s : {Shape{2, 1, 2, 2, 2, D, D}, Shape{2, 63, 2, 2, 2, D, D}, Shape{1, 64, 1, 1, 1, D, D, {}, {}, false}, Shape{2, 130, 1, 2, 4, D, D},
                           Shape{1, 200, 4, 1, 2, D, D, {0, 1, 70, 70, 200}, {0, 0, 30, 0, 60, 150}}, Shape{1, 300, 2, 2, 2, D, D, {}, {}, true, 0.01}}) {
      SCOPED_TRACE(fmt::format("T {} heads {}/{}/{} D {}", s.T, s.Hq, s.Hk, s.Hv, D));
      expect_close(delta_test::Case(s, at::kBFloat16, 7, /*by_channel=*/true));
    }
  }
}

// No decay at all, and log decays of hundreds, thousands and minus infinity a token, in some channels and in a stretch of all.
TEST_F(KdaCuda, Decays) {
  const OneThread one_thread;
  for (const double decay : {0.0, 3.0, 300.0, 1e4}) {
    SCOPED_TRACE(fmt::format("decay {}", decay));
    const delta_test::Case c({1, 200, 2, 2, 2, 128, 128, {}, {}, true, decay}, at::kBFloat16, 7, /*by_channel=*/true);
    c.g.detach().select(3, 3).fill_(0);
    c.g.detach().slice(1, 70, 90).fill_(-200);
    expect_close(c);
  }
  const delta_test::Case c({1, 100, 1, 1, 1, 64, 64}, at::kBFloat16, 7, /*by_channel=*/true);
  c.g.detach().slice(1, 40, 42).fill_(-INFINITY);
  const at::NoGradGuard no_grad;
  const delta_test::Case d = on_gpu(c), e = c.exact();
  const auto x = kda(d.q, d.k, d.v, d.g, d.beta, d.state), ref = kda(e.q, e.k, e.v, e.g, e.beta, e.state);
  EXPECT_LE(error(x.o, ref.o, 1e-30), 1e-2);
  EXPECT_LE(error(x.final_state, ref.final_state, 1e-30), 1e-2);
}

// What is NaN in one row stays there.
TEST_F(KdaCuda, NanStaysInItsRow) {
  const delta_test::Case c({2, 100, 2, 2, 2, 128, 128}, at::kBFloat16, 7, /*by_channel=*/true);
  const at::NoGradGuard no_grad;
  const delta_test::Case d = on_gpu(c);
  for (const at::Tensor* x : {&d.q, &d.k, &d.v, &d.g, &d.beta}) {
    const at::Tensor kept = x->detach().select(0, 1).clone();
    x->detach().select(0, 1).fill_(std::nanf(""));
    const auto r = kda(d.q, d.k, d.v, d.g, d.beta, d.state);
    EXPECT_TRUE(r.o.select(0, 0).isfinite().all().item<bool>());
    EXPECT_TRUE(r.final_state.select(0, 0).isfinite().all().item<bool>());
    EXPECT_TRUE(r.o.select(0, 1).isnan().any().item<bool>());
    x->detach().select(0, 1).copy_(kept);
  }
}

// Log decays and their gradients, of small and large projections and rows that are no multiple of a block; heads of other widths by tensor operations.
TEST_F(KdaCuda, LogDecays) {
  at::manual_seed(5);
  for (const auto& [rows, heads, K] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 4}, {150, 3, 64}, {70, 2, 128}, {9, 5, 6}, {0, 2, 64}}) {
    SCOPED_TRACE(fmt::format("rows {} heads {} K {}", rows, heads, K));
    std::vector<at::Tensor> exact, device;
    for (const at::Tensor& x : {10 * at::randn({rows, heads * K}), at::randn({heads}), at::randn({heads * K})}) {
      exact.push_back(x.to(at::kDouble).requires_grad_(true));
      device.push_back(x.to(at::kCUDA).requires_grad_(true));
    }
    const auto g = kda_decay(device[0], device[1], device[2]), ref = kda_decay_naive(exact[0], exact[1], exact[2]);
    ASSERT_EQ(g.sizes(), at::IntArrayRef({rows, heads, K}));
    EXPECT_LE(error(g, ref, 1e-30), 1e-6);
    const at::Tensor up = at::randn({rows, heads, K});
    const auto d = torch::autograd::grad({g}, device, {up.to(at::kCUDA)}), expected = torch::autograd::grad({ref}, exact, {up.to(at::kDouble)});
    for (size_t i = 0; i < d.size(); ++i) EXPECT_LE(error(d[i], expected[i], 1e-30), 1e-5) << "gradient of input " << i;
  }
}

TEST_F(KdaCuda, NoTokens) {
  const delta_test::Case d = on_gpu(delta_test::Case({2, 0, 2, 2, 2, 64, 64}, at::kBFloat16, 7, /*by_channel=*/true));
  const auto x = run(d, kda);
  EXPECT_EQ(x[0].sizes(), at::IntArrayRef({2, 0, 2, 64}));
  EXPECT_TRUE(at::equal(x[1], d.state));
  EXPECT_TRUE(at::equal(x[7], d.up_state));
}

}  // namespace
}  // namespace oryx::ops::kda_cuda_test
