#include "oryx/ops/adamw/adamw.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using test::fixture_error;

TEST(Adamw, Fixture) {
  ORYX_REQUIRE_FIXTURES();
  for (const test::Fixture& f : test::fixtures("ops", "adamw")) {
    SCOPED_TRACE(f.name);
    const at::Tensor p = f.at("p0").clone(), m = at::zeros_like(p), v = at::zeros_like(p);
    AdamwOptions o;
    o.beta1 = f.attrs.at("beta1").get<double>(), o.beta2 = f.attrs.at("beta2").get<double>();
    o.eps = f.attrs.at("eps").get<double>(), o.weight_decay = f.attrs.at("weight_decay").get<double>();
    const at::Tensor lr = f.at("lr").to(at::kDouble);
    for (int64_t i = 0; i < f.at("grads").size(0); ++i) {
      o.lr = lr[i].item<double>();
      adamw_step(p, f.at("grads")[i], m, v, i + 1, o);
      EXPECT_LE(fixture_error(p, f.at("p")[i]), 4e-6) << "step " << i + 1;
      EXPECT_LE(fixture_error(m, f.at("m")[i]), 4e-6) << "step " << i + 1;
      EXPECT_LE(fixture_error(v, f.at("v")[i]), 4e-6) << "step " << i + 1;
    }
  }
}

struct State {
  std::vector<at::Tensor> p, m, v;
  State(const std::vector<at::Tensor>& parameters, at::ScalarType dtype) {
    for (const at::Tensor& t : parameters) {
      p.push_back(t.to(dtype, false, true));
      m.push_back(at::zeros_like(p.back()));
      v.push_back(at::zeros_like(p.back()));
    }
  }
};

std::vector<at::Tensor> like(const std::vector<at::Tensor>& parameters, double scale) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : parameters) out.push_back(at::randn_like(t) * scale);
  return out;
}

std::vector<at::Tensor> converted(std::vector<at::Tensor> tensors, at::ScalarType dtype) {
  for (at::Tensor& t : tensors) t = t.to(dtype);
  return tensors;
}

TEST(Adamw, ManyTensorsOfOddSizesMatchFloat64) {
  at::manual_seed(1);
  std::vector<at::Tensor> parameters;
  for (const int64_t n : {1, 15, 16, 63, 100, 1000, 65536, 65537, 200000, 0}) parameters.push_back(at::randn({n}));
  State a(parameters, at::kFloat), b(parameters, at::kDouble), c(parameters, at::kFloat);
  AdamwOptions o;
  o.lr = 3e-3;
  for (int64_t step = 1; step <= 4; ++step) {
    const auto g = like(parameters, step == 2 ? 1e-4 : 1.0);
    adamw_step_all(a.p, g, a.m, a.v, step, o, 0.5);
    adamw_step_all(b.p, converted(g, at::kDouble), b.m, b.v, step, o, 0.5);
    for (size_t i = 0; i < parameters.size(); ++i) adamw_step(c.p[i], g[i], c.m[i], c.v[i], step, o, 0.5);
  }
  for (size_t i = 0; i + 1 < parameters.size(); ++i) {
    EXPECT_LE(fixture_error(a.p[i], b.p[i]), 1e-6) << i;
    EXPECT_LE(fixture_error(a.m[i], b.m[i]), 1e-6) << i;
    EXPECT_LE(fixture_error(a.v[i], b.v[i]), 1e-6) << i;
    EXPECT_TRUE(at::equal(a.p[i], c.p[i])) << "the list form differs from the single one, tensor " << i;
  }
}

TEST(Adamw, ThreadsDoNotChangeTheResult) {
  at::manual_seed(2);
  const std::vector<at::Tensor> parameters = {at::randn({123457}), at::randn({77})};
  const auto g = like(parameters, 1.0);
  State a(parameters, at::kFloat), b(parameters, at::kFloat);
  const int threads = at::get_num_threads();
  adamw_step_all(a.p, g, a.m, a.v, 1, {});
  const double norm = global_norm(g);
  at::set_num_threads(1);
  adamw_step_all(b.p, g, b.m, b.v, 1, {});
  EXPECT_EQ(global_norm(g), norm);
  at::set_num_threads(threads);
  for (size_t i = 0; i < parameters.size(); ++i) EXPECT_TRUE(at::equal(a.p[i], b.p[i]));
}

TEST(Adamw, ParametersThatRequireGradAndMissingGradients) {
  const at::Tensor p = at::ones({5}).requires_grad_(), q = at::ones({5}).requires_grad_();
  State s({p.detach(), q.detach()}, at::kFloat);
  const auto before = p._version();
  adamw_step_all({p, q}, {at::ones({5}), at::Tensor()}, s.m, s.v, 1, {});
  EXPECT_TRUE(p.is_leaf());
  EXPECT_GT(p._version(), before);
  EXPECT_LT(p.detach()[0].item<float>(), 1.0f);
  EXPECT_TRUE(at::equal(q.detach(), at::ones({5})));
}

TEST(Adamw, RefusesWhatDoesNotFit) {
  const at::Tensor x = at::ones({4});
  EXPECT_THROW(adamw_step(x.clone(), at::ones({5}), x.clone(), x.clone(), 1, {}), c10::Error);
  EXPECT_THROW(adamw_step(x.clone(), x, x.clone(), x.clone(), 0, {}), c10::Error);
  EXPECT_THROW(
      adamw_step(at::ones({4, 4}).t(), at::ones({4, 4}), at::ones({4, 4}), at::ones({4, 4}).slice(1, 0, 2), 1, {}),
      c10::Error);
  EXPECT_THROW(adamw_step(x.to(at::kBFloat16), x, x.clone(), x.clone(), 1, {}), c10::Error);
  EXPECT_THROW(adamw_step(x.clone(), {}, x.clone(), x.clone(), 1, {}), c10::Error);
  EXPECT_THROW(adamw_step_all({x.clone()}, {}, {x.clone()}, {x.clone()}, 1, {}), c10::Error);
}

TEST(GlobalNorm, MatchesFloat64) {
  at::manual_seed(3);
  const std::vector<at::Tensor> g = {at::randn({70001}),
                                     at::Tensor(),
                                     at::randn({3, 5}).t(),
                                     at::randn({9}, at::kDouble),
                                     at::randn({33}).to(at::kBFloat16),
                                     at::full({2}, 1e25f)};
  double sum = 0;
  for (const at::Tensor& t : g) {
    if (t.defined()) sum += t.to(at::kDouble).square().sum().item<double>();
  }
  EXPECT_NEAR(global_norm(g) / std::sqrt(sum), 1.0, 1e-12);  // 1e25 squared is no float
  EXPECT_NEAR(global_norm({g[0]}) / g[0].to(at::kDouble).norm().item<double>(), 1.0, 1e-12);
  EXPECT_EQ(global_norm({}), 0);
  EXPECT_TRUE(std::isnan(global_norm({at::full({40}, std::nan(""))})));
}

}  // namespace
}  // namespace oryx::ops
