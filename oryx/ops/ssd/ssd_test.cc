#include "oryx/ops/ssd/ssd.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/ops/ssd/ssd_internal.h"
#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using test::fixture_error;
using test::norm_error;

const std::vector<std::string> kNames{"q", "k", "v", "dt_raw", "dt_bias", "A_log", "D", "state0"};

std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

struct Case {
  at::Tensor q, k, v, dt_raw, dt_bias, A_log, D, state, cu, spans;

  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> out{q, k, v, dt_raw, dt_bias, A_log, D};
    if (state.defined()) out.push_back(state);
    return out;
  }
  SsdResult run(bool naive = false) const {
    return (naive ? ssd_naive : ssd)(q, k, v, dt_raw, dt_bias, A_log, D, optional(state), optional(cu),
                                     optional(spans));
  }
  // The tokens begin .. end of every row, from the given state.
  SsdResult part(int64_t begin, int64_t end, const at::Tensor& from) const {
    const auto cut = [&](const at::Tensor& t) { return t.slice(1, begin, end); };
    return ssd(cut(q), cut(k), cut(v), cut(dt_raw), dt_bias, A_log, D, optional(from));
  }
};

at::Tensor random(at::IntArrayRef size, at::ScalarType dtype, uint64_t seed, double scale = 1, double shift = 0) {
  auto gen = at::make_generator<at::CPUGeneratorImpl>(seed);
  return (at::randn(size, gen, at::TensorOptions().dtype(at::kDouble)) * scale + shift)
      .to(dtype)
      .set_requires_grad(true);
}

struct Shape {
  int64_t B, T, Hq, Hk, Hv, K, V;
};

Case make_case(const Shape& s, at::ScalarType dtype, bool with_state = true, const std::vector<int>& cu = {}) {
  const int64_t N = cu.empty() ? s.B : static_cast<int64_t>(cu.size()) - 1, Hs = std::max(s.Hk, s.Hv);
  Case c;
  c.q = random({s.B, s.T, s.Hq, s.K}, dtype, 1);
  c.k = random({s.B, s.T, s.Hk, s.K}, dtype, 2);
  c.v = random({s.B, s.T, s.Hv, s.V}, dtype, 3);
  c.dt_raw = random({s.B, s.T, Hs}, dtype, 4);
  c.dt_bias = random({Hs}, dtype, 5, 1, -2);
  c.A_log = random({Hs}, dtype, 6, 1, -0.5);
  c.D = random({Hs}, dtype, 7);
  if (with_state) c.state = random({N, Hs, s.V, s.K}, dtype, 8);
  if (!cu.empty()) c.cu = at::tensor(cu, at::kInt);
  return c;
}

// The naive form is thousands of tiny operations, which threads only slow down.
class OneThread {
 public:
  OneThread() { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before_); }

 private:
  int before_ = at::get_num_threads();
};

std::vector<at::Tensor> gradients(const SsdResult& r, const std::vector<at::Tensor>& leaves) {
  const at::Tensor up_o = random(r.o.sizes(), r.o.scalar_type(), 11).detach();
  const at::Tensor up_state = random(r.final_state.sizes(), r.final_state.scalar_type(), 12).detach();
  // Without a readout the naive form's o depends on nothing.
  if (!r.o.requires_grad())
    return torch::autograd::grad({r.final_state}, leaves, {up_state}, {}, false, /*allow_unused=*/true);
  return torch::autograd::grad({r.o, r.final_state}, leaves, {up_o, up_state}, {}, false, /*allow_unused=*/true);
}

void expect_equals_naive(const Case& c, double limit) {
  const OneThread one_thread;
  const SsdResult fast = c.run(), slow = c.run(true);
  EXPECT_LT(norm_error(fast.o, slow.o), limit);
  EXPECT_LT(norm_error(fast.final_state, slow.final_state), limit);
  const auto a = gradients(fast, c.leaves()), b = gradients(slow, c.leaves());
  for (size_t i = 0; i < a.size(); ++i) {
    const at::Tensor want = b[i].defined() ? b[i] : at::zeros_like(a[i]);
    EXPECT_LT(norm_error(a[i], want), limit) << "gradient of " << kNames[i];
  }
}

// Groupings: equal, one key group, one value head, more queries than states, all different.
const std::vector<Shape> kGroupings{{2, 70, 2, 2, 2, 8, 6},  {2, 70, 1, 1, 4, 5, 7}, {1, 70, 4, 4, 1, 8, 8},
                                    {1, 70, 6, 1, 1, 6, 9},  {1, 70, 8, 2, 4, 7, 5}, {1, 70, 1, 4, 2, 8, 8},
                                    {1, 70, 2, 1, 4, 16, 40}};

TEST(Ssd, Fixtures) {
  ORYX_REQUIRE_FIXTURES();
  for (const auto& f : test::fixtures("ops", "mamba2_ssd")) {
    SCOPED_TRACE(f.name);
    const bool extreme = f.name.find("extreme") != std::string::npos;
    const Case c{f.leaf("q"),     f.leaf("k"), f.leaf("v"),      f.leaf("dt_raw"),    f.leaf("dt_bias"),
                 f.leaf("A_log"), f.leaf("D"), f.leaf("state0"), f.get("cu_seqlens"), {}};
    const SsdResult r = c.run();
    EXPECT_LT(fixture_error(r.o, f.at("o")), f.limit("o", extreme ? 1e-4 : 5e-6));
    EXPECT_LT(fixture_error(r.final_state, f.at("final_state")), f.limit("final_state", extreme ? 1e-4 : 5e-6));
    const auto grads = torch::autograd::grad({r.o, r.final_state}, c.leaves(), {f.at("up_o"), f.at("up_final_state")});
    for (size_t i = 0; i < grads.size(); ++i) {
      const double limit = extreme ? 2e-4 : kNames[i] == "A_log" ? 5e-5 : 1e-5;
      EXPECT_LT(fixture_error(grads[i], f.at("d_" + kNames[i])), f.limit("d_" + kNames[i], limit)) << kNames[i];
    }
  }
}

TEST(Ssd, FixturesNaiveInFloat64) {
  ORYX_REQUIRE_FIXTURES();
  for (const auto& f : test::fixtures("ops", "mamba2_ssd")) {
    SCOPED_TRACE(f.name);
    const auto wide = [&](const std::string& n) { return f.has(n) ? f.at(n).to(at::kDouble) : at::Tensor(); };
    const Case c{wide("q"),     wide("k"), wide("v"),      wide("dt_raw"),      wide("dt_bias"),
                 wide("A_log"), wide("D"), wide("state0"), f.get("cu_seqlens"), {}};
    const SsdResult r = c.run(true);
    EXPECT_LT(fixture_error(r.o, f.at("o")), 1e-7);
    EXPECT_LT(fixture_error(r.final_state, f.at("final_state")), 1e-7);
  }
}

TEST(Ssd, EqualsNaiveInFloat64) {
  for (const Shape& s : kGroupings) {
    SCOPED_TRACE(::testing::Message() << s.Hq << " " << s.Hk << " " << s.Hv);
    expect_equals_naive(make_case(s, at::kDouble), 1e-11);
  }
  for (int64_t T : {1, 63, 130}) expect_equals_naive(make_case({2, T, 1, 1, 3, 4, 6}, at::kDouble, T != 63), 1e-11);
}

TEST(Ssd, EqualsNaiveInFloat32) {
  for (const Shape& s : kGroupings) {
    SCOPED_TRACE(::testing::Message() << s.Hq << " " << s.Hk << " " << s.Hv);
    expect_equals_naive(make_case(s, at::kFloat), 4e-6);
  }
  for (int64_t T : {1, 63, 130}) expect_equals_naive(make_case({2, T, 1, 1, 3, 20, 33}, at::kFloat, T != 63), 4e-6);
}

TEST(Ssd, LongSequence) {
  const Case c = make_case({1, 1000, 1, 1, 2, 16, 16}, at::kFloat, false);
  const SsdResult fast = c.run(), slow = c.run(true);
  EXPECT_LT(norm_error(fast.o, slow.o), 4e-6);
  EXPECT_LT(norm_error(fast.final_state, slow.final_state), 4e-6);
}

TEST(Ssd, PackedEqualsNaiveAndSeparate) {
  const std::vector<int> cu{0, 0, 1, 1, 3, 133, 136, 200, 200};
  expect_equals_naive(make_case({1, 200, 1, 1, 2, 5, 6}, at::kDouble, true, cu), 1e-11);
  const Case c = make_case({1, 200, 4, 2, 2, 12, 20}, at::kFloat, true, cu);
  const SsdResult whole = c.run();
  for (size_t n = 0; n + 1 < cu.size(); ++n) {
    const auto i = static_cast<int64_t>(n);
    const SsdResult one = c.part(cu[n], cu[n + 1], c.state.slice(0, i, i + 1));
    EXPECT_TRUE(at::equal(one.o, whole.o.slice(1, cu[n], cu[n + 1])));
    EXPECT_TRUE(at::equal(one.final_state, whole.final_state.slice(0, i, i + 1)));
  }
}

TEST(Ssd, SplitEqualsWhole) {
  const OneThread one_thread;
  for (auto dtype : {at::kFloat, at::kDouble}) {
    const Case c = make_case({2, 200, 1, 1, 3, 12, 20}, dtype);
    const SsdResult whole = c.run();
    at::Tensor state = c.state;
    std::vector<at::Tensor> parts;
    const std::vector<int64_t> cuts{0, 1, 64, 100, 193, 200};
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      const SsdResult r = c.part(cuts[i], cuts[i + 1], state);
      parts.push_back(r.o);
      state = r.final_state;
    }
    EXPECT_LT(norm_error(at::cat(parts, 1), whole.o), dtype == at::kFloat ? 2e-6 : 1e-13);
    EXPECT_LT(norm_error(state, whole.final_state), dtype == at::kFloat ? 2e-6 : 1e-13);
  }
}

TEST(Ssd, StepEqualsParallel) {
  const OneThread one_thread;
  for (const Shape& base : kGroupings) {
    for (auto dtype : {at::kFloat, at::kDouble}) {
      Shape s = base;
      s.T = 9;
      const Case c = make_case(s, dtype);
      const SsdResult whole = c.run();
      const at::Tensor state = c.state.detach().clone();
      const double limit = dtype == at::kFloat ? 2e-6 : 1e-13;
      for (int64_t t = 0; t < s.T; ++t) {
        const auto at = [&](const at::Tensor& x) { return x.detach().select(1, t); };
        const at::Tensor o = ssd_step(at(c.q), at(c.k), at(c.v), at(c.dt_raw), c.dt_bias, c.A_log, c.D, state);
        EXPECT_LT(norm_error(o, whole.o.select(1, t)), limit);
      }
      EXPECT_LT(norm_error(state, whole.final_state), limit);
    }
  }
}

TEST(Ssd, StepUpdatesAStridedState) {
  const Case c = make_case({3, 1, 2, 2, 2, 8, 6}, at::kFloat);
  const at::Tensor big = at::zeros({3, 2, 6, 20}), strided = big.slice(3, 4, 12), plain = c.state.detach().clone();
  strided.copy_(c.state.detach());
  for (const at::Tensor& state : {strided, plain}) {
    ssd_step(c.q.select(1, 0), c.k.select(1, 0), c.v.select(1, 0), c.dt_raw.select(1, 0), c.dt_bias, c.A_log, c.D,
             state);
  }
  EXPECT_TRUE(at::equal(strided, plain));
  EXPECT_FALSE(at::equal(plain, c.state));
  EXPECT_EQ(big.slice(3, 0, 4).abs().max().item<float>() + big.slice(3, 12).abs().max().item<float>(), 0);
}

TEST(Ssd, SpansChooseTheReadout) {
  const OneThread one_thread;
  for (auto dtype : {at::kFloat, at::kDouble}) {
    const double limit = dtype == at::kFloat ? 4e-6 : 1e-11;
    Case c = make_case({2, 200, 1, 1, 2, 5, 6}, dtype);
    const SsdResult all = c.run();
    c.spans = at::tensor({0, 0, 3, 0, 70, 75, 0, 199, 200, 1, 60, 140, 1, 150, 150}, at::kInt).view({-1, 3});
    expect_equals_naive(c, limit);
    const SsdResult some = c.run();
    at::Tensor mask = at::zeros({2, 200, 1, 1}, all.o.options());
    for (int64_t i = 0; i < c.spans.size(0); ++i) {
      mask[c.spans[i][0].item<int64_t>()]
          .slice(0, c.spans[i][1].item<int64_t>(), c.spans[i][2].item<int64_t>())
          .fill_(1);
    }
    EXPECT_LT(norm_error(some.o, all.o * mask), limit);
    EXPECT_EQ((some.o * (1 - mask)).abs().max().item<double>(), 0);
    EXPECT_TRUE(at::equal(some.final_state, all.final_state));
    c.spans = at::zeros({0, 3}, at::kInt);
    const SsdResult none = c.run();
    EXPECT_EQ(none.o.abs().max().item<double>(), 0);
    EXPECT_TRUE(at::equal(none.final_state, all.final_state));
    const auto grads = gradients(none, c.leaves()), want = gradients(c.run(true), c.leaves());
    EXPECT_EQ(grads[0].abs().max().item<double>(), 0);  // nobody reads q
    for (size_t i : {1, 2, 3, 4, 5, 7}) EXPECT_LT(norm_error(grads[i], want[i]), limit) << kNames[i];
  }
}

TEST(Ssd, SpansInPackedRows) {
  Case c = make_case({1, 200, 1, 2, 2, 5, 6}, at::kFloat, false, {0, 90, 91, 200});
  c.spans = at::tensor({0, 85, 95, 0, 120, 180}, at::kInt).view({-1, 3});
  expect_equals_naive(c, 4e-6);
}

// Decays from none to total within one chunk, huge and tiny dt: digits must survive (see the segment sums), nothing may
// overflow.
TEST(Ssd, ExtremeDecaysKeepTheirDigits) {
  Case c = make_case({1, 150, 1, 1, 3, 8, 8}, at::kFloat);
  const auto leaf = [](const at::Tensor& t) { return t.detach().clone().set_requires_grad(true); };
  at::Tensor x = c.dt_raw.detach() * 3 - 3;
  x.slice(1, 20, 140, 17) += 40;  // nearly everything is forgotten
  x.slice(1, 70, 80) -= 100;      // nothing happens
  x.slice(1, 100, 101) += 1000;
  c.dt_raw = leaf(x);
  c.A_log = leaf(at::tensor({-4.f, 0.f, 4.f}));
  Case wide = c;
  for (at::Tensor* t : {&wide.q, &wide.k, &wide.v, &wide.dt_raw, &wide.dt_bias, &wide.A_log, &wide.D, &wide.state}) {
    *t = leaf(t->to(at::kDouble));
  }
  const SsdResult fast = c.run(), exact = wide.run(true);
  EXPECT_LT(norm_error(fast.o, exact.o), 4e-6);
  EXPECT_LT(norm_error(fast.final_state, exact.final_state), 4e-6);
  const auto a = gradients(fast, c.leaves()), b = gradients(exact, wide.leaves());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_LT(norm_error(a[i], b[i]), 1e-5) << kNames[i];
}

TEST(Ssd, SoftplusHasNoCutOff) {
  Case c = make_case({1, 3, 1, 1, 1, 1, 1}, at::kDouble, false);
  c.dt_raw = at::tensor({-30., 21., 25.}, at::kDouble).view({1, 3, 1});
  c.dt_bias = at::zeros({1}, at::kDouble);
  c.A_log = at::full({1}, -700., at::kDouble);  // no decay
  const at::Tensor S = c.run().final_state;
  const at::Tensor want =
      (at::log1p(at::exp(c.dt_raw)) * c.k.detach().view({1, 3, 1}) * c.v.detach().view({1, 3, 1})).sum();
  EXPECT_NEAR(S.item<double>() / want.item<double>(), 1, 1e-14);
}

TEST(Ssd, TakesStridedInputs) {
  const Case c = make_case({2, 70, 2, 2, 2, 8, 6}, at::kFloat);
  const at::Tensor both = at::cat({c.q, c.k, c.v}, 3).detach();  // views into one projection
  const at::Tensor turned = c.dt_raw.detach().transpose(1, 2).contiguous().transpose(1, 2);
  const SsdResult r =
      ssd(both.slice(3, 0, 8), both.slice(3, 8, 16), both.slice(3, 16), turned, c.dt_bias, c.A_log, c.D, c.state);
  EXPECT_TRUE(at::equal(r.o, c.run().o));
}

TEST(Ssd, Bfloat16NearFloat32) {
  const OneThread one_thread;
  Case c = make_case({2, 100, 1, 1, 3, 16, 16}, at::kFloat);
  const Case wide = c;
  for (at::Tensor* t : {&c.q, &c.k, &c.v}) *t = t->detach().to(at::kBFloat16).set_requires_grad(true);
  const SsdResult r = c.run(), ref = wide.run(true);
  EXPECT_EQ(r.o.scalar_type(), at::kBFloat16);
  EXPECT_EQ(r.final_state.scalar_type(), at::kFloat);
  EXPECT_LT(norm_error(r.o, ref.o), 6e-3);
  const auto a = gradients(r, c.leaves()), b = gradients(ref, wide.leaves());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].scalar_type(), i < 3 ? at::kBFloat16 : at::kFloat);
    EXPECT_LT(norm_error(a[i], b[i]), 2e-2) << kNames[i];
  }
}

TEST(Ssd, SameBitsOnAnyThreadCount) {
  const Case c = make_case({3, 150, 1, 1, 4, 16, 24}, at::kFloat);
  const int before = at::get_num_threads();
  std::vector<std::vector<at::Tensor>> runs;
  for (int threads : {1, 2, 5, 1}) {
    at::set_num_threads(threads);
    const SsdResult r = c.run();
    runs.push_back(gradients(r, c.leaves()));
    runs.back().push_back(r.o);
    runs.back().push_back(r.final_state);
  }
  at::set_num_threads(before);
  for (size_t run = 1; run < runs.size(); ++run) {
    for (size_t i = 0; i < runs[0].size(); ++i) EXPECT_TRUE(at::equal(runs[0][i], runs[run][i])) << run << " " << i;
  }
}

TEST(Ssd, EmptyShapes) {
  for (auto [B, T] : {std::pair<int64_t, int64_t>{0, 5}, {2, 0}}) {
    const Case c = make_case({B, T, 2, 2, 2, 4, 4}, at::kFloat);
    const SsdResult r = c.run();
    EXPECT_EQ(r.o.sizes(), at::IntArrayRef({B, T, 2, 4}));
    EXPECT_TRUE(at::equal(r.final_state, c.state));
    EXPECT_EQ(gradients(r, c.leaves())[7].sizes(), c.state.sizes());
  }
}

TEST(Ssd, RefusesBadInput) {
  const Case good = make_case({2, 5, 2, 2, 4, 8, 6}, at::kFloat);
  EXPECT_NO_THROW(good.run());
  const auto refused = [&](auto change) {
    Case c = good;
    change(c);
    EXPECT_THROW(c.run(), c10::Error);
    EXPECT_THROW(c.run(true), c10::Error);
  };
  refused([](Case& c) { c.q = c.q[0]; });
  refused([](Case& c) { c.q = c.q.slice(3, 0, 7); });
  refused([](Case& c) { c.k = c.k.slice(1, 0, 4); });
  refused([](Case& c) { c.v = c.v.slice(2, 0, 3); });  // 2 key heads do not divide 3 state heads
  refused([](Case& c) { c.q = at::zeros({2, 5, 3, 8}); });
  refused([](Case& c) { c.dt_raw = c.dt_raw.slice(2, 0, 2); });
  refused([](Case& c) { c.D = at::zeros({2}); });
  refused([](Case& c) { c.state = at::zeros({2, 4, 8, 6}); });
  refused([](Case& c) { c.q = c.q.to(at::kDouble); });
  refused([](Case& c) { c.q = c.q.to(at::kInt), c.k = c.k.to(at::kInt), c.v = c.v.to(at::kInt); });
  refused([](Case& c) { c.cu = at::tensor({0, 5}, at::kInt); });
  refused([](Case& c) { c.spans = at::tensor({0, 3, 6}, at::kInt).view({1, 3}); });
  refused([](Case& c) { c.spans = at::tensor({2, 0, 1}, at::kInt).view({1, 3}); });
  refused([](Case& c) { c.spans = at::tensor({0, 4, 3}, at::kInt).view({1, 3}); });
  refused([](Case& c) { c.spans = at::tensor({0, 1}, at::kInt); });
  EXPECT_THROW(ssd_step(good.q, good.k, good.v, good.dt_raw, good.dt_bias, good.A_log, good.D, good.state), c10::Error);
}

}  // namespace
}  // namespace oryx::ops
