// Every CUDA kernel once or twice at small, odd shapes, and nothing else on the device: what compute-sanitizer gets through in seconds (docs/cuda.md). That values are right is
// the other tests' business; here outputs and gradients are written everywhere and finite.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/ops/adamw/adamw.h"
#include "oryx/ops/copies/copies.h"
#include "oryx/ops/cross_entropy/cross_entropy.h"
#include "oryx/ops/decode_attention/decode_attention.h"
#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/gated_delta/gates.h"
#include "oryx/ops/halves/halves.h"
#include "oryx/ops/kda/kda.h"
#include "oryx/ops/norm/norm.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/short_conv/short_conv.h"
#include "oryx/ops/span_attention/span_attention.h"
#include "oryx/ops/ssd/ssd.h"
#include "oryx/ops/swiglu/swiglu.h"

namespace oryx::ops::cuda_small {
namespace {

using Tensors = std::vector<at::Tensor>;

class CudaSmall : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
    at::manual_seed(1);
  }
};

// Drawn on the CPU: no generator of the device, which a sanitizer would have to look at.
at::Tensor half(at::IntArrayRef shape) { return (0.5 * at::randn(shape)).to(at::kCUDA, at::kBFloat16).requires_grad_(true); }
at::Tensor full(at::IntArrayRef shape, double scale = 1, double shift = 0) { return (scale * at::randn(shape) + shift).to(at::kCUDA).requires_grad_(true); }
at::Tensor whole(const std::vector<int32_t>& values) { return at::tensor(values, at::kInt).to(at::kCUDA); }

void expect_finite(const at::Tensor& x, const char* what) {
  const at::Tensor host = x.detach().cpu().to(at::kDouble);
  EXPECT_TRUE(host.isfinite().all().item<bool>()) << what;
}

void forward_and_backward(const Tensors& outputs, const Tensors& inputs) {
  Tensors up;
  for (const at::Tensor& o : outputs) {
    expect_finite(o, "output");
    up.push_back(at::randn(o.sizes()).to(o.device(), o.scalar_type()));
  }
  for (const at::Tensor& g : torch::autograd::grad(outputs, inputs, up, {}, false, /*allow_unused=*/true)) {
    if (g.defined()) expect_finite(g, "gradient");
  }
}

TEST_F(CudaSmall, GatedDelta) {
  for (const int64_t D : {64, 128}) {
    const Tensors x = {half({1, 150, 2, D}), half({1, 150, 1, D}), half({1, 150, 2, D}), -full({1, 150, 2}).abs().detach(), full({1, 150, 2}).sigmoid().detach(), full({3, 2, D, D})};
    for (const size_t i : {3, 4}) x[i].requires_grad_(true);
    const auto r = gated_delta_rule(x[0], x[1], x[2], x[3], x[4], x[5], whole({0, 1, 70, 150}), whole({0, 10, 60, 0, 100, 140}).view({2, 3}));
    forward_and_backward({r.o, r.final_state}, x);
    const auto plain = gated_delta_rule(x[0], x[1], x[2], x[3], x[4]);
    forward_and_backward({plain.o, plain.final_state}, {x.begin(), x.begin() + 5});
  }
}

// Rows so long that they are cut into segments.
TEST_F(CudaSmall, GatedDeltaSegments) {
  const Tensors x = {half({1, 2100, 1, 128}), half({1, 2100, 1, 128}), half({1, 2100, 1, 128}), -full({1, 2100, 1}, 0.1).abs().detach(), full({1, 2100, 1}).sigmoid().detach(), full({1, 1, 128, 128})};
  for (const size_t i : {3, 4}) x[i].requires_grad_(true);
  const auto r = gated_delta_rule(x[0], x[1], x[2], x[3], x[4], x[5]);
  forward_and_backward({r.o, r.final_state}, x);
}

TEST_F(CudaSmall, Kda) {
  for (const int64_t D : {64, 128}) {
    const Tensors x = {half({1, 150, 2, D}), half({1, 150, 1, D}), half({1, 150, 1, D}), -full({1, 150, 1, D}).abs().detach(), full({1, 150, 1}).sigmoid().detach(), full({3, 1, D, D})};
    for (const size_t i : {3, 4}) x[i].requires_grad_(true);
    const auto r = kda(x[0], x[1], x[2], x[3], x[4], x[5], whole({0, 1, 70, 150}), whole({0, 10, 60, 0, 100, 140}).view({2, 3}));
    forward_and_backward({r.o, r.final_state}, x);
    const auto one = [](const at::Tensor& t) { return t.narrow(2, 0, 1); };  // a query head a state head
    const auto plain = kda(one(x[0]), x[1], x[2], x[3], x[4]);
    forward_and_backward({plain.o, plain.final_state}, {x.begin(), x.begin() + 5});
  }
}

TEST_F(CudaSmall, Ssd) {
  struct Case {
    int64_t Hq, Hk, Hv, K, V;
  };
  for (const Case& c : {Case{1, 1, 4, 128, 64}, Case{2, 2, 2, 128, 128}, Case{2, 2, 2, 64, 64}}) {
    const int64_t H = std::max(c.Hk, c.Hv);
    const Tensors x = {half({1, 150, c.Hq, c.K}), half({1, 150, c.Hk, c.K}), half({1, 150, c.Hv, c.V}), full({1, 150, H}), full({H}, 1, -3), full({H}), full({H}), full({3, H, c.V, c.K})};
    const auto r = ssd(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], whole({0, 1, 70, 150}), whole({0, 10, 60, 0, 100, 140}).view({2, 3}));
    forward_and_backward({r.o, r.final_state}, x);
    const auto plain = ssd(x[0], x[1], x[2], x[3], x[4], x[5], x[6]);
    forward_and_backward({plain.o, plain.final_state}, {x.begin(), x.begin() + 7});
  }
}

TEST_F(CudaSmall, SsdSegments) {
  const Tensors x = {half({1, 2100, 1, 128}), half({1, 2100, 1, 128}), half({1, 2100, 2, 64}), full({1, 2100, 2}), full({2}, 1, -5), full({2}), full({2}), full({1, 2, 64, 128})};
  const auto r = ssd(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]);
  forward_and_backward({r.o, r.final_state}, x);
}

TEST_F(CudaSmall, SpanAttention) {
  for (const int64_t D : {64, 128}) {
    const Tensors x = {half({1, 200, 2, D}), half({1, 200, 1, D}), half({1, 200, 1, D})};
    forward_and_backward({span_attention(x[0], x[1], x[2], whole({0, 10, 90, 0, 199, 200}).view({2, 3}))}, x);
    forward_and_backward({span_attention(x[0], x[1], x[2], {}, whole({0, 1, 70, 70, 200}), {}, {}, 40)}, x);
  }
  // Long enough that query heads of one key head are items of their own in the backward pass, in a window that keeps the area small.
  const Tensors x = {half({1, 4200, 2, 64}), half({1, 4200, 1, 64}), half({1, 4200, 1, 64})};
  forward_and_backward({span_attention(x[0], x[1], x[2], {}, whole({0, 4200}), {}, {}, 40)}, x);
}

TEST_F(CudaSmall, Steps) {
  const at::NoGradGuard no_grad;
  for (const int64_t K : {20, 128}) {
    const at::Tensor q = full({3, 4, K}), k = full({3, 2, K}), v = full({3, 2, K}), state = full({3, 2, K, K}), g = -full({3, 2}).abs(), scalar = full({2});
    expect_finite(gated_delta_step(q, k, v, g, full({3, 2}).sigmoid(), state), "gated delta rule");
    expect_finite(ssd_step(q, k, v, g, scalar, scalar, scalar, state), "SSD");
    expect_finite(state, "state");
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const auto to = [&](const at::Tensor& x) { return x.to(dtype); };
      const at::Tensor keys = to(full({3, 300, 2, K})), values = to(full({3, 300, 2, K})), lengths = whole({1, 150, 300});
      expect_finite(decode_attention(to(q), keys, values, lengths, {}, {}, {10000, 0}), "decode attention");
      expect_finite(decode_attention(to(q), keys, values, lengths, {}, whole({1, 0, 1}).to(at::kBool), {}, 50), "decode attention in a window");
    }
    const at::Tensor tail = full({3, 24, 3});
    expect_finite(short_conv_step(full({3, 24}), full({24, 4}), {}, tail, Activation::kSilu), "short convolution");
  }
}

TEST_F(CudaSmall, BoundByMemory) {
  for (const bool narrow : {false, true}) {
    const auto some = [&](at::IntArrayRef shape) { return narrow ? half(shape) : full(shape); };
    for (const int64_t n : {17, 256, 1024}) {
      const at::Tensor x = some({7, n}), y = some({7, n}), w = full({n});
      forward_and_backward({swiglu(x, y)}, {x, y});
      forward_and_backward({rms_norm(x, w, 1e-6)}, {x, w});
      forward_and_backward({gated_rms_norm(x, y, w, 1e-6)}, {x, y, w});
      const auto [normed, sum] = add_rms_norm(x, y, w, 1e-6);
      forward_and_backward({normed, sum}, {x, y, w});
    }
    for (const int64_t count : {3, 13}) {
      const at::Tensor heads = some({1, 33, count, 64});
      forward_and_backward({rope(heads, at::arange(33, at::kInt).view({1, 33}).to(at::kCUDA), 10000)}, {heads});
    }
    const at::Tensor x = some({1, 70, 40}), w = full({40, 4}), tail = some({2, 40, 3});
    const auto conv = short_conv(x, w, {}, tail, whole({0, 1, 70}), Activation::kSilu);
    forward_and_backward({conv.y, conv.final_state}, {x, w, tail});
    const at::Tensor hidden = some({37, 64}), head = some({101, 64});
    forward_and_backward({linear_cross_entropy(hidden, head, at::randint(101, {37}, at::kLong)).loss}, {hidden, head});
  }
  const at::Tensor ba = full({50, 6}), A_log = full({3}), bias = full({3});
  const auto [g, beta] = gated_delta_gates(ba, A_log, bias);
  forward_and_backward({g, beta}, {ba, A_log, bias});
  const at::NoGradGuard no_grad;
  AdamwUpdate u;
  for (const int64_t n : {1, 63, 3001}) {
    u.p.push_back(full({n}).detach());
    u.m.push_back(full({n}, 0).detach());
    u.v.push_back(full({n}, 0).detach());
    u.g.push_back(n == 63 ? full({n}).detach() : half({n}).detach());
    u.weight.push_back(n == 63 ? at::Tensor() : half({n}).detach());
    u.decays.push_back(n != 1);
  }
  const at::Tensor control = at::zeros({kAdamwControl}, at::kDouble).to(at::kCUDA);
  adamw_update(u, control, at::full({}, 2.5f).to(at::kCUDA), {}, 1);
  for (const at::Tensor& p : u.p) expect_finite(p, "parameter");
  expect_finite(bfloat16_halves({full({3, 70}).detach(), full({1, 70}).detach()}), "halves");
  Copies copies;
  const at::Tensor rows = half({9, 2, 24}).detach(), places = at::zeros({50}, at::kChar).to(at::kCUDA), apart = full({40, 30}).detach(), whole_rows = full({3000}).detach();
  copies.add_rows(rows, 4, half({5, 2, 24}).detach(), 0, 5);
  copies.add_rows(places, 3, at::ones({41}, at::kChar).to(at::kCUDA), 0, 41);
  copies.add_rows(apart.narrow(1, 3, 20), 1, full({39, 20}).detach(), 0, 39);
  copies.add(whole_rows, full({3000}).detach());
  copies.run();
  for (const at::Tensor& x : {rows, apart, whole_rows}) expect_finite(x, "copy");
}

}  // namespace
}  // namespace oryx::ops::cuda_small
