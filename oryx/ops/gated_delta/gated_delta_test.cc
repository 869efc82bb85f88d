#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/gated_delta/gates.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/common/error.h"
#include "oryx/ops/gated_delta/delta_test_support.h"
#include "oryx/ops/gated_delta/gated_delta_internal.h"
#include "oryx/ops/gated_delta/gated_delta_kernels.h"
#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using namespace delta_test;

TEST(GatedDelta, EqualsNaiveInDouble) {
  const OneThread one_thread;
  for (const auto& s : shapes()) {
    SCOPED_TRACE(fmt::format("T {} heads {}/{}/{} K {} V {}", s.T, s.Hq, s.Hk, s.Hv, s.K, s.V));
    const Case c(s, at::kDouble);
    expect_near(run(c, gated_delta_rule), run(c, gated_delta_rule_naive), 1e-12, 1e-11);
  }
}

TEST(GatedDelta, EqualsNaiveInFloat) {
  const OneThread one_thread;
  for (const auto& s : shapes()) {
    SCOPED_TRACE(fmt::format("T {} heads {}/{}/{} K {} V {}", s.T, s.Hq, s.Hk, s.Hv, s.K, s.V));
    const Case c(s, at::kFloat);
    auto x = run(c, gated_delta_rule);
    for (auto& y : x) y = y.to(at::kDouble);
    expect_near(x, run(c.exact(), gated_delta_rule_naive), 5e-6, 1e-5);
  }
}

TEST(GatedDelta, LongAndFullSize) {
  const OneThread one_thread;
  for (const auto& s :
       {Shape{1, 1000, 1, 1, 1, 32, 32, {}, {}, true, 0.05}, Shape{1, 100, 1, 1, 2, 128, 128, {}, {}, true, 0.1}}) {
    const Case c(s, at::kFloat);
    auto x = run(c, gated_delta_rule);
    for (auto& y : x) y = y.to(at::kDouble);
    expect_near(x, run(c.exact(), gated_delta_rule_naive), 5e-6, 1e-5);
  }
}

// The kernels against the other chunked form, both in float32, strided inputs included.
TEST(GatedDelta, KernelsEqualTensorForm) {
  using namespace gated_delta;
  for (const auto& s : shapes()) {
    SCOPED_TRACE(fmt::format("T {} heads {}/{}/{} K {} V {}", s.T, s.Hq, s.Hk, s.Hv, s.K, s.V));
    const Case c(s, at::kFloat);
    const at::NoGradGuard no_grad;
    const auto p = check_arguments("test", c.q, c.k, c.v, c.g, c.beta, {}, c.cu, c.spans, {}, 1e-6);
    const auto strided = [](const at::Tensor& x) { return at::cat({x, x}, 2).slice(2, x.size(2)); };
    const Inputs plain{c.q, c.k, c.v, c.g, c.beta, c.state};
    const Inputs views{strided(c.q), strided(c.k), strided(c.v), strided(c.g), strided(c.beta), c.state};
    const Outputs x = kernel_forward(p, views, true), y = chunked_forward(p, plain, true);
    EXPECT_LT(test::fixture_error(x.chunk_states.transpose(2, 3), y.chunk_states), 5e-6);
    const Gradients dx = kernel_backward(p, views, x, c.up_o, c.up_state);
    const Gradients dy = chunked_backward(p, plain, y, c.up_o, c.up_state);
    expect_near({x.o, x.final_state, dx.q, dx.k, dx.v, dx.g, dx.beta, dx.state},
                {y.o, y.final_state, dy.q, dy.k, dy.v, dy.g, dy.beta, dy.state}, 5e-6, 1e-5);
    const Outputs again = kernel_forward(p, plain, false);
    EXPECT_TRUE(at::equal(again.o, x.o) && at::equal(again.final_state, x.final_state)) << "not the same bits";
  }
}

TEST(GatedDelta, EveryInstructionSet) {
  for (const int64_t target : gated_delta::instruction_sets()) {
    gated_delta::choose_instruction_set(target);
    for (const auto& s : {Shape{1, 150, 1, 1, 2, 17, 16, {0, 70, 150}, {0, 3, 10, 0, 60, 80, 0, 149, 150}},
                          Shape{2, 65, 1, 1, 3, 5, 7}, Shape{1, 130, 4, 2, 1, 24, 9}}) {
      SCOPED_TRACE(fmt::format("target {} T {} K {} V {}", target, s.T, s.K, s.V));
      const Case c(s, at::kFloat);
      auto x = run(c, gated_delta_rule);
      for (auto& y : x) y = y.to(at::kDouble);
      expect_near(x, run(c.exact(), gated_delta_rule), 5e-6, 1e-5);
      const at::NoGradGuard no_grad;
      const auto one = [](const at::Tensor& t) { return t.select(1, 0); };
      const Case d({2, 1, s.Hq, s.Hk, s.Hv, s.K, s.V}, at::kFloat), e = d.exact();
      at::Tensor S = d.state.clone(), Se = e.state.clone();
      const auto o = gated_delta_step(one(d.q), one(d.k), one(d.v), one(d.g), one(d.beta), S);
      const auto oe = gated_delta_step(one(e.q), one(e.k), one(e.v), one(e.g), one(e.beta), Se);
      EXPECT_LT(test::fixture_error(o, oe), 5e-6);
      EXPECT_LT(test::fixture_error(S, Se), 5e-6);
    }
  }
  gated_delta::choose_instruction_set(0);
}

TEST(GatedDelta, ThreadsDoNotChangeABit) {
  const Case c({2, 200, 3, 3, 3, 32, 48}, at::kFloat);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = run(c, gated_delta_rule);
  at::set_num_threads(3);
  const auto three = run(c, gated_delta_rule);
  at::set_num_threads(threads);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(at::equal(one[i], three[i])) << kNames[i];
}

// The derivative along random directions, by central differences in float64.
TEST(GatedDelta, GradientIsTheDerivative) {
  const OneThread one_thread;
  for (const bool naive : {false, true}) {
    const auto op = naive ? gated_delta_rule_naive : gated_delta_rule;
    const Case c({1, 70, 2, 1, 1, 4, 3, {0, 5, 70}, {0, 2, 68}}, at::kDouble);
    const auto loss = [&](const std::vector<at::Tensor>& x) {
      const auto r = op(x[0], x[1], x[2], x[3], x[4], x[5], c.cu, c.spans, 0.3, 1e-2);
      return (r.o * c.up_o).sum() + (r.final_state * c.up_state).sum();
    };
    const auto leaves = c.leaves();
    const auto grads = torch::autograd::grad({loss(leaves)}, leaves);
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < leaves.size(); ++i) {
      const at::Tensor direction = at::randn_like(leaves[i]);
      auto plus = leaves, minus = leaves;
      plus[i] = leaves[i] + 1e-5 * direction;
      minus[i] = leaves[i] - 1e-5 * direction;
      const double numeric = ((loss(plus) - loss(minus)) / 2e-5).item<double>();
      const double analytic = (grads[i] * direction).sum().item<double>();
      EXPECT_NEAR(numeric, analytic, 1e-7 * std::max(1.0, std::abs(numeric))) << kNames[i + 2];
    }
  }
}

// Outputs and gradients of a fixture by name, in the type asked for.
std::map<std::string, at::Tensor> fixture_results(const test::Fixture& f, bool naive, at::ScalarType dtype) {
  std::map<std::string, at::Tensor> in, out;
  for (const char* n : {"q", "k", "v", "g", "beta", "state0"})
    if (f.has(n)) in[n] = f.at(n).to(dtype).clone().set_requires_grad(true);
  const auto op = naive ? gated_delta_rule_naive : gated_delta_rule;
  const auto r = op(in.at("q"), in.at("k"), in.at("v"), in.at("g"), in.at("beta"), f.has("state0") ? Optional(in.at("state0")) : Optional(),
                    f.has("cu_seqlens") ? Optional(f.at("cu_seqlens")) : Optional(), {}, f.attrs.at("scale").get<double>(), f.attrs.at("l2_eps").get<double>());
  out["o"] = r.o;
  out["final_state"] = r.final_state;
  torch::autograd::backward({r.o, r.final_state}, {f.at("up_o").to(dtype), f.at("up_final_state").to(dtype)});
  for (const auto& [n, x] : in) out["d_" + n] = x.grad();
  return out;
}

// The recurrence in float64 gives the golden values to their last digit; in float32 it may err by the stated limits, and the chunked form too, or by
// three times what the recurrence errs where a folder's values are harder.
TEST(GatedDelta, FixtureValuesAndGradients) {
  const OneThread one_thread;
  ORYX_REQUIRE_FIXTURES();
  for (const auto& f : test::fixtures("ops", "gated_delta_rule")) {
    SCOPED_TRACE(f.name);
    const bool extreme = f.name.find("extreme") != std::string::npos;
    const auto exact = fixture_results(f, true, at::kDouble), plain = fixture_results(f, true, at::kFloat), got = fixture_results(f, false, at::kFloat);
    for (const auto& [n, x] : got) {
      const bool gradient = n.substr(0, 2) == "d_";
      // Row by row for vectors; a token's d_g is a sum that cancels, of which even the recurrence in float32 keeps only absolute digits.
      const bool by_row = extreme && x.dim() == 4;
      const double limit = gradient ? (extreme ? 2e-4 : 1e-5) : (extreme ? 1e-4 : 5e-6);
      EXPECT_LT(test::fixture_error(exact.at(n), f.at(n), by_row), 1e-6) << n;
      const double plain_error = test::fixture_error(plain.at(n), f.at(n), by_row);
      if (!by_row) {
        EXPECT_LT(plain_error, f.limit(n, limit)) << n;
      }
      EXPECT_LT(test::fixture_error(x, f.at(n), by_row), std::max(limit, std::min(3 * plain_error, 1e-2))) << n;
    }
  }
}

// Token by token through the state = at once.
TEST(GatedDelta, StepEqualsParallel) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    for (const auto& s : {Shape{3, 70, 2, 2, 2, 16, 16}, Shape{1, 20, 4, 1, 2, 5, 7}, Shape{2, 9, 1, 2, 4, 64, 33}}) {
      const Case c(s, dtype);
      const at::NoGradGuard no_grad;
      const auto whole = gated_delta_rule(c.q, c.k, c.v, c.g, c.beta, c.state);
      at::Tensor state = c.state.clone();
      const void* where = state.data_ptr();
      std::vector<at::Tensor> o;
      for (int64_t t = 0; t < s.T; ++t) {
        const auto at_t = [t](const at::Tensor& x) { return x.select(1, t); };
        o.push_back(gated_delta_step(at_t(c.q), at_t(c.k), at_t(c.v), at_t(c.g), at_t(c.beta), state));
      }
      EXPECT_EQ(state.data_ptr(), where);
      const double limit = dtype == at::kFloat ? 5e-6 : 1e-12;
      EXPECT_LT(test::fixture_error(at::stack(o, 1), whole.o), limit);
      EXPECT_LT(test::fixture_error(state, whole.final_state), limit);
    }
  }
}

TEST(GatedDelta, StepUpdatesAViewInPlace) {
  const Case c({2, 1, 2, 2, 2, 16, 8}, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto one = [](const at::Tensor& x) { return x.select(1, 0); };
  at::Tensor plain = c.state.clone(), slot = at::zeros({2, 3, 2, 8, 16}, at::kFloat);
  slot.select(1, 1).copy_(plain);
  at::Tensor view = slot.select(1, 1);
  const auto a = gated_delta_step(one(c.q), one(c.k), one(c.v), one(c.g), one(c.beta), plain);
  const auto b = gated_delta_step(one(c.q), one(c.k), one(c.v), one(c.g), one(c.beta), view);
  EXPECT_TRUE(at::equal(a, b));
  EXPECT_TRUE(at::equal(slot.select(1, 1), plain));
  EXPECT_EQ(slot.select(1, 0).abs().sum().item<float>() + slot.select(1, 2).abs().sum().item<float>(), 0);
}

TEST(GatedDelta, TwoCallsThroughTheStateEqualOne) {
  const OneThread one_thread;
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    for (const int64_t cut : {1, 63, 64, 99}) {
      const Case c({2, 100, 2, 1, 2, 16, 16}, dtype);
      const auto whole = run(c, gated_delta_rule);
      const auto split = run(c, [&](auto& q, auto& k, auto& v, auto& g, auto& b, auto S, auto, auto, auto, double) {
        const auto head = [&](const at::Tensor& x) { return x.slice(1, 0, cut); };
        const auto tail = [&](const at::Tensor& x) { return x.slice(1, cut); };
        const auto one = gated_delta_rule(head(q), head(k), head(v), head(g), head(b), S);
        const auto two = gated_delta_rule(tail(q), tail(k), tail(v), tail(g), tail(b), one.final_state);
        return GatedDeltaResult{at::cat({one.o, two.o}, 1), two.final_state};
      });
      const bool single = dtype == at::kFloat;
      expect_near(split, whole, single ? 5e-6 : 1e-12, single ? 1e-5 : 1e-11);
    }
  }
}

TEST(GatedDelta, PackedEqualsSeparate) {
  const std::vector<int32_t> cu = {0, 64, 65, 65, 130};
  const Case c({1, 130, 2, 2, 2, 16, 16, cu}, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto packed = gated_delta_rule(c.q, c.k, c.v, c.g, c.beta, c.state, c.cu);
  for (size_t n = 0; n + 1 < cu.size(); ++n) {
    const auto part = [&](const at::Tensor& x) { return x.slice(1, cu[n], cu[n + 1]); };
    const int64_t i = static_cast<int64_t>(n);
    const auto alone =
        gated_delta_rule(part(c.q), part(c.k), part(c.v), part(c.g), part(c.beta), c.state.slice(0, i, i + 1));
    EXPECT_LT(test::fixture_error(part(packed.o), alone.o), 1e-6);
    EXPECT_LT(test::fixture_error(packed.final_state.slice(0, i, i + 1), alone.final_state), 1e-6);
  }
}

TEST(GatedDelta, SpansOnlyChooseTheReadout) {
  const Case c({2, 150, 2, 2, 2, 16, 16}, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto all = gated_delta_rule(c.q, c.k, c.v, c.g, c.beta, c.state);
  const at::Tensor spans = ints({0, 3, 20, 1, 60, 150}).view({2, 3});
  const auto some = gated_delta_rule(c.q, c.k, c.v, c.g, c.beta, c.state, {}, spans);
  at::Tensor mask = at::zeros({2, 150, 1, 1}, at::kFloat);
  mask[0].slice(0, 3, 20).fill_(1);
  mask[1].slice(0, 60, 150).fill_(1);
  EXPECT_TRUE(at::equal(some.final_state, all.final_state));
  EXPECT_EQ((some.o * (1 - mask)).abs().sum().item<float>(), 0);
  EXPECT_LT(test::fixture_error(some.o, all.o * mask), 1e-6);
}

TEST(GatedDelta, BFloat16) {
  const Shape s{2, 70, 2, 1, 2, 16, 16};
  const Case c(s, at::kBFloat16);
  const auto x = run(c, gated_delta_rule), ref = run(c, gated_delta_rule_naive);
  EXPECT_EQ(x[0].scalar_type(), at::kBFloat16);
  EXPECT_EQ(x[1].scalar_type(), at::kFloat);
  expect_near(x, ref, 1e-2, 1e-2);
}

TEST(GatedDelta, NanIsNotHidden) {
  for (const int which : {0, 1, 2, 3, 4}) {
    Case c({1, 70, 1, 1, 1, 16, 16}, at::kFloat);
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> x = {c.q.detach(), c.k.detach(), c.v.detach(), c.g.detach(), c.beta.detach()};
    x[which].select(1, 20).fill_(std::nanf(""));
    const auto r = gated_delta_rule(x[0], x[1], x[2], x[3], x[4]);
    EXPECT_TRUE(r.o.select(1, 20).isnan().any().item<bool>()) << which;
    EXPECT_EQ(r.final_state.isnan().any().item<bool>(), which > 0) << which;
  }
}

TEST(GatedDelta, EmptySequences) {
  const Case c({2, 0, 2, 2, 2, 16, 16}, at::kFloat);
  const auto x = run(c, gated_delta_rule);
  EXPECT_EQ(x[0].sizes(), at::IntArrayRef({2, 0, 2, 16}));
  EXPECT_TRUE(at::equal(x[1], c.state));
  EXPECT_TRUE(at::equal(x[7], c.up_state));
}

template <typename F>
std::string message(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(GatedDelta, BadInputIsRefusedInOneLine) {
  using ::testing::HasSubstr;
  const Case c({2, 10, 2, 2, 2, 16, 8}, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto rule = [&](const at::Tensor& k, const at::Tensor& g, Optional state = {}, Optional cu = {},
                        Optional spans = {}, std::optional<double> scale = {}) {
    return message([&] { gated_delta_rule(c.q, k, c.v, g, c.beta, state, cu, spans, scale); });
  };
  EXPECT_THAT(rule(c.k.slice(3, 0, 15), c.g), HasSubstr("q has 16 key dimensions but k has 15"));
  EXPECT_THAT(rule(c.k.slice(1, 0, 9), c.g), HasSubstr("k is [2, 9, 2, 16] but q is [2, 10, 2, 16]"));
  EXPECT_THAT(rule(c.k.repeat_interleave(2, 2).slice(2, 0, 3), c.g), HasSubstr("2 query, 3 key and 2 value heads"));
  EXPECT_THAT(rule(c.k.to(at::kDouble), c.g), HasSubstr("expected one dtype"));
  EXPECT_THAT(rule(c.k, c.g.to(at::kDouble)), HasSubstr("expected Float with q of Float"));
  EXPECT_THAT(rule(c.k, c.g.slice(2, 0, 1)), HasSubstr("expected 2 state heads"));
  EXPECT_THAT(rule(c.k, c.g.unsqueeze(0)), HasSubstr("dimensions"));
  EXPECT_THAT(rule(c.k, c.g, c.state.transpose(2, 3)), HasSubstr("expected Float [2, 2, 8, 16]"));
  EXPECT_THAT(rule(c.k, c.g, {}, ints({0, 10})), HasSubstr("in one row, but there are 2 rows"));
  EXPECT_THAT(rule(c.k, c.g, {}, {}, ints({0, 5, 11}).view({1, 3})), HasSubstr("span 0 is (row 0, 5 to 11)"));
  EXPECT_THAT(rule(c.k, c.g, {}, {}, ints({0, 5}).view({1, 2})), HasSubstr("expected Int [n, 3]"));
  EXPECT_THAT(rule(c.k, c.g, {}, {}, {}, std::nan("")), HasSubstr("scale is nan"));

  const Case one({1, 10, 1, 1, 1, 4, 4}, at::kFloat);
  const auto packed = [&](const at::Tensor& cu) {
    return message([&] { gated_delta_rule(one.q, one.k, one.v, one.g, one.beta, {}, cu); });
  };
  EXPECT_THAT(packed(ints({0, 9})), HasSubstr("runs from 0 to 9, expected 0 to 10"));
  EXPECT_THAT(packed(ints({0, 6, 5, 10})), HasSubstr("falls from 6 to 5"));
  EXPECT_THAT(packed(at::tensor({0, 10}, at::kLong)), HasSubstr("expected Int"));
  EXPECT_THAT(message([&] {
                at::Tensor state = at::zeros({1, 1, 4, 5}, at::kFloat);
                const auto t = [](const at::Tensor& x) { return x.select(1, 0); };
                gated_delta_step(t(one.q), t(one.k), t(one.v), t(one.g), t(one.beta), state);
              }),
              HasSubstr("gated_delta_step: the state is Float [1, 1, 4, 5]"));
}

// Sequences that are decoded side by side have the decays that each has alone, to the last bit.
TEST(GatedDelta, GatesOfFewRowsDoNotDependOnEachOther) {
  at::manual_seed(6);
  for (const int64_t heads : {2, 4, 7, 16}) {
    const at::Tensor A_log = at::randn({heads}), dt_bias = at::randn({heads}), ba = at::randn({16, 1, 2 * heads}) * 4;
    for (const int64_t M : {2, 5, 16}) {
      const auto [g, beta] = gated_delta_gates(ba.narrow(0, 0, M), A_log, dt_bias, 2);
      for (int64_t i = 0; i < M; ++i) {
        const auto [g1, beta1] = gated_delta_gates(ba.narrow(0, i, 1), A_log, dt_bias, 2);
        EXPECT_TRUE(at::equal(g[i], g1[0]) && at::equal(beta[i], beta1[0])) << heads << " heads, row " << i << " of " << M;
      }
    }
  }
}

}  // namespace
}  // namespace oryx::ops
