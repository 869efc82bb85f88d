#include "oryx/ops/swiglu/swiglu.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using test::fixture_error;
using torch::autograd::backward;

TEST(Swiglu, Fixture) {
  ORYX_REQUIRE_FIXTURES();
  for (const test::Fixture& f : test::fixtures("ops", "swiglu")) {
    SCOPED_TRACE(f.name);
    const at::Tensor gate = f.leaf("gate"), up = f.leaf("up");
    const at::Tensor y = swiglu(gate, up);
    EXPECT_LE(fixture_error(y, f.at("y")), 4e-6);
    backward({y}, {f.at("up_y")});
    EXPECT_LE(fixture_error(gate.grad(), f.at("d_gate")), 1e-5);
    EXPECT_LE(fixture_error(up.grad(), f.at("d_up")), 1e-5);
  }
}

TEST(Swiglu, FixtureMlp) {
  ORYX_REQUIRE_FIXTURES();
  for (const test::Fixture& f : test::fixtures("ops", "swiglu_mlp")) {
    SCOPED_TRACE(f.name);
    const at::Tensor x = f.leaf("x"), g = f.leaf("gate_proj"), u = f.leaf("up_proj"), d = f.leaf("down_proj");
    const at::Tensor y = at::linear(swiglu(at::linear(x, g), at::linear(x, u)), d);
    EXPECT_LE(fixture_error(y, f.at("y")), 4e-6);
    backward({y}, {f.at("up_y")});
    EXPECT_LE(fixture_error(x.grad(), f.at("d_x")), 1e-5);
    EXPECT_LE(fixture_error(g.grad(), f.at("d_gate_proj")), 1e-5);
    EXPECT_LE(fixture_error(u.grad(), f.at("d_up_proj")), 1e-5);
    EXPECT_LE(fixture_error(d.grad(), f.at("d_down_proj")), 1e-5);
  }
}

struct Inputs {
  at::Tensor gate, up, d_y;
  Inputs(int64_t rows, int64_t width, uint64_t seed) {
    at::manual_seed(seed);
    gate = at::randn({rows, width}) * 4;
    up = at::randn({rows, width});
    d_y = at::randn({rows, width});
  }
};

// y, d_gate, d_up
template <class F>
std::vector<at::Tensor> run(F&& f, const Inputs& in, at::ScalarType dtype) {
  const at::Tensor gate = in.gate.to(dtype, false, true).requires_grad_(),
                   up = in.up.to(dtype, false, true).requires_grad_();
  const at::Tensor y = f(gate, up);
  backward({y}, {in.d_y.to(dtype)});
  return {y.detach(), gate.grad(), up.grad()};
}

TEST(Swiglu, MatchesNaiveAtOddShapes) {
  for (const int64_t width : {1, 7, 16, 63, 100, 1000, 2048}) {
    const Inputs in(17, width, static_cast<uint64_t>(width));
    const auto got = run(swiglu, in, at::kFloat), want = run(swiglu_naive, in, at::kDouble);
    for (size_t i = 0; i < got.size(); ++i) EXPECT_LE(fixture_error(got[i], want[i]), 1e-6) << width << " " << i;
  }
}

TEST(Swiglu, Bfloat16RoundsOnce) {
  const Inputs in(5, 37, 3);
  const Inputs rounded = [&] {
    Inputs r = in;
    for (at::Tensor* t : {&r.gate, &r.up, &r.d_y}) *t = t->to(at::kBFloat16).to(at::kFloat);
    return r;
  }();
  const auto got = run(swiglu, in, at::kBFloat16), want = run(swiglu, rounded, at::kFloat);
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(at::equal(got[i], want[i].to(at::kBFloat16))) << i;
}

TEST(Swiglu, SiluIsAccurateOverItsWholeRange) {
  const at::Tensor x = at::arange(-85000, 85000, at::kFloat) * 1e-3f;
  const at::Tensor want = x.to(at::kDouble) * at::sigmoid(x.to(at::kDouble));
  const at::Tensor got = swiglu(x, at::ones_like(x)).to(at::kDouble);
  const double ulps = ((got - want) / want).masked_fill(x == 0, 0).abs().max().item<double>() / std::ldexp(1.0, -23);
  EXPECT_LE(ulps, 4.0);
  RecordProperty("largest_error_in_ulps", std::to_string(ulps));
}

TEST(Swiglu, ExtremeValues) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor x = at::tensor({-1e30f, -200.0f, 200.0f, 1e30f, inf, nan, 0.0f});
  const at::Tensor y = swiglu(x, at::ones_like(x));
  const at::Tensor want = at::tensor({0.0f, 0.0f, 200.0f, 1e30f, inf});
  EXPECT_TRUE(at::equal(y.slice(0, 0, 5).abs(), want)) << y;
  EXPECT_TRUE(std::isnan(y[5].item<float>()));
  EXPECT_EQ(y[6].item<float>(), 0);
}

TEST(Swiglu, ThreadsAndStridesDoNotChangeTheResult) {
  const Inputs in(301, 333, 5);
  const int threads = at::get_num_threads();
  const auto want = run(swiglu, in, at::kFloat);
  at::set_num_threads(1);
  const auto alone = run(swiglu, in, at::kFloat);
  at::set_num_threads(threads);
  Inputs strided = in;
  strided.gate = in.gate.t().contiguous().t();
  const auto across = run(swiglu, strided, at::kFloat);
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_TRUE(at::equal(want[i], alone[i])) << i;
    EXPECT_TRUE(at::equal(want[i], across[i])) << i;
  }
}

TEST(Swiglu, RefusesDifferentShapes) {
  EXPECT_THROW(swiglu(at::ones({2, 3}), at::ones({2, 4})), c10::Error);
  EXPECT_THROW(swiglu(at::ones({2, 3}), at::ones({2, 3}, at::kBFloat16)), c10::Error);
  EXPECT_EQ(swiglu(at::ones({0, 3}), at::ones({0, 3})).numel(), 0);
}

}  // namespace
}  // namespace oryx::ops
