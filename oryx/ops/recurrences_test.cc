// The three linear recurrences under random shapes, groupings of heads, decays, spans, packings and splits: chunked = token by token = naive, forward and
// gradients. Each operator's own tests hold the special cases.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdlib>
#include <functional>

#include "oryx/common/random.h"
#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/kda/kda.h"
#include "oryx/ops/ssd/ssd.h"
#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;
using Optional = std::optional<at::Tensor>;

struct Result {
  at::Tensor o, state;
};

// `tokens`: q, k, v and what else there is of each token, [B, T, heads, ...]; `fixed`: parameters.
struct Recurrence {
  const char* name;
  int64_t decays;  // of a head: 1, or 0 for one a channel
  bool ssd;
  std::function<Result(const Tensors& tokens, const Tensors& fixed, const Optional& state, const Optional& cu, const Optional& spans, bool naive)> run;
  std::function<at::Tensor(const Tensors& tokens, const Tensors& fixed, at::Tensor state)> step;
};

void PrintTo(const Recurrence& r, std::ostream* out) { *out << r.name; }

std::vector<Recurrence> recurrences() {
  return {{"gated_delta_rule", 1, false,
           [](const Tensors& x, const Tensors&, const Optional& S, const Optional& cu, const Optional& spans, bool naive) {
             const auto r = (naive ? gated_delta_rule_naive : gated_delta_rule)(x[0], x[1], x[2], x[3], x[4], S, cu, spans, {}, 1e-6);
             return Result{r.o, r.final_state};
           },
           [](const Tensors& x, const Tensors&, const at::Tensor& S) { return gated_delta_step(x[0], x[1], x[2], x[3], x[4], S); }},
          {"kda", 0, false,
           [](const Tensors& x, const Tensors&, const Optional& S, const Optional& cu, const Optional& spans, bool naive) {
             const auto r = (naive ? kda_naive : kda)(x[0], x[1], x[2], x[3], x[4], S, cu, spans, {}, 1e-6);
             return Result{r.o, r.final_state};
           },
           [](const Tensors& x, const Tensors&, const at::Tensor& S) { return kda_step(x[0], x[1], x[2], x[3], x[4], S); }},
          {"ssd", 1, true,
           [](const Tensors& x, const Tensors& p, const Optional& S, const Optional& cu, const Optional& spans, bool naive) {
             const auto r = (naive ? ssd_naive : ssd)(x[0], x[1], x[2], x[3], p[0], p[1], p[2], S, cu, spans);
             return Result{r.o, r.final_state};
           },
           [](const Tensors& x, const Tensors& p, const at::Tensor& S) { return ssd_step(x[0], x[1], x[2], x[3], p[0], p[1], p[2], S); }}};
}

// One problem, in float64, drawn by its number.
struct Problem {
  int64_t B, T, N;
  std::vector<int32_t> ends;  // of packed documents, with the leading 0; empty: not packed
  Tensors tokens, fixed;
  at::Tensor state, up_o, up_state;
  Optional cu, spans;
  std::string text;

  Problem(const Recurrence& r, uint64_t number) {
    CounterRng rng(91, number);
    const auto upto = [&](int64_t n) { return 1 + static_cast<int64_t>(rng.below(static_cast<uint64_t>(n))); };
    const auto one_of = [&](std::vector<double> values) { return values[rng.below(values.size())]; };
    const auto random = [&](std::vector<int64_t> shape) {
      at::Tensor x = at::empty(shape, at::kDouble);
      for (int64_t i = 0; i < x.numel(); ++i) x.mutable_data_ptr<double>()[i] = rng.normal();
      return x;
    };
    const bool packed = rng.below(2) == 0;
    B = packed ? 1 : upto(3), T = upto(rng.below(4) == 0 ? 200 : 80);
    const int64_t few = upto(3), many = few * upto(2);
    const int64_t Hk = rng.below(2) == 0 ? few : many, Hv = rng.below(2) == 0 ? few : many, Hs = std::max(Hk, Hv);
    const int64_t Hq = rng.below(2) == 0 ? Hs * upto(3) : few, Ho = std::max(Hq, Hs);
    const int64_t K = upto(20), V = upto(20);
    N = B;
    if (packed) {
      ends = {0};
      while (ends.back() < T) ends.push_back(std::min<int32_t>(static_cast<int32_t>(T), ends.back() + static_cast<int32_t>(rng.below(70))));
      if (rng.below(3) == 0) ends.push_back(ends.back());
      N = static_cast<int64_t>(ends.size()) - 1;
      cu = at::tensor(ends, at::kInt);
    }
    tokens = {random({B, T, Hq, K}), random({B, T, Hk, K}), random({B, T, Hv, V})};
    const double decay = one_of({1e-3, 0.1, 1, 30});
    if (r.ssd) {
      tokens.push_back(random({B, T, Hs}));
      fixed = {random({Hs}) - 2, random({Hs}) + std::log(decay), random({Hs})};
    } else {
      std::vector<int64_t> of_g = {B, T, Hs};
      if (r.decays == 0) of_g.push_back(K);
      tokens.push_back(-decay * random(of_g).square());
      tokens.push_back(random({B, T, Hs}).sigmoid() * one_of({1, 2}));
    }
    if (rng.below(3) != 0) state = random({N, Hs, V, K});
    up_o = random({B, T, Ho, V}), up_state = random({N, Hs, V, K});
    if (const uint64_t n = rng.below(5); n > 0) {
      std::vector<int32_t> flat;
      for (uint64_t i = 1; i < n; ++i) {  // they may overlap, be empty, or be none at all
        const auto a = static_cast<int32_t>(rng.below(static_cast<uint64_t>(T) + 1)), b = static_cast<int32_t>(rng.below(static_cast<uint64_t>(T) + 1));
        flat.insert(flat.end(), {static_cast<int32_t>(rng.below(static_cast<uint64_t>(B))), std::min(a, b), std::max(a, b)});
      }
      spans = at::tensor(flat, at::kInt).view({static_cast<int64_t>(flat.size() / 3), 3});
    }
    text = fmt::format("problem {}: B {} T {} N {} heads {}/{}/{} K {} V {} decay {} spans {} state {}", number, B, T, N, Hq, Hk, Hv, K, V, decay,
                       spans ? spans->size(0) : -1, state.defined());
  }

  Optional start() const { return state.defined() ? Optional(state) : Optional(); }
  Tensors leaves() const {
    Tensors all = tokens;
    all.insert(all.end(), fixed.begin(), fixed.end());
    if (state.defined()) all.push_back(state);
    return all;
  }
};

// o, the state, then the gradients of all leaves.
Tensors forward_and_gradients(const Recurrence& r, const Problem& p, bool naive) {
  Tensors leaves;
  for (const auto& x : p.leaves()) leaves.push_back(x.detach().clone().set_requires_grad(true));
  const auto tokens_end = leaves.begin() + static_cast<int64_t>(p.tokens.size()), fixed_end = tokens_end + static_cast<int64_t>(p.fixed.size());
  const Result out = r.run({leaves.begin(), tokens_end}, {tokens_end, fixed_end}, p.state.defined() ? Optional(leaves.back()) : Optional(), p.cu, p.spans, naive);
  const at::Tensor loss = (out.o * p.up_o).sum() + (out.state * p.up_state).sum();
  const auto grads = torch::autograd::grad({loss}, leaves, {}, {}, false, /*allow_unused=*/true);
  Tensors all = {out.o.detach(), out.state.detach()};
  for (size_t i = 0; i < grads.size(); ++i) all.push_back(grads[i].defined() ? grads[i] : at::zeros_like(leaves[i]));
  return all;
}

void expect_near(const at::Tensor& x, const at::Tensor& ref, double limit, const std::string& what) {
  ASSERT_EQ(x.sizes(), ref.sizes()) << what;
  const double scale = std::max(ref.numel() > 0 ? ref.abs().max().item<double>() : 0, 1e-3);
  const double error = ref.numel() > 0 ? (x.to(at::kDouble) - ref.to(at::kDouble)).abs().max().item<double>() / scale : 0;
  EXPECT_TRUE(error < limit) << what << ": " << error;  // false for NaN
}

class RandomRecurrence : public ::testing::TestWithParam<Recurrence> {
 protected:
  RandomRecurrence() { at::set_num_threads(1); }  // thousands of small products, where threads would only wait for one another
  ~RandomRecurrence() override { at::set_num_threads(threads_); }
  static int problems() {
    const char* given = std::getenv("ORYX_RANDOM_CASES");
    return given != nullptr ? std::atoi(given) : 12;
  }

 private:
  int threads_ = at::get_num_threads();
};

TEST_P(RandomRecurrence, ChunkedIsNaiveForwardAndGradients) {
  for (int i = 0; i < problems() && !HasFailure(); ++i) {
    const Problem p(GetParam(), static_cast<uint64_t>(i));
    SCOPED_TRACE(p.text);
    const Tensors fast = forward_and_gradients(GetParam(), p, false), slow = forward_and_gradients(GetParam(), p, true);
    ASSERT_EQ(fast.size(), slow.size());
    for (size_t j = 0; j < fast.size(); ++j) expect_near(fast[j], slow[j], 1e-9, fmt::format("output {}", j));
  }
}

// Also in float32, by the vector kernels, where the chunked form of the steps is another one.
TEST_P(RandomRecurrence, TokenByTokenAndInPiecesIsTheWhole) {
  const at::NoGradGuard no_grad;
  for (const auto dtype : {at::kDouble, at::kFloat}) {
    const double limit = dtype == at::kDouble ? 1e-10 : 3e-5;
    for (int i = 0; i < problems() && !HasFailure(); ++i) {
      const Problem p(GetParam(), static_cast<uint64_t>(i));
      SCOPED_TRACE(p.text);
      const auto as = [&](Tensors all) {
        for (auto& x : all) x = x.to(dtype);
        return all;
      };
      const Tensors tokens = as(p.tokens), fixed = as(p.fixed);
      const Result exact = GetParam().run(p.tokens, p.fixed, p.start(), p.cu, {}, false);
      const at::Tensor first = (p.state.defined() ? p.state : at::zeros_like(p.up_state)).to(dtype);
      CounterRng rng(92, static_cast<uint64_t>(i));
      for (int64_t n = 0; n < p.N; ++n) {
        const bool packed = p.cu.has_value();
        const int64_t begin = packed ? p.ends[static_cast<size_t>(n)] : 0, end = packed ? p.ends[static_cast<size_t>(n) + 1] : p.T;
        const auto part = [&](int64_t from, int64_t to) {
          Tensors out;
          for (const auto& x : tokens) out.push_back(x.narrow(0, packed ? 0 : n, 1).slice(1, from, to));
          return out;
        };
        at::Tensor stepped = first.narrow(0, n, 1).clone(), pieces = stepped.clone();
        Tensors o_steps, o_pieces;
        for (int64_t t = begin; t < end; ++t) {
          Tensors one = part(t, t + 1);
          for (auto& x : one) x = x.squeeze(1);
          o_steps.push_back(GetParam().step(one, fixed, stepped).unsqueeze(1));
        }
        for (int64_t t = begin; t < end;) {
          const int64_t next = std::min<int64_t>(end, t + 1 + static_cast<int64_t>(rng.below(90)));
          const Result r = GetParam().run(part(t, next), fixed, pieces, {}, {}, false);
          o_pieces.push_back(r.o);
          pieces = r.state;
          t = next;
        }
        const at::Tensor state = exact.state.narrow(0, n, 1);
        expect_near(stepped, state, limit, "the state after steps");
        expect_near(pieces, state, limit, "the state after pieces");
        if (begin == end) continue;
        const at::Tensor o = exact.o.narrow(0, packed ? 0 : n, 1).slice(1, begin, end);
        expect_near(at::cat(o_steps, 1), o, limit, "o of steps");
        expect_near(at::cat(o_pieces, 1), o, limit, "o of pieces");
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, RandomRecurrence, ::testing::ValuesIn(recurrences()), [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace oryx::ops
