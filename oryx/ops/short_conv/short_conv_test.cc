#include "oryx/ops/short_conv/short_conv.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using test::fixture_error;
using test::norm_error;

std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

struct Case {
  at::Tensor x, weight, bias, state, cu;
  Activation act = Activation::kNone;
  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> out;
    for (const auto& t : {x, weight, bias, state}) {
      if (t.defined()) out.push_back(t);
    }
    return out;
  }
  ShortConvResult run(bool naive = false) const {
    return (naive ? short_conv_naive : short_conv)(x, weight, optional(bias), optional(state), optional(cu), act);
  }
};

at::Tensor leaf(at::IntArrayRef size, at::ScalarType dtype, uint64_t seed) {
  auto gen = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(size, gen, at::TensorOptions().dtype(at::kDouble)).to(dtype).set_requires_grad(true);
}

Case make_case(int64_t B, int64_t T, int64_t C, int64_t w, bool with_state, Activation act, at::ScalarType dtype,
               std::vector<int> cu = {}) {
  Case c;
  const int64_t N = cu.empty() ? B : static_cast<int64_t>(cu.size()) - 1;
  c.x = leaf({B, T, C}, dtype, 1);
  c.weight = leaf({C, w}, dtype, 2);
  if (with_state) c.bias = leaf({C}, dtype, 3), c.state = leaf({N, C, w - 1}, dtype, 4);
  if (!cu.empty()) c.cu = at::tensor(cu, at::kInt);
  c.act = act;
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

std::vector<at::Tensor> gradients(const ShortConvResult& r, const std::vector<at::Tensor>& leaves) {
  const at::Tensor up_y = leaf(r.y.sizes(), r.y.scalar_type(), 8).detach();
  const at::Tensor up_state = leaf(r.final_state.sizes(), r.y.scalar_type(), 9).detach();
  return torch::autograd::grad({r.y, r.final_state}, leaves, {up_y, up_state}, {}, false, /*allow_unused=*/true);
}

void expect_equals_naive(const Case& c, double limit) {
  const OneThread one_thread;
  const ShortConvResult fast = c.run(), slow = c.run(true);
  EXPECT_LT(norm_error(fast.y, slow.y), limit);
  if (slow.final_state.numel() > 0) {
    EXPECT_LT(norm_error(fast.final_state, slow.final_state), limit);
  }
  const auto a = gradients(fast, c.leaves()), b = gradients(slow, c.leaves());
  for (size_t i = 0; i < a.size(); ++i) {
    if (!b[i].defined() || b[i].numel() == 0) continue;
    EXPECT_LT(norm_error(a[i], b[i]), limit) << "gradient " << i;
  }
}

TEST(ShortConv, Fixtures) {
  ORYX_REQUIRE_FIXTURES();
  for (const auto& f : test::fixtures("ops", "short_conv")) {
    SCOPED_TRACE(f.name);
    Case c{f.leaf("x"), f.leaf("weight"), f.leaf("bias"), f.leaf("state0"), f.get("cu_seqlens")};
    c.act = f.attrs.at("activation").is_null() ? Activation::kNone : Activation::kSilu;
    for (bool naive : {false, true}) {
      const ShortConvResult r = c.run(naive);
      EXPECT_LT(fixture_error(r.y, f.at("y")), 4e-6);
      EXPECT_LT(fixture_error(r.final_state, f.at("final_state")), 4e-6);
      const auto grads =
          torch::autograd::grad({r.y, r.final_state}, c.leaves(), {f.at("up_y"), f.at("up_final_state")});
      size_t i = 0;
      for (const char* name : {"x", "weight", "bias", "state0"}) {
        if (!f.has(name)) continue;
        EXPECT_LT(fixture_error(grads[i++], f.at(std::string("d_") + name)), 1e-5) << name;
      }
    }
  }
}

TEST(ShortConv, EqualsNaiveInFloat64) {
  for (int64_t T : {1, 2, 3, 63, 300}) {
    for (int64_t C : {1, 19}) {
      for (auto act : {Activation::kNone, Activation::kSilu}) {
        SCOPED_TRACE(::testing::Message() << "T " << T << " C " << C);
        expect_equals_naive(make_case(2, T, C, 4, T != 63, act, at::kDouble), 1e-12);
      }
    }
  }
}

TEST(ShortConv, EqualsNaiveAtOtherWidths) {
  for (int64_t w : {1, 2, 3, 7}) {
    for (int64_t T : {1, 4, 150})
      expect_equals_naive(make_case(2, T, 18, w, true, Activation::kSilu, at::kDouble), 1e-12);
  }
}

TEST(ShortConv, EqualsNaiveInFloat32OnManyChannels) {
  for (int64_t C : {100, 1100}) expect_equals_naive(make_case(2, 37, C, 4, true, Activation::kSilu, at::kFloat), 2e-6);
}

TEST(ShortConv, PackedEqualsNaive) {
  // Lengths 1, 0, 2, 130, 3, 64, with empty documents at both ends.
  const std::vector<int> cu{0, 0, 1, 1, 3, 133, 136, 200, 200};
  expect_equals_naive(make_case(1, 200, 9, 4, true, Activation::kSilu, at::kDouble, cu), 1e-12);
  expect_equals_naive(make_case(1, 200, 9, 4, false, Activation::kNone, at::kDouble, cu), 1e-12);
}

TEST(ShortConv, PackedEqualsSeparateBitForBit) {
  const std::vector<int> cu{0, 1, 3, 133, 136, 200};
  const Case whole = make_case(1, 200, 33, 4, true, Activation::kSilu, at::kFloat, cu);
  const ShortConvResult r = whole.run();
  for (size_t n = 0; n + 1 < cu.size(); ++n) {
    const auto i = static_cast<int64_t>(n);
    const ShortConvResult one = short_conv(whole.x.slice(1, cu[n], cu[n + 1]), whole.weight, whole.bias,
                                           whole.state.slice(0, i, i + 1), {}, whole.act);
    EXPECT_TRUE(at::equal(one.y, r.y.slice(1, cu[n], cu[n + 1])));
    EXPECT_TRUE(at::equal(one.final_state, r.final_state.slice(0, i, i + 1)));
  }
}

TEST(ShortConv, SplitEqualsWholeBitForBit) {
  const Case c = make_case(2, 100, 33, 4, true, Activation::kSilu, at::kFloat);
  const ShortConvResult whole = c.run();
  at::Tensor state = c.state;
  std::vector<at::Tensor> parts;
  const std::vector<int64_t> cuts{0, 1, 3, 50, 52, 100};
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const ShortConvResult r = short_conv(c.x.slice(1, cuts[i], cuts[i + 1]), c.weight, c.bias, state, {}, c.act);
    parts.push_back(r.y);
    state = r.final_state;
  }
  EXPECT_TRUE(at::equal(at::cat(parts, 1), whole.y));
  EXPECT_TRUE(at::equal(state, whole.final_state));
}

TEST(ShortConv, StepEqualsParallel) {
  for (int64_t w : {1, 3, 4}) {
    for (auto dtype : {at::kFloat, at::kDouble}) {
      const Case c = make_case(3, 9, 37, w, true, Activation::kSilu, dtype);
      const ShortConvResult whole = c.run();
      const at::Tensor state = c.state.detach().clone();
      for (int64_t t = 0; t < 9; ++t) {
        const at::Tensor y = short_conv_step(c.x.detach().select(1, t), c.weight, c.bias, state, c.act);
        EXPECT_LT(norm_error(y, whole.y.select(1, t)), dtype == at::kFloat ? 1e-6 : 1e-14);
      }
      EXPECT_TRUE(at::equal(state, whole.final_state));
    }
  }
}

TEST(ShortConv, StepUpdatesStridedAndBfloat16States) {
  const Case c = make_case(3, 1, 37, 4, true, Activation::kNone, at::kFloat);
  const at::Tensor big = at::zeros({3, 37, 6});
  const at::Tensor strided = big.slice(2, 0, 3), narrow = c.state.detach().to(at::kBFloat16);
  strided.copy_(c.state.detach());
  short_conv_step(c.x.detach().select(1, 0), c.weight, {}, strided, c.act);
  EXPECT_TRUE(at::equal(strided.select(2, 2), c.x.select(1, 0)));
  EXPECT_EQ(big.slice(2, 3).abs().max().item<float>(), 0);
  short_conv_step(c.x.detach().select(1, 0).to(at::kBFloat16), c.weight, {}, narrow, c.act);
  EXPECT_TRUE(at::equal(narrow.select(2, 2), c.x.select(1, 0).to(at::kBFloat16)));
}

TEST(ShortConv, TakesAStridedSliceWithoutCopyingItWrong) {
  const Case c = make_case(2, 40, 24, 4, false, Activation::kSilu, at::kFloat);
  const at::Tensor wide = leaf({2, 40, 80}, at::kFloat, 7).detach();
  const at::Tensor slice = wide.slice(2, 30, 54);
  EXPECT_TRUE(at::equal(short_conv(slice, c.weight).y, short_conv(slice.contiguous(), c.weight).y));
  const at::Tensor turned = wide.slice(2, 0, 24).transpose(1, 2).contiguous().transpose(1, 2);
  EXPECT_TRUE(at::equal(short_conv(turned, c.weight).y, short_conv(turned.contiguous(), c.weight).y));
}

TEST(ShortConv, Bfloat16NearFloat32) {
  const Case c = make_case(2, 70, 48, 4, false, Activation::kSilu, at::kFloat);
  const at::Tensor x = c.x.detach().to(at::kBFloat16).set_requires_grad(true);
  const ShortConvResult r = short_conv(x, c.weight, {}, {}, {}, c.act);
  const ShortConvResult ref = short_conv_naive(x.detach().to(at::kFloat), c.weight, {}, {}, {}, c.act);
  EXPECT_EQ(r.y.scalar_type(), at::kBFloat16);
  EXPECT_LT(norm_error(r.y, ref.y), 4e-3);
  const auto grads = torch::autograd::grad({r.y}, {x, c.weight}, {at::ones_like(r.y)});
  EXPECT_EQ(grads[0].scalar_type(), at::kBFloat16);
  EXPECT_EQ(grads[1].scalar_type(), at::kFloat);
}

TEST(ShortConv, SameBitsOnAnyThreadCount) {
  const Case c = make_case(3, 700, 65, 4, true, Activation::kSilu, at::kFloat);
  const int before = at::get_num_threads();
  std::vector<std::vector<at::Tensor>> runs;
  for (int threads : {1, 2, 5}) {
    at::set_num_threads(threads);
    const ShortConvResult r = c.run();
    runs.push_back(gradients(r, c.leaves()));
    runs.back().push_back(r.y);
  }
  at::set_num_threads(before);
  for (size_t i = 0; i < runs[0].size(); ++i) {
    EXPECT_TRUE(at::equal(runs[0][i], runs[1][i])) << i;
    EXPECT_TRUE(at::equal(runs[0][i], runs[2][i])) << i;
  }
}

TEST(ShortConv, LargeInputsStayFiniteAndNanIsKept) {
  const at::Tensor x =
      at::tensor({-1e30, -200., -50., 0., 50., 200., 1e30}, at::kFloat).view({7, 1, 1}).set_requires_grad(true);
  const at::Tensor one = at::ones({1, 1});
  const ShortConvResult r = short_conv(x, one, {}, {}, {}, Activation::kSilu);
  EXPECT_TRUE(r.y.isfinite().all().item<bool>());
  EXPECT_EQ(r.y[6].item<float>(), 1e30f);
  EXPECT_TRUE(torch::autograd::grad({r.y}, {x}, {at::ones_like(r.y)})[0].isfinite().all().item<bool>());
  EXPECT_TRUE(short_conv(at::full({1, 1, 40}, NAN), at::ones({40, 1}), {}, {}, {}, Activation::kSilu)
                  .y.isnan()
                  .all()
                  .item<bool>());
}

TEST(ShortConv, EmptyShapes) {
  for (auto [B, T] : {std::pair<int64_t, int64_t>{0, 5}, {2, 0}}) {
    const Case c = make_case(B, T, 6, 4, true, Activation::kSilu, at::kFloat);
    const ShortConvResult r = c.run();
    EXPECT_EQ(r.y.sizes(), at::IntArrayRef({B, T, 6}));
    EXPECT_TRUE(at::equal(r.final_state, c.state));
    EXPECT_TRUE(at::equal(gradients(r, c.leaves())[3], leaf({B, 6, 3}, at::kFloat, 9)));
  }
}

TEST(ShortConv, RefusesBadInput) {
  const at::Tensor x = at::zeros({2, 5, 6}), w = at::zeros({6, 4});
  EXPECT_THROW(short_conv(x[0], w), c10::Error);
  EXPECT_THROW(short_conv(x, at::zeros({5, 4})), c10::Error);
  EXPECT_THROW(short_conv(x, at::zeros({6, 0})), c10::Error);
  EXPECT_THROW(short_conv(x, at::zeros({6, 64})), c10::Error);
  EXPECT_THROW(short_conv(x, w, at::zeros({5})), c10::Error);
  EXPECT_THROW(short_conv(x, w, {}, at::zeros({2, 6, 4})), c10::Error);
  EXPECT_THROW(short_conv(x, w, {}, {}, at::tensor({0, 5}, at::kInt)), c10::Error);  // two rows
  EXPECT_THROW(short_conv(x.to(at::kInt), w), c10::Error);
  const at::Tensor row = at::zeros({1, 5, 6});
  EXPECT_THROW(short_conv(row, w, {}, {}, at::tensor({0, 4}, at::kInt)), c10::Error);
  EXPECT_THROW(short_conv(row, w, {}, {}, at::tensor({0, 4, 3, 5}, at::kInt)), c10::Error);
  EXPECT_THROW(short_conv(row, w, {}, {}, at::tensor({0.f, 5.f})), c10::Error);
  EXPECT_THROW(short_conv_step(row, w, {}, at::zeros({1, 6, 3}), Activation::kNone), c10::Error);
  EXPECT_THROW(short_conv_step(row[0], w, {}, at::zeros({4, 6, 3}), Activation::kNone), c10::Error);
}

}  // namespace
}  // namespace oryx::ops
