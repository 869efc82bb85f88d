#include "oryx/ops/kda/kda.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/common/error.h"
#include "oryx/ops/gated_delta/delta_test_support.h"
#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/gated_delta/gated_delta_kernels.h"
#include "oryx/ops/kda/kda_internal.h"
#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using delta_test::expect_near;
using delta_test::ints;
using delta_test::kNames;
using delta_test::OneThread;
using delta_test::Optional;
using delta_test::run;
using delta_test::Shape;

// A decay for each channel.
struct Case : delta_test::Case {
  Case(const Shape& s, at::ScalarType dtype, uint64_t seed = 7) : delta_test::Case(s, dtype, seed, /*by_channel=*/true) {}
};

// A long one more: sums of decays over many chunks.
std::vector<Shape> shapes() {
  std::vector<Shape> all = delta_test::shapes();
  all.push_back({1, 1000, 1, 1, 1, 16, 16, {}, {}, true, 0.01});
  return all;
}

TEST(Kda, EqualsNaiveInDouble) {
  const OneThread one_thread;
  for (const auto& s : shapes()) {
    SCOPED_TRACE(fmt::format("T {} heads {}/{}/{} K {} V {} decay {}", s.T, s.Hq, s.Hk, s.Hv, s.K, s.V, s.decay));
    const Case c(s, at::kDouble);
    expect_near(run(c, kda), run(c, kda_naive), 1e-12, 1e-11);
  }
}

TEST(Kda, EqualsNaiveInFloat) {
  const OneThread one_thread;
  for (const auto& s : shapes()) {
    SCOPED_TRACE(fmt::format("T {} heads {}/{}/{} K {} V {} decay {}", s.T, s.Hq, s.Hk, s.Hv, s.K, s.V, s.decay));
    const Case c(s, at::kFloat);
    expect_near(run(c, kda), run(c.exact(), kda_naive), 5e-6, 1e-5, /*typed=*/false);
  }
}

// The kernels against the other chunked form, both in float32, strided inputs included; and heads of full size.
TEST(Kda, KernelsEqualTensorForm) {
  const OneThread one_thread;
  auto all = shapes();
  all.push_back({1, 200, 2, 1, 1, 128, 128});
  for (const auto& s : all) {
    SCOPED_TRACE(fmt::format("T {} heads {}/{}/{} K {} V {}", s.T, s.Hq, s.Hk, s.Hv, s.K, s.V));
    const Case c(s, at::kFloat);
    const at::NoGradGuard no_grad;
    const auto p = kimi::check_arguments("test", c.q, c.k, c.v, c.g, c.beta, {}, c.cu, c.spans, {}, 1e-6);
    const auto strided = [](const at::Tensor& x) { return at::cat({x, x}, 2).slice(2, x.size(2)); };
    const kimi::Inputs plain{c.q, c.k, c.v, c.g, c.beta, c.state};
    const kimi::Inputs views{strided(c.q), strided(c.k), strided(c.v), strided(c.g), strided(c.beta), c.state};
    const kimi::Outputs x = kimi::kernel_forward(p, views, true), y = kimi::chunked_forward(p, plain, true);
    EXPECT_LT(test::fixture_error(x.chunk_states.transpose(2, 3), y.chunk_states), 5e-6);
    const kimi::Gradients dx = kimi::kernel_backward(p, views, x, c.up_o, c.up_state);
    const kimi::Gradients dy = kimi::chunked_backward(p, plain, y, c.up_o, c.up_state);
    expect_near({x.o, x.final_state, dx.q, dx.k, dx.v, dx.g, dx.beta, dx.state}, {y.o, y.final_state, dy.q, dy.k, dy.v, dy.g, dy.beta, dy.state}, 5e-6,
                1e-5);
    const kimi::Outputs again = kimi::kernel_forward(p, plain, false);
    EXPECT_TRUE(at::equal(again.o, x.o) && at::equal(again.final_state, x.final_state)) << "not the same bits";
  }
}

TEST(Kda, EveryInstructionSet) {
  const OneThread one_thread;
  for (const int64_t target : gated_delta::instruction_sets()) {
    gated_delta::choose_instruction_set(target);
    for (const auto& s : {Shape{1, 150, 1, 1, 2, 17, 16, {0, 70, 150}, {0, 3, 10, 0, 60, 80, 0, 149, 150}}, Shape{2, 65, 1, 1, 3, 5, 7},
                          Shape{1, 130, 4, 2, 1, 24, 9}}) {
      SCOPED_TRACE(fmt::format("target {} T {} K {} V {}", target, s.T, s.K, s.V));
      const Case c(s, at::kFloat);
      expect_near(run(c, kda), run(c.exact(), kda), 5e-6, 1e-5, /*typed=*/false);
    }
  }
  gated_delta::choose_instruction_set(0);
}

TEST(Kda, ThreadsDoNotChangeABit) {
  const Case c({2, 200, 3, 3, 3, 32, 48}, at::kFloat);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = run(c, kda);
  at::set_num_threads(3);
  const auto three = run(c, kda);
  at::set_num_threads(threads);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(at::equal(one[i], three[i])) << kNames[i];
}

// One decay for all channels is the gated delta rule, whose gradient of g is the sum over the channels.
TEST(Kda, EqualChannelsAreTheGatedDeltaRule) {
  const OneThread one_thread;
  for (const auto& s : shapes()) {
    SCOPED_TRACE(fmt::format("T {} heads {}/{}/{} K {} V {}", s.T, s.Hq, s.Hk, s.Hv, s.K, s.V));
    Case c(s, at::kDouble);
    c.g = c.g.detach().select(-1, 0).contiguous().set_requires_grad(true);
    const auto x = run(c, [&](auto& q, auto& k, auto& v, auto& g, auto& b, auto S, auto cu, auto spans, auto scale, double eps) {
      return kda(q, k, v, g.unsqueeze(-1).expand({-1, -1, -1, s.K}), b, S, cu, spans, scale, eps);
    });
    expect_near(x, run(c, gated_delta_rule), 1e-11, 1e-10);
  }
}

// Log decays of hundreds a token, where exp of a difference of running sums would be infinite or have lost its digits; and of minus infinity.
TEST(Kda, StrongDecays) {
  const OneThread one_thread;
  for (const double decay : {3.0, 300.0, 1e4}) {
    Case c({1, 200, 2, 2, 2, 16, 16, {}, {}, true, decay}, at::kFloat);
    c.g.detach().select(3, 3).fill_(0);        // a channel that forgets nothing among those that forget all
    c.g.detach().slice(1, 70, 90).fill_(-200);  // and a stretch in which all do
    const auto x = run(c, kda), ref = run(c.exact(), kda_naive);
    for (const auto& y : x) EXPECT_TRUE(y.isfinite().all().item<bool>());
    expect_near(x, ref, 5e-6, 1e-5, /*typed=*/false);
  }
  Case c({1, 100, 1, 1, 1, 8, 8}, at::kFloat);
  c.g.detach().slice(1, 40, 42).fill_(-INFINITY);
  const at::NoGradGuard no_grad;
  const auto x = kda(c.q, c.k, c.v, c.g, c.beta, c.state), ref = kda_naive(c.q, c.k, c.v, c.g, c.beta, c.state);
  EXPECT_LT(test::fixture_error(x.o, ref.o), 5e-6);
  EXPECT_LT(test::fixture_error(x.final_state, ref.final_state), 5e-6);
}

// The derivative along random directions, by central differences in float64.
TEST(Kda, GradientIsTheDerivative) {
  const OneThread one_thread;
  for (const bool naive : {false, true}) {
    const auto op = naive ? kda_naive : kda;
    const Case c({1, 70, 2, 1, 1, 4, 3, {0, 5, 70}, {0, 2, 68}, true, 0.1}, at::kDouble);
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

// Token by token through the state = at once, with every instruction set.
TEST(Kda, StepEqualsParallel) {
  for (const int64_t target : gated_delta::instruction_sets()) {
    gated_delta::choose_instruction_set(target);
    for (const auto dtype : {at::kFloat, at::kDouble}) {
      for (const auto& s : {Shape{3, 70, 2, 2, 2, 16, 16}, Shape{1, 20, 4, 1, 2, 5, 7}, Shape{2, 9, 1, 2, 4, 64, 33}}) {
        SCOPED_TRACE(fmt::format("target {} K {} V {}", target, s.K, s.V));
        const Case c(s, dtype);
        const at::NoGradGuard no_grad;
        const auto whole = kda(c.q, c.k, c.v, c.g, c.beta, c.state);
        at::Tensor state = c.state.clone();
        const void* where = state.data_ptr();
        std::vector<at::Tensor> o;
        for (int64_t t = 0; t < s.T; ++t) {
          const auto at_t = [t](const at::Tensor& x) { return x.select(1, t); };
          o.push_back(kda_step(at_t(c.q), at_t(c.k), at_t(c.v), at_t(c.g), at_t(c.beta), state));
        }
        EXPECT_EQ(state.data_ptr(), where);
        const double limit = dtype == at::kFloat ? 5e-6 : 1e-12;
        EXPECT_LT(test::fixture_error(at::stack(o, 1), whole.o), limit);
        EXPECT_LT(test::fixture_error(state, whole.final_state), limit);
      }
    }
  }
  gated_delta::choose_instruction_set(0);
}

TEST(Kda, StepUpdatesAViewInPlace) {
  const Case c({2, 1, 2, 2, 2, 16, 8}, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto one = [](const at::Tensor& x) { return x.select(1, 0); };
  at::Tensor plain = c.state.clone(), slot = at::zeros({2, 3, 2, 8, 16}, at::kFloat);
  slot.select(1, 1).copy_(plain);
  at::Tensor view = slot.select(1, 1), turned = plain.transpose(2, 3).contiguous().transpose(2, 3);
  const auto a = kda_step(one(c.q), one(c.k), one(c.v), one(c.g), one(c.beta), plain);
  const auto b = kda_step(one(c.q), one(c.k), one(c.v), one(c.g), one(c.beta), view);
  const auto d = kda_step(one(c.q), one(c.k), one(c.v), one(c.g), one(c.beta), turned);  // not dense: by plain tensor operations
  EXPECT_TRUE(at::equal(a, b));
  EXPECT_TRUE(at::equal(view, plain));
  EXPECT_LT(test::fixture_error(d, a), 1e-6);
  EXPECT_LT(test::fixture_error(turned, plain), 1e-6);
  EXPECT_EQ(slot.select(1, 0).abs().sum().item<float>() + slot.select(1, 2).abs().sum().item<float>(), 0);
}

TEST(Kda, TwoCallsThroughTheStateEqualOne) {
  const OneThread one_thread;
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    for (const int64_t cut : {1, 63, 64, 99}) {
      const Case c({2, 100, 2, 1, 2, 16, 16}, dtype);
      const auto whole = run(c, kda);
      const auto split = run(c, [&](auto& q, auto& k, auto& v, auto& g, auto& b, auto S, auto, auto, auto, double) {
        const auto head = [&](const at::Tensor& x) { return x.slice(1, 0, cut); };
        const auto tail = [&](const at::Tensor& x) { return x.slice(1, cut); };
        const auto one = kda(head(q), head(k), head(v), head(g), head(b), S);
        const auto two = kda(tail(q), tail(k), tail(v), tail(g), tail(b), one.final_state);
        return KdaResult{at::cat({one.o, two.o}, 1), two.final_state};
      });
      const bool single = dtype == at::kFloat;
      expect_near(split, whole, single ? 5e-6 : 1e-12, single ? 1e-5 : 1e-11);
    }
  }
}

TEST(Kda, PackedEqualsSeparate) {
  const std::vector<int32_t> cu = {0, 64, 65, 65, 130};
  const Case c({1, 130, 2, 2, 2, 16, 16, cu}, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto packed = kda(c.q, c.k, c.v, c.g, c.beta, c.state, c.cu);
  for (size_t n = 0; n + 1 < cu.size(); ++n) {
    const auto part = [&](const at::Tensor& x) { return x.slice(1, cu[n], cu[n + 1]); };
    const auto i = static_cast<int64_t>(n);
    const auto alone = kda(part(c.q), part(c.k), part(c.v), part(c.g), part(c.beta), c.state.slice(0, i, i + 1));
    EXPECT_LT(test::fixture_error(part(packed.o), alone.o), 1e-6);
    EXPECT_LT(test::fixture_error(packed.final_state.slice(0, i, i + 1), alone.final_state), 1e-6);
  }
}

TEST(Kda, SpansOnlyChooseTheReadout) {
  const Case c({2, 150, 2, 2, 2, 16, 16}, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto all = kda(c.q, c.k, c.v, c.g, c.beta, c.state);
  const auto some = kda(c.q, c.k, c.v, c.g, c.beta, c.state, {}, ints({0, 3, 20, 1, 60, 150}).view({2, 3}));
  at::Tensor mask = at::zeros({2, 150, 1, 1}, at::kFloat);
  mask[0].slice(0, 3, 20).fill_(1);
  mask[1].slice(0, 60, 150).fill_(1);
  EXPECT_TRUE(at::equal(some.final_state, all.final_state));
  EXPECT_TRUE(at::equal(some.o, all.o * mask));
  const auto none = kda(c.q, c.k, c.v, c.g, c.beta, c.state, {}, at::empty({0, 3}, at::kInt));
  EXPECT_EQ(none.o.abs().sum().item<float>(), 0);
  EXPECT_TRUE(at::equal(none.final_state, all.final_state));
}

TEST(Kda, BFloat16) {
  const Case c({2, 70, 2, 1, 2, 16, 16}, at::kBFloat16);
  const auto x = run(c, kda), ref = run(c, kda_naive);
  EXPECT_EQ(x[0].scalar_type(), at::kBFloat16);
  EXPECT_EQ(x[1].scalar_type(), at::kFloat);
  expect_near(x, ref, 1e-2, 1e-2);
}

TEST(Kda, NanIsNotHidden) {
  for (const int which : {0, 1, 2, 3, 4}) {
    const Case c({1, 70, 1, 1, 1, 16, 16}, at::kFloat);
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> x = {c.q.detach(), c.k.detach(), c.v.detach(), c.g.detach(), c.beta.detach()};
    x[which].select(1, 20).fill_(std::nanf(""));
    const auto r = kda(x[0], x[1], x[2], x[3], x[4]);
    EXPECT_TRUE(r.o.select(1, 20).isnan().any().item<bool>()) << which;
    EXPECT_EQ(r.final_state.isnan().any().item<bool>(), which > 0) << which;
  }
}

TEST(Kda, EmptySequences) {
  const Case c({2, 0, 2, 2, 2, 16, 16}, at::kFloat);
  const auto x = run(c, kda);
  EXPECT_EQ(x[0].sizes(), at::IntArrayRef({2, 0, 2, 16}));
  EXPECT_TRUE(at::equal(x[1], c.state));
  EXPECT_TRUE(at::equal(x[7], c.up_state));
}

TEST(Kda, BadInputIsRefusedInOneLine) {
  using ::testing::HasSubstr;
  const Case c({2, 10, 2, 2, 2, 16, 8}, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto message = [](auto f) -> std::string {
    try {
      f();
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const auto rule = [&](const at::Tensor& k, const at::Tensor& g, Optional state = {}, Optional spans = {}) {
    return message([&] { kda(c.q, k, c.v, g, c.beta, state, {}, spans); });
  };
  EXPECT_THAT(rule(c.k, c.g.select(3, 0)), HasSubstr("kda: g is [2, 10, 2], expected a log decay for each state head and key channel"));
  EXPECT_THAT(rule(c.k, c.g.slice(3, 0, 15)), HasSubstr("kda: g is [2, 10, 2, 15], expected"));
  EXPECT_THAT(rule(c.k.slice(3, 0, 15), c.g.slice(3, 0, 15)), HasSubstr("q has 16 key dimensions but k has 15"));
  EXPECT_THAT(rule(c.k, c.g.slice(2, 0, 1)), HasSubstr("expected 2 state heads"));
  EXPECT_THAT(rule(c.k, c.g.to(at::kDouble)), HasSubstr("expected Float with q of Float"));
  EXPECT_THAT(rule(c.k, c.g, c.state.transpose(2, 3)), HasSubstr("expected Float [2, 2, 8, 16]"));
  EXPECT_THAT(rule(c.k, c.g, {}, ints({0, 5, 11}).view({1, 3})), HasSubstr("span 0 is (row 0, 5 to 11)"));
  EXPECT_THAT(message([&] {
                at::Tensor state = at::zeros({2, 2, 8, 15}, at::kFloat);
                const auto t = [](const at::Tensor& x) { return x.select(1, 0); };
                kda_step(t(c.q), t(c.k), t(c.v), t(c.g), t(c.beta), state);
              }),
              HasSubstr("kda_step: the state is Float [2, 2, 8, 15]"));
}

}  // namespace
}  // namespace oryx::ops
