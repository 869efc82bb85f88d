// Every operator on a GPU against itself on the CPU in float64. Skipped, saying so, where this build or machine has no CUDA.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/common/error.h"
#include "oryx/ops/adamw/adamw.h"
#include "oryx/ops/cross_entropy/cross_entropy.h"
#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/norm/norm.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/short_conv/short_conv.h"
#include "oryx/ops/span_attention/span_attention.h"
#include "oryx/ops/ssd/ssd.h"
#include "oryx/ops/swiglu/swiglu.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;
using Function = std::function<Tensors(const Tensors&)>;

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
    at::manual_seed(1);
  }
};

at::Tensor random(at::IntArrayRef shape) { return at::randn(shape, at::kDouble); }

double relative_error(const at::Tensor& found, const at::Tensor& expected, double least = 1e-30) {
  const at::Tensor a = found.detach().to(at::kCPU, at::kDouble), b = expected.detach();
  return ((a - b).norm() / b.norm().clamp_min(least)).item<double>();  // NaN fails every comparison below
}

// Values and gradients of f on the GPU against float64 on the CPU, from copies of `inputs`: the first `half` in bfloat16, the others in float32.
void expect_same(const Function& f, const Tensors& inputs, double value_limit = 2e-5, double gradient_limit = 5e-5, size_t half = 0) {
  Tensors host, device;
  for (const at::Tensor& x : inputs) {
    const at::Tensor narrow = x.to(host.size() < half ? at::kBFloat16 : at::kFloat);
    host.push_back(narrow.to(at::kDouble).requires_grad_(true));
    device.push_back(narrow.to(at::kCUDA).requires_grad_(true));
  }
  const Tensors expected = f(host), found = f(device);
  ASSERT_EQ(expected.size(), found.size());
  Tensors up, up_device;
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(found[i].is_cuda());
    EXPECT_LE(relative_error(found[i], expected[i]), value_limit) << "output " << i;
    const at::Tensor d = at::randn_like(expected[i]).to(found[i].scalar_type());
    up.push_back(d.to(expected[i].scalar_type()));
    up_device.push_back(d.to(at::kCUDA));
  }
  torch::autograd::backward(expected, up);
  torch::autograd::backward(found, up_device);
  double largest = 0;  // a gradient that vanishes (of a query that sees one key) is measured against the others
  for (const at::Tensor& x : host) largest = std::max(largest, x.grad().defined() ? x.grad().norm().item<double>() : 0.0);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!host[i].grad().defined()) continue;
    EXPECT_LE(relative_error(device[i].grad(), host[i].grad(), 1e-4 * largest), gradient_limit) << "gradient of input " << i;
  }
}

at::Tensor ints(std::vector<int32_t> values, const at::Tensor& like) { return at::tensor(values, at::kInt).to(like.device()); }

TEST_F(Cuda, Swiglu) {
  for (const int64_t n : {1, 17, 768, 5440}) expect_same([](const Tensors& x) { return Tensors{swiglu(x[0], x[1])}; }, {random({5, n}), random({5, n})});
}

// Every form of the norms for rows x n, in float32 and with activations in bfloat16.
void expect_norms(int64_t rows, int64_t n) {
  const at::Tensor x = random({rows, n}), r = random({rows, n}), w = random({n});
  for (const bool narrow : {false, true}) {
    const double value = narrow ? 1e-2 : 2e-5, gradient = narrow ? 2e-2 : 5e-5;
    const size_t one = narrow ? 1 : 0, two = narrow ? 2 : 0;
    expect_same([](const Tensors& t) { return Tensors{rms_norm(t[0], t[1], 1e-6)}; }, {x, w}, value, gradient, one);
    expect_same([](const Tensors& t) { return Tensors{rms_norm(t[0], t[1], 1e-6, true)}; }, {x, w}, value, gradient, one);
    expect_same(
        [](const Tensors& t) {
          const auto [y, sum] = add_rms_norm(t[0], t[1], t[2], 1e-6);
          return Tensors{y, sum};
        },
        {x, r, w}, value, gradient, two);
    for (const bool first : {false, true}) {
      expect_same([&](const Tensors& t) { return Tensors{gated_rms_norm(t[0], t[1], t[2], 1e-6, first)}; }, {x, r, w}, value, gradient, two);
    }
  }
}
TEST_F(Cuda, Norms) {
  for (const int64_t n : {17, 64, 128, 256, 512, 768, 960, 1024, 1536, 2048, 8192, 9001}) expect_norms(7, n);
}
TEST_F(Cuda, NormsOfManyRows) {  // more than are resident at once
  for (const int64_t n : {256, 768, 1024}) expect_norms(n == 256 ? 4000 : 2000, n);
}

TEST_F(Cuda, ShortConv) {
  for (const int64_t width : {1, 3, 4, 8}) {
    for (const bool narrow : {false, true}) {
      expect_same(
          [](const Tensors& t) {
            const auto r = short_conv(t[0], t[2], t[3], t[1], {}, Activation::kSilu);
            return Tensors{r.y, r.final_state};
          },
          {random({2, 100, 24}), random({2, 24, width - 1}), random({24, width}), random({24})}, narrow ? 1e-2 : 2e-5, narrow ? 2e-2 : 5e-5,
          narrow ? 2 : 0);
    }
  }
}

TEST_F(Cuda, ShortConvPacked) {
  const auto check = [](const std::vector<int32_t>& bounds, bool narrow) {
    const int64_t sequences = static_cast<int64_t>(bounds.size()) - 1;
    expect_same(
        [&](const Tensors& t) {
          const auto r = short_conv(t[0], t[2], {}, t[1], ints(bounds, t[0]), Activation::kSilu);
          return Tensors{r.y, r.final_state};
        },
        {random({1, bounds.back(), 24}), random({sequences, 24, 3}), random({24, 4})}, narrow ? 1e-2 : 2e-5, narrow ? 2e-2 : 5e-5, narrow ? 2 : 0);
  };
  for (const bool narrow : {false, true}) {
    check({0, 2, 2, 4, 100}, narrow);
    check({0, 0, 21, 22, 23, 300, 311, 1000, 1000}, narrow);  // some begin and end inside the groups of tokens that a thread takes at once
  }
}

TEST_F(Cuda, Rope) {
  const at::Tensor positions = at::randint(0, 200000, {2, 63}, at::kInt);
  for (const int64_t rotated : {0, 6}) {
    expect_same([&](const Tensors& t) { return Tensors{rope(t[0], positions.to(t[0].device()), 10000, rotated)}; }, {random({2, 63, 3, 64})});
  }
  // In bfloat16, also with heads enough that a warp takes a token; as they lie in a wider tensor, too.
  for (const auto& [heads, width] : std::vector<std::pair<int64_t, int64_t>>{{3, 64}, {12, 64}, {13, 64}, {40, 64}, {6, 128}, {8, 128}, {16, 128}, {3, 256}}) {
    const int64_t H = heads;
    expect_same([&](const Tensors& t) { return Tensors{rope(t[0].narrow(2, 1, H), positions.to(t[0].device()), 10000, 0)}; },
                {random({2, 63, H + 2, width})}, 1e-2, 2e-2, 1);
  }
}

TEST_F(Cuda, GatedDelta) {
  expect_same(
      [](const Tensors& t) {
        const auto r = gated_delta_rule(t[0], t[1], t[2], t[3], t[4], {}, ints({0, 30, 100}, t[0]), ints({0, 20, 100}, t[0]).view({1, 3}));
        return Tensors{r.o, r.final_state};
      },
      {random({1, 100, 4, 16}), random({1, 100, 2, 16}), random({1, 100, 2, 32}), -random({1, 100, 2}).abs(), at::rand({1, 100, 2}, at::kDouble)},
      1e-4, 1e-3);
}

// The kernels' forms: bfloat16 q, k, v (the first three inputs), the rest float32.
void expect_same_bf16(const Function& f, const Tensors& inputs) {
  Tensors host, device;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor narrow = inputs[i].to(i < 3 ? at::kBFloat16 : at::kFloat);
    host.push_back(narrow.to(at::kDouble).requires_grad_(true));
    device.push_back(narrow.to(at::kCUDA).requires_grad_(true));
  }
  const Tensors expected = f(host), found = f(device), again = f(device);
  Tensors up, up_device;
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(at::equal(found[i], again[i])) << "output " << i << " differs from run to run";
    EXPECT_LE(relative_error(found[i], expected[i]), 1e-2) << "output " << i;
    up_device.push_back(at::randn_like(expected[i]).to(at::kCUDA, found[i].scalar_type()));
    up.push_back(up_device.back().to(at::kCPU, at::kDouble));
  }
  torch::autograd::backward(expected, up);
  const auto gradients = torch::autograd::grad(found, device, up_device), same = torch::autograd::grad(again, device, up_device);
  for (size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_TRUE(at::equal(gradients[i], same[i])) << "gradient of input " << i << " differs from run to run";
    EXPECT_LE(relative_error(gradients[i], host[i].grad()), 2e-2) << "gradient of input " << i;
  }
}

TEST_F(Cuda, GatedDeltaKernels) {
  for (const int64_t D : {64, 128}) {
    const auto state = [&](int64_t n, int64_t heads) { return random({n, heads, D, D}); };
    // Grouped heads, packed documents of which one is empty, and a readout of some tokens; then rows, lengths that are no multiple of a chunk.
    expect_same_bf16(
        [](const Tensors& t) {
          const auto r = gated_delta_rule(t[0], t[1], t[2], t[3], t[4], t[5], ints({0, 1, 70, 70, 200}, t[0]),
                                          ints({0, 0, 30, 0, 60, 150}, t[0]).view({2, 3}));
          return Tensors{r.o, r.final_state};
        },
        {random({1, 200, 4, D}), random({1, 200, 1, D}), random({1, 200, 2, D}), -random({1, 200, 2}).abs(), at::rand({1, 200, 2}, at::kDouble),
         state(4, 2)});
    for (const int64_t T : {63, 130, 1100}) {  // the last is cut into segments
      expect_same_bf16(
          [](const Tensors& t) {
            const auto r = gated_delta_rule(t[0], t[1], t[2], t[3], t[4], t[5]);
            return Tensors{r.o, r.final_state};
          },
          {random({2, T, 2, D}), random({2, T, 2, D}), random({2, T, 2, D}), -0.2 * random({2, T, 2}).abs(), at::rand({2, T, 2}, at::kDouble),
           state(2, 2)});
    }
  }
}

// Outputs and the state, which is updated in place; heads of 20 by the plain kernel.
TEST_F(Cuda, Steps) {
  for (const int64_t K : {16, 20, 64, 128, 256}) {
    const at::Tensor q = random({3, 4, K}), k = random({3, 2, K}), v = random({3, 2, 33}), state = random({3, 2, 33, K});
    const at::Tensor g = -random({3, 2}).abs(), beta = at::rand({3, 2}, at::kDouble), bias = random({2}), A_log = random({2}), D = random({2});
    const auto there = [](const at::Tensor& x) { return x.to(at::kCUDA, at::kFloat); };
    at::Tensor host = state.clone(), device = there(state);
    EXPECT_LE(relative_error(gated_delta_step(there(q), there(k), there(v), there(g), there(beta), device), gated_delta_step(q, k, v, g, beta, host)), 1e-5) << "K " << K;
    EXPECT_LE(relative_error(device, host), 1e-5) << "gated delta rule, K " << K;
    host = state.clone(), device = there(state);
    EXPECT_LE(relative_error(ssd_step(there(q), there(k), there(v), there(g), there(bias), there(A_log), there(D), device), ssd_step(q, k, v, g, bias, A_log, D, host)), 1e-5) << "K " << K;
    EXPECT_LE(relative_error(device, host), 1e-5) << "SSD, K " << K;
  }
}

TEST_F(Cuda, Ssd) {
  expect_same(
      [](const Tensors& t) {
        const auto r = ssd(t[0], t[1], t[2], t[3], t[4], t[5], t[6], {}, ints({0, 30, 100}, t[0]));
        return Tensors{r.o, r.final_state};
      },
      {random({1, 100, 2, 16}), random({1, 100, 1, 16}), random({1, 100, 2, 32}), random({1, 100, 2}), random({2}), random({2}), random({2})}, 1e-4,
      1e-3);
}

// The kernels for bfloat16, every head dimension they have, heads grouped in every way.
TEST_F(Cuda, SsdKernels) {
  struct Case {
    int64_t B, T, Hq, Hk, Hv, K, V;
  };
  for (const Case& c : std::vector<Case>{{2, 1, 2, 2, 2, 128, 128}, {2, 100, 1, 1, 4, 128, 64}, {1, 200, 2, 2, 2, 64, 64}, {1, 63, 4, 2, 2, 64, 128},
                                         {1, 130, 2, 4, 2, 128, 128}}) {
    const int64_t H = std::max(c.Hk, c.Hv);
    expect_same(
        [](const Tensors& t) {
          const auto r = ssd(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]);
          return Tensors{r.o, r.final_state};
        },
        {random({c.B, c.T, c.Hq, c.K}) * 0.3, random({c.B, c.T, c.Hk, c.K}) * 0.3, random({c.B, c.T, c.Hv, c.V}), random({c.B, c.T, H}), random({H}) - 3,
         random({H}), random({H}), random({c.B, H, c.V, c.K})},
        1e-2, 2e-2, 3);
  }
}

// Packed documents, some of them empty, read out in spans; the kernels neither see nor touch what lies outside.
TEST_F(Cuda, SsdKernelsPacked) {
  for (const bool anywhere : {true, false}) {
    expect_same(
        [&](const Tensors& t) {
          const at::Tensor spans = anywhere ? ints({0, 20, 90, 0, 128, 200, 0, 299, 300}, t[0]).view({3, 3}) : at::empty({0, 3}, t[0].options().dtype(at::kInt));
          const auto r = ssd(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], ints({0, 0, 65, 65, 66, 300, 300}, t[0]), spans);
          return Tensors{r.o, r.final_state};
        },
        {random({1, 300, 2, 64}) * 0.3, random({1, 300, 2, 64}) * 0.3, random({1, 300, 4, 64}), random({1, 300, 4}), random({4}) - 3, random({4}), random({4}),
         random({6, 4, 64, 64})},
        1e-2, 2e-2, 3);
  }
}

TEST_F(Cuda, SsdKernelsRepeat) {
  const auto half = [](at::IntArrayRef shape) { return at::randn(shape).to(at::kCUDA, at::kBFloat16).requires_grad_(true); };
  const auto full = [](at::IntArrayRef shape) { return at::randn(shape).to(at::kCUDA).requires_grad_(true); };
  const Tensors x = {half({2, 500, 1, 128}), half({2, 500, 1, 128}), half({2, 500, 8, 64}), full({2, 500, 8}), full({8}), full({8}), full({8})};
  Tensors first;
  for (int run = 0; run < 2; ++run) {
    const auto r = ssd(x[0], x[1], x[2], x[3], x[4], x[5], x[6]);
    Tensors all = torch::autograd::grad({r.o.to(at::kFloat).square().sum() + r.final_state.square().sum()}, x);
    all.push_back(r.o);
    all.push_back(r.final_state);
    if (run == 0) first = all;
    for (size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(at::equal(all[i], first[i])) << i;
  }
}

TEST_F(Cuda, SpanAttention) {
  for (const int64_t window : {0, 7}) {
    expect_same(
        [&](const Tensors& t) {
          return Tensors{span_attention(t[0], t[1], t[2], ints({0, 20, 200}, t[0]).view({1, 3}), ints({0, 30, 200}, t[0]), {}, {}, window)};
        },
        {random({1, 200, 4, 16}), random({1, 200, 2, 16}), random({1, 200, 2, 32})}, 1e-4, 1e-3);
  }
}

// Every path of bfloat16: cuDNN (plain, without gradients), our kernels (64 and 128), libtorch's flash attention (32).
TEST_F(Cuda, SpanAttentionBfloat16) {
  struct Case {
    const char* name;
    int64_t B, Tq, Tk, Hq, Hk;
    std::vector<int32_t> spans, cu, cu_k, lengths;
    int64_t window;
  };
  const std::vector<Case> cases = {
      {"plain", 2, 300, 300, 4, 2, {}, {}, {}, {}, 0},
      {"one token", 2, 1, 1, 2, 2, {}, {}, {}, {}, 0},
      {"past keys", 2, 70, 300, 2, 2, {}, {}, {}, {}, 0},
      {"spans", 2, 300, 300, 4, 2, {0, 10, 150, 1, 299, 300, 0, 200, 201}, {}, {}, {}, 0},
      {"packed", 1, 300, 300, 2, 2, {}, {0, 1, 70, 70, 300}, {}, {}, 0},
      {"packed, spans over bounds, window", 1, 300, 300, 4, 1, {0, 30, 100, 0, 250, 300}, {0, 1, 70, 70, 300}, {}, {}, 40},
      {"packed, past keys", 1, 100, 300, 2, 2, {0, 10, 80}, {0, 30, 100}, {0, 100, 290}, {}, 0},
      {"key lengths", 2, 50, 300, 2, 2, {0, 0, 50, 1, 20, 21}, {}, {}, {50, 257}, 0},
  };
  for (const Case& c : cases) {
    for (const int64_t D : {32, 64, 128}) {
      SCOPED_TRACE(std::string(c.name) + ", width " + std::to_string(D));
      const auto given = [](const std::vector<int32_t>& x, const at::Tensor& like) {
        return x.empty() ? std::optional<at::Tensor>() : std::optional<at::Tensor>(ints(x, like));
      };
      const auto f = [&](const Tensors& t) {
        std::optional<at::Tensor> spans = given(c.spans, t[0]);
        if (spans) spans = spans->view({-1, 3});
        return Tensors{span_attention(t[0], t[1], t[2], spans, given(c.cu, t[0]), given(c.cu_k, t[0]), given(c.lengths, t[0]), c.window)};
      };
      const Tensors inputs = {random({c.B, c.Tq, c.Hq, D}), random({c.B, c.Tk, c.Hk, D}), random({c.B, c.Tk, c.Hk, D})};
      expect_same(f, inputs, 1e-2, 2e-2, 3);
    }
  }
}

// Views whose heads or tokens are no multiple of 16 bytes apart, and spans without a span.
TEST_F(Cuda, SpanAttentionOddViews) {
  const auto f = [](const Tensors& t) {
    const at::Tensor q = t[0].slice(3, 1, 65), kv = t[1].transpose(1, 2);
    return Tensors{span_attention(q, kv.slice(3, 0, 64), kv.slice(3, 3, 67), ints({0, 5, 90}, t[0]).view({1, 3}))};
  };
  expect_same(f, {random({1, 100, 4, 66}), random({1, 2, 100, 67})}, 1e-2, 2e-2, 2);
  const at::Tensor x = at::randn({2, 40, 2, 64}, at::TensorOptions(at::kCUDA).dtype(at::kBFloat16));
  EXPECT_EQ(span_attention(x, x, x, at::zeros({0, 3}, x.options().dtype(at::kInt))).abs().sum().item<double>(), 0);
}

// The same bits from run to run, forward and backward, whichever code serves.
TEST_F(Cuda, SpanAttentionRepeats) {
  struct Case {
    at::ScalarType dtype;
    int64_t T, Hq, Hk, D;
  };
  for (const Case& c : {Case{at::kBFloat16, 3000, 4, 4, 128}, {at::kBFloat16, 5000, 8, 2, 128}, {at::kBFloat16, 5000, 6, 2, 64}, {at::kBFloat16, 3000, 4, 2, 32}, {at::kFloat, 700, 4, 2, 64}}) {
    const auto options = at::TensorOptions(at::kCUDA).dtype(c.dtype);
    const at::Tensor q = at::randn({1, c.T, c.Hq, c.D}, options), k = at::randn({1, c.T, c.Hk, c.D}, options), v = at::randn_like(k), up = at::randn_like(q);
    const at::Tensor spans = ints({0, 100, 300, 0, 450, 690}, q).view({2, 3}), bounds = ints({0, 1, 400, 400, 650, static_cast<int32_t>(c.T)}, q);
    const auto run = [&](const std::optional<at::Tensor>& s, const std::optional<at::Tensor>& cu) {
      Tensors x;
      for (const at::Tensor& t : {q, k, v}) x.push_back(t.detach().clone().requires_grad_(true));
      const at::Tensor o = span_attention(x[0], x[1], x[2], s, cu);
      torch::autograd::backward({o}, {up});
      return Tensors{o.detach(), x[0].grad(), x[1].grad(), x[2].grad()};
    };
    using Given = std::optional<at::Tensor>;
    for (const auto& [s, cu] : {std::pair<Given, Given>{}, {Given(spans), {}}, {{}, Given(bounds)}, {Given(spans), Given(bounds)}}) {
      const Tensors first = run(s, cu);
      for (int again = 0; again < 3; ++again) {
        const Tensors next = run(s, cu);
        for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(at::equal(first[i], next[i])) << "T " << c.T << " heads " << c.Hq << "/" << c.Hk << " of " << c.D << (s ? ", spans" : "") << (cu ? ", packed" : "") << ": tensor " << i;
      }
    }
  }
}

TEST_F(Cuda, CrossEntropy) {
  for (const int64_t classes : {2, 101, 5003, 40000}) {  // 40,000: more than a block's registers hold
    at::Tensor targets = at::randint(0, classes, {77}, at::kLong);
    targets[5] = -100;
    for (const bool on_device : {false, true}) {  // targets
      const auto place = [&](const at::Tensor& x) { return on_device ? targets.to(x.device()) : targets; };
      expect_same(
          [&](const Tensors& t) { return Tensors{linear_cross_entropy(t[0], t[1], place(t[0]), -100, 1e-3).loss}; },
          {random({77, 32}), random({classes, 32})});
      expect_same([&](const Tensors& t) { return Tensors{cross_entropy(t[0], place(t[0]), -100, 1e-3).loss}; }, {random({77, classes})});
    }
  }
}

// 1 GiB of logits and more: the gradients of all rows are those of two halves, weighted by their kept targets.
TEST_F(Cuda, LinearCrossEntropyInBlocks) {
  const int64_t rows = 6000, classes = 100003, half = rows / 2;
  const at::Tensor hidden = at::randn({rows, 16}).to(at::kCUDA, at::kBFloat16), weight = at::randn({classes, 16}).to(at::kCUDA, at::kBFloat16);
  at::Tensor targets = at::randint(0, classes, {rows}, at::kLong);
  targets.slice(0, 10, 1010).fill_(-100);
  const auto run = [&](int64_t begin, int64_t end) {
    const at::Tensor h = hidden.slice(0, begin, end).clone().requires_grad_(), w = weight.clone().requires_grad_();
    const at::Tensor kept = targets.slice(0, begin, end), loss = linear_cross_entropy(h, w, kept).loss;
    torch::autograd::backward({loss * kept.ne(-100).sum().item<double>()}, {});
    return Tensors{h.grad().to(at::kDouble), w.grad().to(at::kDouble)};
  };
  const Tensors all = run(0, rows), low = run(0, half), high = run(half, rows);
  EXPECT_LE(relative_error(all[0], at::cat({low[0], high[0]}).cpu()), 1e-2);
  EXPECT_LE(relative_error(all[1], (low[1] + high[1]).cpu()), 1e-2);
}

TEST_F(Cuda, CrossEntropyNamesABadTarget) {
  const at::Tensor h = at::randn({3, 4}).to(at::kCUDA), w = at::randn({10, 4}).to(at::kCUDA), targets = at::tensor({1, 10, 2}, at::kLong);
  for (const at::Tensor& t : {targets, targets.to(at::kCUDA)}) {
    EXPECT_THROW(linear_cross_entropy(h, w, t), Error);
    EXPECT_THROW(cross_entropy(at::mm(h, w.t()), t), Error);
  }
}

TEST_F(Cuda, AdamwAndGlobalNorm) {
  std::vector<Tensors> host(4), device(4);
  for (int i = 0; i < 420; ++i) {  // more than one launch
    for (int k = 0; k < 4; ++k) {
      const at::Tensor x = at::randn({i == 0 ? 30001 : 33}).abs();
      host[k].push_back(x.to(at::kDouble));
      device[k].push_back(x.to(at::kCUDA));
    }
  }
  EXPECT_NEAR(global_norm(device[1]) / global_norm(host[1]), 1, 1e-6);
  adamw_step_all(host[0], host[1], host[2], host[3], 3, {});
  adamw_step_all(device[0], device[1], device[2], device[3], 3, {});
  for (const int k : {0, 2, 3}) {
    for (size_t i = 0; i < host[k].size(); ++i) EXPECT_LE(relative_error(device[k][i], host[k][i]), 1e-6);
  }
}

}  // namespace
}  // namespace oryx::ops
