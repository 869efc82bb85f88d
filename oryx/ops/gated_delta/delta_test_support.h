// What the tests of the gated delta rule and of Kimi Delta Attention share: random problems of both shapes of g, and their comparison.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <optional>
#include <vector>

#include "tests/support/fixtures.h"

namespace oryx::ops::delta_test {

using Optional = std::optional<at::Tensor>;

inline at::Tensor ints(std::vector<int32_t> x) { return at::tensor(x, at::kInt); }

struct Shape {
  int64_t B, T, Hq, Hk, Hv, K, V;
  std::vector<int32_t> cu = {};     // packed documents
  std::vector<int32_t> spans = {};  // rows of three
  bool state = true;
  double decay = 1;  // scale of the log decays
};

// Random arguments, leaves that want gradients, and upstream gradients.
struct Case {
  at::Tensor q, k, v, g, beta, state, up_o, up_state;
  Optional cu, spans;

  // `by_channel`: a decay for each key channel, g [B, T, Hs, K], as of Kimi Delta Attention; else one a head.
  Case(const Shape& s, at::ScalarType dtype, uint64_t seed = 7, bool by_channel = false) {
    at::manual_seed(seed);
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const int64_t Hs = std::max(s.Hk, s.Hv), Ho = std::max(s.Hq, Hs);
    const int64_t N = s.cu.empty() ? s.B : static_cast<int64_t>(s.cu.size()) - 1;
    const auto random = [](at::IntArrayRef size) { return at::randn(size, at::kDouble); };
    const auto leaf = [](const at::Tensor& x, at::ScalarType t) { return x.to(t).clone().set_requires_grad(true); };
    q = leaf(random({s.B, s.T, s.Hq, s.K}), dtype);
    k = leaf(random({s.B, s.T, s.Hk, s.K}), dtype);
    v = leaf(random({s.B, s.T, s.Hv, s.V}), dtype);
    if (by_channel) {  // from one that hardly decays to one that decays a hundred times as fast as the middle
      g = leaf(-s.decay * random({s.B, s.T, Hs, s.K}).square() * at::pow(10, at::linspace(-2, 2, s.K, at::kDouble)), wide);
    } else {
      g = leaf(-s.decay * random({s.B, s.T, Hs}).square(), wide);
    }
    beta = leaf(random({s.B, s.T, Hs}).sigmoid(), wide);
    if (s.state) state = leaf(random({N, Hs, s.V, s.K}), wide);
    up_o = random({s.B, s.T, Ho, s.V}).to(dtype);
    up_state = random({N, Hs, s.V, s.K}).to(wide);
    if (!s.cu.empty()) cu = ints(s.cu);
    if (!s.spans.empty()) spans = ints(s.spans).view({-1, 3});
  }

  // The same numbers in float64.
  Case exact() const {
    Case c = *this;
    for (at::Tensor* x : {&c.q, &c.k, &c.v, &c.g, &c.beta, &c.state}) {
      if (x->defined()) *x = x->detach().to(at::kDouble).set_requires_grad(true);
    }
    c.up_o = up_o.to(at::kDouble);
    c.up_state = up_state.to(at::kDouble);
    return c;
  }

  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> l = {q, k, v, g, beta};
    if (state.defined()) l.push_back(state);
    return l;
  }
};

// o, final_state, then the gradients of q, k, v, g, beta (and the state).
template <typename F>
std::vector<at::Tensor> run(const Case& c, F op, std::optional<double> scale = {}) {
  const auto out =
      op(c.q, c.k, c.v, c.g, c.beta, c.state.defined() ? Optional(c.state) : Optional(), c.cu, c.spans, scale, 1e-6);
  std::vector<at::Tensor> all = {out.o, out.final_state};
  const auto grads = torch::autograd::grad({out.o, out.final_state}, c.leaves(), {c.up_o, c.up_state});
  all.insert(all.end(), grads.begin(), grads.end());
  return all;
}

// Around thousands of small products, where threads would only wait for one another.
class OneThread {
 public:
  OneThread() : threads_(at::get_num_threads()) { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(threads_); }

 private:
  int threads_;
};

inline const char* const kNames[] = {"o", "final_state", "d_q", "d_k", "d_v", "d_g", "d_beta", "d_state"};

// All within `limit` of the largest magnitude; `typed`: and of the same dtype.
inline void expect_near(const std::vector<at::Tensor>& x, const std::vector<at::Tensor>& ref, double limit, double grad_limit, bool typed = true) {
  ASSERT_EQ(x.size(), ref.size());
  for (size_t i = 0; i < x.size(); ++i) {
    if (typed) {
      EXPECT_EQ(x[i].scalar_type(), ref[i].scalar_type()) << kNames[i];
    }
    if (ref[i].abs().sum().item<double>() == 0) {
      EXPECT_EQ(x[i].abs().sum().item<double>(), 0) << kNames[i];
    } else {
      EXPECT_LT(test::fixture_error(x[i], ref[i]), i < 2 ? limit : grad_limit) << kNames[i];
    }
  }
}

// Lengths around a chunk's, groupings of heads, packed documents (an empty one among them), spans, no state, decays from none to strong.
inline const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {1, 1, 1, 1, 1, 2, 1},
      {2, 63, 2, 2, 2, 16, 16},
      {1, 64, 1, 1, 1, 8, 24},
      {2, 65, 1, 1, 3, 5, 7},
      {1, 100, 2, 1, 1, 16, 16},
      {1, 130, 4, 2, 1, 24, 9},
      {2, 33, 1, 2, 4, 16, 8},
      {1, 200, 3, 3, 3, 33, 65, {}, {}, false},
      {1, 300, 2, 2, 2, 16, 16, {0, 1, 1, 64, 128, 191, 300}},
      {1, 150, 1, 1, 2, 17, 16, {0, 70, 150}, {0, 3, 10, 0, 60, 80, 0, 149, 150}},
      {3, 90, 2, 1, 2, 16, 16, {}, {0, 0, 90, 2, 5, 6, 2, 70, 90}},
      {1, 140, 1, 1, 1, 16, 16, {}, {0, 7, 7}, true, 0.1},
      {1, 200, 2, 2, 2, 16, 16, {}, {}, true, 20},
      {1, 200, 2, 2, 2, 16, 16, {}, {}, true, 1e-4},
  };
  return all;
}

}  // namespace oryx::ops::delta_test
