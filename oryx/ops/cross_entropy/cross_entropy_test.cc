#include "oryx/ops/cross_entropy/cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "oryx/common/error.h"
#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using test::fixture_error;
using torch::autograd::backward;

// Limits by row of cross_entropy_large*; the others as one tensor.
bool is_large(const test::Fixture& f) { return f.name.find("large") != std::string::npos; }

void expect_outputs(const CrossEntropyResult& r, const test::Fixture& f) {
  EXPECT_LE(fixture_error(r.loss, f.at("loss")), 4e-6);
  EXPECT_LE(fixture_error(r.nll, f.at("nll")), 4e-6);
  EXPECT_LE(fixture_error(r.lse, f.at("lse")), 4e-6);
}

TEST(CrossEntropy, Fixture) {
  ORYX_REQUIRE_FIXTURES();
  for (const test::Fixture& f : test::fixtures("ops", "cross_entropy")) {
    SCOPED_TRACE(f.name);
    const at::Tensor logits = f.leaf("logits");
    const auto r = cross_entropy(logits, f.at("targets"), f.attrs.at("ignore_index").get<int64_t>(),
                                 f.attrs.at("z_coef").get<double>());
    expect_outputs(r, f);
    backward({r.loss}, {});
    EXPECT_LE(fixture_error(logits.grad(), f.at("d_logits"), is_large(f)), is_large(f) ? 2e-4 : 1e-5);
  }
}

// logits = logits I: the product with the identity is exact, so the linear form must give the same numbers, and the
// gradients of hidden and weight are known: d_logits, and d_logits^T logits.
TEST(LinearCrossEntropy, Fixture) {
  ORYX_REQUIRE_FIXTURES();
  for (const test::Fixture& f : test::fixtures("ops", "cross_entropy")) {
    SCOPED_TRACE(f.name);
    const at::Tensor hidden = f.leaf("logits"), weight = at::eye(hidden.size(1), hidden.options().requires_grad(false)).requires_grad_();
    const auto r = linear_cross_entropy(hidden, weight, f.at("targets"), f.attrs.at("ignore_index").get<int64_t>(),
                                        f.attrs.at("z_coef").get<double>());
    expect_outputs(r, f);
    backward({r.loss}, {});
    EXPECT_LE(fixture_error(hidden.grad(), f.at("d_logits"), is_large(f)), is_large(f) ? 2e-4 : 1e-5);
    const at::Tensor want = at::mm(f.at("d_logits").to(at::kDouble).t(), f.at("logits").to(at::kDouble));
    EXPECT_LE(fixture_error(weight.grad(), want), is_large(f) ? 2e-4 : 1e-5);
  }
}

struct Problem {
  at::Tensor hidden, weight, targets;
  Problem(int64_t n, int64_t dim, int64_t classes) {
    at::manual_seed(static_cast<uint64_t>(n + classes));
    hidden = at::randn({n, dim});
    weight = at::randn({classes, dim}) / std::sqrt(static_cast<double>(dim)) * 2;
    targets = at::randint(classes, {n}, at::kLong);
    for (int64_t i = 0; i < n; i += 7) targets[i] = -100;
  }
};

// loss, nll, lse, d_hidden, d_weight of 3 * loss
std::vector<at::Tensor> run_linear(const Problem& p, at::ScalarType dtype, double z_coef) {
  const at::Tensor h = p.hidden.to(dtype, false, true).requires_grad_(),
                   w = p.weight.to(dtype, false, true).requires_grad_();
  const auto r = linear_cross_entropy(h, w, p.targets, -100, z_coef);
  backward({r.loss * 3}, {});
  return {r.loss.detach(), r.nll, r.lse, h.grad(), w.grad()};
}

TEST(LinearCrossEntropy, MatchesNaiveAtOddShapes) {
  for (const int64_t n : {1, 2, 63, 100}) {
    for (const int64_t classes : {1, 2, 17, 100, 1000, 5003}) {
      const Problem p(n, 20, classes);
      const auto got = run_linear(p, at::kFloat, 1e-3), want = run_linear(p, at::kDouble, 1e-3);
      for (size_t i = 0; i < got.size(); ++i) {
        const double size = want[i].abs().max().item<double>();
        if (size < 1e-12) {  // nothing kept, or one class: all zero
          EXPECT_LE(got[i].abs().max().item<double>(), 1e-6);
          continue;
        }
        EXPECT_LE(fixture_error(got[i], want[i]), 5e-6) << n << " x " << classes << ", result " << i;
      }
    }
  }
}

TEST(LinearCrossEntropy, SeveralBlocks) {  // 100,003 classes: blocks of at most 167 rows
  const Problem p(250, 4, 100003);
  const auto got = run_linear(p, at::kFloat, 0), want = run_linear(p, at::kDouble, 0);
  // d_hidden is a float32 product over 100,003 classes, whose own rounding is near 2e-4; a wrong block would be off
  // by 1.
  const double limits[] = {5e-6, 5e-6, 5e-6, 1e-3, 5e-6};
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LE(fixture_error(got[i], want[i]), limits[i]) << i;
}

TEST(CrossEntropy, EveryProbabilityOfALongRowIsAccurate) {
  at::manual_seed(9);
  const at::Tensor x = at::randn({2, 100003}) * 3, targets = at::tensor({5, 70000}, at::kLong);
  const at::Tensor a = x.clone().requires_grad_(), b = x.to(at::kDouble).requires_grad_();
  backward({cross_entropy(a, targets).loss}, {});
  backward({cross_entropy_naive(b, targets).loss}, {});
  EXPECT_LE(((a.grad() - b.grad()) / b.grad()).abs().max().item<double>(), 3e-6);
}

TEST(LinearCrossEntropy, WithoutGradientsGivesTheSameValues) {
  const Problem p(50, 16, 321);
  const auto want = run_linear(p, at::kFloat, 1e-4);
  const auto r = linear_cross_entropy(p.hidden, p.weight, p.targets, -100, 1e-4);
  EXPECT_FALSE(r.loss.requires_grad());
  EXPECT_TRUE(at::equal(r.loss, want[0]));
  EXPECT_TRUE(at::equal(r.nll, want[1]));
  EXPECT_TRUE(at::equal(r.lse, want[2]));
}

TEST(LinearCrossEntropy, OneGradientAtATime) {
  const Problem p(30, 16, 77);
  const auto want = run_linear(p, at::kFloat, 0);
  const at::Tensor h = p.hidden.clone().requires_grad_(), w = p.weight.clone().requires_grad_();
  backward({linear_cross_entropy(h, p.weight, p.targets).loss * 3}, {});
  backward({linear_cross_entropy(p.hidden, w, p.targets).loss * 3}, {});
  EXPECT_TRUE(at::equal(h.grad(), want[3]));
  EXPECT_TRUE(at::equal(w.grad(), want[4]));
}

TEST(LinearCrossEntropy, GradientsAddUpAndAreGivenOnce) {
  const Problem p(30, 16, 77);
  const at::Tensor w = p.weight.clone().requires_grad_();
  const at::Tensor first = linear_cross_entropy(p.hidden, w, p.targets).loss;
  backward({first}, {}, /*retain_graph=*/true);
  const at::Tensor once = w.grad().clone();
  EXPECT_THROW(backward({first}, {}), c10::Error);
  backward({linear_cross_entropy(p.hidden, w, p.targets).loss}, {});
  EXPECT_LE(fixture_error(w.grad(), once * 2), 1e-6);
}

TEST(LinearCrossEntropy, Bfloat16) {
  const Problem p(65, 64, 999);
  const auto got = run_linear(p, at::kBFloat16, 0), want = run_linear(p, at::kDouble, 0);
  EXPECT_EQ(got[0].scalar_type(), at::kFloat);
  EXPECT_EQ(got[3].scalar_type(), at::kBFloat16);
  EXPECT_EQ(got[4].scalar_type(), at::kBFloat16);
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LE(test::norm_error(got[i], want[i]), 0.02) << i;
}

TEST(LinearCrossEntropy, UnderAutocastTheParametersStayFloat32) {
  const Problem p(33, 32, 100);
  const at::Tensor h = p.hidden.clone().requires_grad_(), w = p.weight.clone().requires_grad_();
  const auto want = run_linear(p, at::kBFloat16, 0);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const auto r = linear_cross_entropy(h, w, p.targets);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  backward({r.loss * 3}, {});
  EXPECT_TRUE(at::equal(r.nll, want[1]));
  EXPECT_EQ(w.grad().scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(w.grad().to(at::kBFloat16), want[4]));
}

TEST(CrossEntropy, MatchesNaive) {
  for (const int64_t classes : {1, 3, 16, 100, 2048, 2049, 6000}) {
    at::manual_seed(static_cast<uint64_t>(classes));
    const at::Tensor x = at::randn({9, classes}) * 5, targets = at::randint(classes, {9}, at::kInt);
    const at::Tensor a = x.clone().requires_grad_(), b = x.to(at::kDouble).requires_grad_();
    const auto got = cross_entropy(a, targets, 2, 1e-2), want = cross_entropy_naive(b, targets, 2, 1e-2);
    backward({got.loss * 0.5}, {});
    backward({want.loss * 0.5}, {});
    EXPECT_LE(fixture_error(got.lse, want.lse), 1e-6) << classes;
    EXPECT_LE((got.loss - want.loss).abs().item<double>(), 2e-6 * (1 + want.loss.abs().item<double>())) << classes;
    // The lanes of the baseline instruction set are few and sum longest.
    EXPECT_LE((a.grad() - b.grad()).abs().max().item<double>(), 3e-6 * (1e-3 + b.grad().abs().max().item<double>()) + 1e-8) << classes;
    const at::Tensor half = x.to(at::kBFloat16), wide = half.to(at::kFloat);
    EXPECT_TRUE(at::equal(cross_entropy(half, targets).nll, cross_entropy(wide, targets).nll)) << classes;
  }
}

TEST(CrossEntropy, HugeLogitsMasksAndNan) {
  const float inf = std::numeric_limits<float>::infinity();
  at::Tensor x = at::full({4, 40}, -1e30f);
  x[0][7] = 1e30f;
  x[1].fill_(-inf);
  x[1][39] = 2;
  x[2].fill_(3e4f);
  x[3].fill_(std::numeric_limits<float>::quiet_NaN());
  const at::Tensor leaf = x.slice(0, 0, 3).clone().requires_grad_();
  const auto r = cross_entropy(leaf, at::tensor({7, 39, 0}, at::kLong));
  EXPECT_EQ(r.nll[0].item<float>(), 0);
  EXPECT_EQ(r.nll[1].item<float>(), 0);
  EXPECT_NEAR(r.nll[2].item<float>(), std::log(40.0), 1e-6);
  backward({r.loss}, {});
  EXPECT_TRUE(leaf.grad().isfinite().all().item<bool>());
  EXPECT_TRUE(std::isnan(cross_entropy(x, at::tensor({7, 39, 0, 1}, at::kLong)).loss.item<float>()));
}

TEST(CrossEntropy, NothingKept) {
  const at::Tensor x = at::randn({3, 10}).requires_grad_(), ignored = at::full({3}, -100, at::kLong);
  const auto r = cross_entropy(x, ignored);
  EXPECT_EQ(r.loss.item<float>(), 0);
  backward({r.loss}, {});
  EXPECT_TRUE(at::equal(x.grad(), at::zeros({3, 10})));
  const at::Tensor h = at::randn({3, 4}).requires_grad_(), w = at::randn({10, 4}).requires_grad_();
  const auto l = linear_cross_entropy(h, w, ignored);
  backward({l.loss}, {});
  EXPECT_EQ(l.loss.item<float>(), 0);
  EXPECT_TRUE(at::equal(w.grad(), at::zeros({10, 4})));
  EXPECT_EQ(linear_cross_entropy(h.slice(0, 0, 0), w, ignored.slice(0, 0, 0)).loss.item<float>(), 0);
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(CrossEntropy, TargetsOutOfRangeAreNamed) {
  const at::Tensor x = at::randn({3, 10}), h = at::randn({3, 4}), w = at::randn({10, 4});
  for (const int bad : {10, -1, -99}) {
    const at::Tensor targets = at::tensor({1, bad, 2}, at::kInt);
    for (const std::string& text :
         {message_of([&] { cross_entropy(x, targets); }), message_of([&] { linear_cross_entropy(h, w, targets); }),
          message_of([&] { cross_entropy(x.to(at::kDouble), targets); })}) {
      EXPECT_NE(text.find(fmt::format("target {} at row 1", bad)), std::string::npos) << text;
      EXPECT_EQ(text.find('\n'), std::string::npos);
    }
  }
  EXPECT_THROW(cross_entropy(x, at::zeros({4}, at::kLong)), c10::Error);
  EXPECT_THROW(cross_entropy(x, at::zeros({3})), c10::Error);
  EXPECT_THROW(linear_cross_entropy(h, at::randn({10, 5}), at::zeros({3}, at::kLong)), c10::Error);
}

TEST(LinearCrossEntropy, RepeatsBitForBitAndNotDependingOnThreadsInTheSoftmax) {
  const Problem p(40, 16, 3001);
  const auto a = run_linear(p, at::kFloat, 0), b = run_linear(p, at::kFloat, 0);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i], b[i])) << i;
  const at::Tensor logits = at::linear(p.hidden, p.weight);
  const auto many = cross_entropy(logits, p.targets);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = cross_entropy(logits, p.targets);
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(many.nll, one.nll));
  EXPECT_TRUE(at::equal(many.loss, one.loss));
}

}  // namespace
}  // namespace oryx::ops
