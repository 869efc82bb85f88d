// A million steps of a delta rule in float32 against the recurrence in float64, by the step form and by the parallel form in pieces, for tests of the
// gated delta rule (one decay a head) and of Kimi Delta Attention (one a key channel).
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "oryx/ops/long_test_support.h"

namespace oryx::ops::delta_long {

using namespace long_test;

struct Piece {
  at::Tensor q, k, v, g, beta;  // [1, T, heads, ...]; g [1, T, heads] or [1, T, heads, K]
};

// `channels` decays a head: 1 or K.
inline Piece draw(int64_t index, int64_t channels) {
  Draw of(index);
  Piece p{of.vectors(), of.vectors(), of.vectors(), {}, {}};
  // Heads (and channels, in another order) from one that forgets nothing to one that forgets within a few tokens; the last changes from token to token.
  p.g = of.fill({1, kPiece, kHeads, channels}, [&](int64_t i) {
    const int64_t kind = (i / channels + i % channels) % kHeads;
    return kind == 0 ? 0.0F : kind == 1 ? -1e-5F : kind == 2 ? -0.5F : -std::exp(-12 * of.uniform());
  });
  if (channels == 1) p.g = p.g.squeeze(-1);
  p.beta = of.fill({1, kPiece, kHeads}, [&](int64_t) { return 0.02F + 0.96F * of.uniform(); });
  return p;
}

// The formula of gated_delta.h and kda.h, one token.
class Oracle {
 public:
  explicit Oracle(int64_t channels) : channels_(channels) {}

  void step(const Piece& p, int64_t t) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const float* q = p.q.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const float* k = p.k.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const float* v = p.v.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const float* g = p.g.const_data_ptr<float>() + (t * kHeads + h) * channels_;
      const double b = p.beta.const_data_ptr<float>()[t * kHeads + h];
      double a[kDim], qq = 1e-6, kk = 1e-6;
      for (int64_t j = 0; j < kDim; ++j) {
        a[j] = std::exp(static_cast<double>(g[channels_ == 1 ? 0 : j]));
        qq += static_cast<double>(q[j]) * q[j];
        kk += static_cast<double>(k[j]) * k[j];
      }
      for (int64_t i = 0; i < kDim; ++i) {
        double* S = &state[static_cast<size_t>((h * kDim + i) * kDim)];
        double predicted = 0, read = 0;
        for (int64_t j = 0; j < kDim; ++j) predicted += a[j] * S[j] * k[j] / std::sqrt(kk);
        for (int64_t j = 0; j < kDim; ++j) {
          S[j] = a[j] * S[j] + b * (v[i] - predicted) * k[j] / std::sqrt(kk);
          read += S[j] * q[j] / std::sqrt(qq);
        }
        o[static_cast<size_t>(h * kDim + i)] = read / std::sqrt(static_cast<double>(kDim));
      }
    }
  }
  std::vector<double> state = std::vector<double>(kHeads * kDim * kDim), o = std::vector<double>(kHeads * kDim);

 private:
  int64_t channels_;
};

// `step` and `rule` as gated_delta_step and gated_delta_rule.
template <typename Step, typename Rule>
void expect_near_float64(int64_t channels, Step step, Rule rule) {
  const at::NoGradGuard no_grad;
  at::set_num_threads(1);  // a million small steps, in which threads would only wait for one another
  Oracle oracle(channels);
  at::Tensor stepped = at::zeros({1, kHeads, kDim, kDim}), pieces = stepped.clone(), o_step, o_piece;
  for (int64_t done = 0; done < kSteps;) {
    const Piece p = draw(done, channels);
    const auto q = p.q.unbind(1), k = p.k.unbind(1), v = p.v.unbind(1), g = p.g.unbind(1), beta = p.beta.unbind(1);
    for (size_t t = 0; t < kPiece; ++t) {
      o_step = step(q[t], k[t], v[t], g[t], beta[t], stepped);
      oracle.step(p, static_cast<int64_t>(t));
    }
    const auto r = rule(p.q, p.k, p.v, p.g, p.beta, pieces);
    pieces = r.final_state;
    o_piece = r.o[0][kPiece - 1];
    done += kPiece;
    if (done != 1000 && done != 10000 && done != 100000 && done != kSteps) continue;
    const std::pair<const char*, double> worst[] = {{"steps: S", error(stepped, oracle.state)},
                                                    {"steps: o", error(o_step, oracle.o)},
                                                    {"pieces: S", error(pieces, oracle.state)},
                                                    {"pieces: o", error(o_piece, oracle.o)}};
    for (const auto& [of, e] : worst) {
      EXPECT_LT(e, kBound) << of << " after " << done;
      ::testing::Test::RecordProperty(fmt::format("{} {}", of, done), fmt::format("{:.1e}", e));
    }
  }
}

}  // namespace oryx::ops::delta_long
