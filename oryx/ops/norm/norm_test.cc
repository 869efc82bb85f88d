#include "oryx/ops/norm/norm.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using test::fixture_error;
using torch::autograd::backward;

TEST(RmsNorm, Fixture) {
  ORYX_REQUIRE_FIXTURES();
  for (const test::Fixture& f : test::fixtures("ops", "rms_norm")) {
    SCOPED_TRACE(f.name);
    const at::Tensor x = f.leaf("x"), weight = f.leaf("weight");
    const at::Tensor y =
        rms_norm(x, weight, f.attrs.at("eps").get<double>(), f.attrs.at("zero_centred_weight").get<bool>());
    EXPECT_LE(fixture_error(y, f.at("y"), true), 4e-6);
    backward({y}, {f.at("up_y")});
    EXPECT_LE(fixture_error(x.grad(), f.at("d_x"), true), 1e-5);
    EXPECT_LE(fixture_error(weight.grad(), f.at("d_weight"), true), 1e-5);
  }
}

TEST(GatedRmsNorm, Fixture) {
  ORYX_REQUIRE_FIXTURES();
  for (const test::Fixture& f : test::fixtures("ops", "gated_rms_norm")) {
    SCOPED_TRACE(f.name);
    const at::Tensor x = f.leaf("x"), gate = f.leaf("gate"), weight = f.leaf("weight");
    const at::Tensor y = gated_rms_norm(x, gate, weight, f.attrs.at("eps").get<double>(),
                                        f.attrs.at("gate_first").get<bool>(), f.attrs.at("groups").get<int64_t>());
    EXPECT_LE(fixture_error(y, f.at("y"), true), 4e-6);
    backward({y}, {f.at("up_y")});
    EXPECT_LE(fixture_error(x.grad(), f.at("d_x"), true), 1e-5);
    EXPECT_LE(fixture_error(gate.grad(), f.at("d_gate"), true), 1e-5);
    EXPECT_LE(fixture_error(weight.grad(), f.at("d_weight"), true), 1e-5);
  }
}

using Tensors = std::vector<at::Tensor>;

Tensors leaves(const Tensors& inputs, at::ScalarType dtype) {
  Tensors out;
  for (const at::Tensor& t : inputs) out.push_back(t.to(dtype, false, true).requires_grad_());
  return out;
}

// The outputs of f(inputs), then the gradients of the inputs under fixed upstream gradients.
template <class F>
Tensors run(F&& f, const Tensors& inputs, const Tensors& upstream, at::ScalarType dtype) {
  const Tensors in = leaves(inputs, dtype);
  Tensors out = f(in), up;
  for (size_t i = 0; i < out.size(); ++i) up.push_back(upstream[i].to(out[i].scalar_type()));
  backward(out, up);
  for (at::Tensor& t : out) t = t.detach();
  for (const at::Tensor& t : in) out.push_back(t.grad());
  return out;
}

void expect_close(const Tensors& got, const Tensors& want, double limit, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LE(fixture_error(got[i], want[i]), limit) << what << ", result " << i;
}

TEST(RmsNorm, MatchesNaiveAtOddShapes) {
  for (const int64_t dim : {1, 2, 15, 16, 17, 63, 64, 100, 128, 768, 1000}) {
    for (const bool zero_centred : {false, true}) {
      at::manual_seed(static_cast<uint64_t>(dim));
      const Tensors in = {at::randn({13, 5, dim}), at::randn({dim})}, up = {at::randn({13, 5, dim})};
      const auto fast = [&](const Tensors& t) { return Tensors{rms_norm(t[0], t[1], 1e-5, zero_centred)}; };
      const auto naive = [&](const Tensors& t) { return Tensors{rms_norm_naive(t[0], t[1], 1e-5, zero_centred)}; };
      expect_close(run(fast, in, up, at::kFloat), run(naive, in, up, at::kDouble), 3e-6, "dim " + std::to_string(dim));
    }
  }
}

TEST(RmsNorm, WeightGradientOfManyRows) {  // several blocks, a short last one
  at::manual_seed(1);
  for (const int64_t dim : {16, 64, 768}) {
    const int64_t rows = 3 * 32768 / dim + 11;
    const Tensors in = {at::randn({rows, dim}), at::randn({dim})}, up = {at::randn({rows, dim})};
    const auto fast = [](const Tensors& t) { return Tensors{rms_norm(t[0], t[1], 1e-6)}; };
    const auto naive = [](const Tensors& t) { return Tensors{rms_norm_naive(t[0], t[1], 1e-6)}; };
    expect_close(run(fast, in, up, at::kFloat), run(naive, in, up, at::kDouble), 3e-6, "dim " + std::to_string(dim));
  }
}

TEST(RmsNorm, SmallRowsKeepTheirDigits) {
  at::manual_seed(2);
  const at::Tensor x = at::randn({6, 100}) * at::tensor({1e-6, 1e-4, 1e-2, 1.0, 1e4, 1e8}).to(at::kFloat).unsqueeze(1);
  const at::Tensor w = at::randn({100});
  const at::Tensor want = rms_norm_naive(x.to(at::kDouble), w.to(at::kDouble), 1e-6);
  EXPECT_LE(fixture_error(rms_norm(x, w, 1e-6), want, true), 1e-6);
  EXPECT_EQ(rms_norm(at::zeros({2, 20}), at::ones({20}), 1e-6).abs().max().item<float>(), 0);
}

TEST(AddRmsNorm, MatchesNaive) {
  for (const int64_t dim : {1, 16, 63, 100, 768}) {
    at::manual_seed(static_cast<uint64_t>(dim));
    const Tensors in = {at::randn({9, dim}), at::randn({9, dim}), at::randn({dim})};
    const Tensors up = {at::randn({9, dim}), at::randn({9, dim})};
    const auto fast = [](const Tensors& t) {
      auto [y, sum] = add_rms_norm(t[0], t[1], t[2], 1e-5);
      return Tensors{y, sum};
    };
    const auto naive = [](const Tensors& t) {
      const at::Tensor sum = t[0] + t[1];
      return Tensors{rms_norm_naive(sum, t[2], 1e-5), sum};
    };
    expect_close(run(fast, in, up, at::kFloat), run(naive, in, up, at::kDouble), 3e-6, "dim " + std::to_string(dim));
  }
}

TEST(AddRmsNorm, AnOutputThatIsNotUsedCostsNothingAndChangesNothing) {
  at::manual_seed(4);
  const Tensors in = {at::randn({4, 24}), at::randn({4, 24}), at::randn({24})}, up = {at::randn({4, 24})};
  const auto only_y = [](const Tensors& t) { return Tensors{std::get<0>(add_rms_norm(t[0], t[1], t[2], 1e-5))}; };
  const auto naive = [](const Tensors& t) { return Tensors{rms_norm_naive(t[0] + t[1], t[2], 1e-5)}; };
  expect_close(run(only_y, in, up, at::kFloat), run(naive, in, up, at::kDouble), 3e-6, "y");
  const Tensors leaf = leaves(in, at::kFloat);
  backward({std::get<1>(add_rms_norm(leaf[0], leaf[1], leaf[2], 1e-5))}, {up[0]});
  EXPECT_TRUE(at::equal(leaf[0].grad(), up[0]));
  EXPECT_TRUE(at::equal(leaf[1].grad(), up[0]));
  EXPECT_FALSE(leaf[2].grad().defined());
}

TEST(GatedRmsNorm, MatchesNaiveInBothOrders) {
  for (const int64_t dim : {3, 16, 63, 64, 100, 1000}) {
    for (const bool gate_first : {false, true}) {
      for (const int64_t groups : {1, 2, 5}) {
        if (dim % groups != 0) continue;
        at::manual_seed(static_cast<uint64_t>(dim));
        const Tensors in = {at::randn({7, 3, dim}), at::randn({7, 3, dim}) * 2, at::randn({dim})};
        const Tensors up = {at::randn({7, 3, dim})};
        const auto fast = [&](const Tensors& t) {
          return Tensors{gated_rms_norm(t[0], t[1], t[2], 1e-5, gate_first, groups)};
        };
        const auto naive = [&](const Tensors& t) {
          return Tensors{gated_rms_norm_naive(t[0], t[1], t[2], 1e-5, gate_first, groups)};
        };
        expect_close(run(fast, in, up, at::kFloat), run(naive, in, up, at::kDouble), 4e-6,
                     fmt::format("dim {}, gate_first {}, groups {}", dim, gate_first, groups));
      }
    }
  }
}

TEST(GatedRmsNorm, WeightGradientOfManyRows) {
  at::manual_seed(6);
  const int64_t rows = 5000, dim = 48;
  const Tensors in = {at::randn({rows, dim}), at::randn({rows, dim}), at::randn({dim})}, up = {at::randn({rows, dim})};
  for (const int64_t groups : {1, 3}) {
    const auto fast = [&](const Tensors& t) { return Tensors{gated_rms_norm(t[0], t[1], t[2], 1e-5, true, groups)}; };
    const auto naive = [&](const Tensors& t) {
      return Tensors{gated_rms_norm_naive(t[0], t[1], t[2], 1e-5, true, groups)};
    };
    expect_close(run(fast, in, up, at::kFloat), run(naive, in, up, at::kDouble), 4e-6, std::to_string(groups));
  }
}

TEST(GatedRmsNorm, ThreadsAndStridesDoNotChangeTheResult) {
  at::manual_seed(7);
  const Tensors in = {at::randn({999, 64}), at::randn({999, 64}), at::randn({64})}, up = {at::randn({999, 64})};
  const auto f = [](const Tensors& t) { return Tensors{gated_rms_norm(t[0], t[1], t[2], 1e-5)}; };
  const int threads = at::get_num_threads();
  const Tensors want = run(f, in, up, at::kFloat);
  at::set_num_threads(1);
  const Tensors alone = run(f, in, up, at::kFloat);
  at::set_num_threads(threads);
  const Tensors across = run(f, {in[0].t().contiguous().t(), in[1], in[2]}, {up[0].t().contiguous().t()}, at::kFloat);
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_TRUE(at::equal(want[i], alone[i])) << i;
    EXPECT_TRUE(at::equal(want[i], across[i])) << i;
  }
}

TEST(RmsNorm, Bfloat16IsComputedInFloat32) {
  at::manual_seed(8);
  const at::Tensor x = at::randn({6, 40}).to(at::kBFloat16), gate = at::randn({6, 40}), w = at::randn({40});
  const at::Tensor wide = x.to(at::kFloat);
  EXPECT_TRUE(at::equal(rms_norm(x, w, 1e-5), rms_norm(wide, w, 1e-5).to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(gated_rms_norm(x, gate, w, 1e-5), gated_rms_norm(wide, gate, w, 1e-5).to(at::kBFloat16)));
  const auto [y, sum] = add_rms_norm(x, wide, w, 1e-5);  // a 16-bit branch onto a float32 stream
  EXPECT_EQ(sum.scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(sum, wide + wide));
  EXPECT_EQ(rms_norm_naive(x, w, 1e-5).scalar_type(), at::kBFloat16);
}

TEST(RmsNorm, BadAndEmptyInput) {
  EXPECT_THROW(rms_norm(at::ones({2, 3}), at::ones({4}), 1e-5), c10::Error);
  EXPECT_THROW(rms_norm(at::ones({2, 3}, at::kInt), at::ones({3}), 1e-5), c10::Error);
  EXPECT_THROW(add_rms_norm(at::ones({2, 3}), at::ones({3, 2}), at::ones({3}), 1e-5), c10::Error);
  EXPECT_THROW(gated_rms_norm(at::ones({2, 6}), at::ones({2, 3}), at::ones({6}), 1e-5), c10::Error);
  EXPECT_THROW(gated_rms_norm(at::ones({2, 6}), at::ones({2, 6}), at::ones({6}), 1e-5, true, 4), c10::Error);
  const at::Tensor w = at::ones({3}).requires_grad_();
  const at::Tensor y = rms_norm(at::ones({0, 3}), w, 1e-5);
  EXPECT_EQ(y.sizes(), at::IntArrayRef({0, 3}));
  backward({y.sum()}, {});
  EXPECT_TRUE(at::equal(w.grad(), at::zeros({3})));
}

}  // namespace
}  // namespace oryx::ops
