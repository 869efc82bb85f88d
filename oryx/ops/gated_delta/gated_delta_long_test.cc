// A million steps in float32 against the recurrence in float64, by the step form and by the parallel form in pieces.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "oryx/common/random.h"
#include "oryx/ops/gated_delta/gated_delta.h"

namespace oryx::ops {
namespace {

constexpr int64_t kHeads = 4, kDim = 4, kPiece = 1000, kSteps = 1000000;
// Largest error of S and of the last output against float64, relative to the largest value, at 1,000, 10,000, 100,000 and 1,000,000 steps.
constexpr double kBound = 1e-5;

struct Piece {
  at::Tensor q, k, v, g, beta;  // [1, T, heads, ...]
};

Piece draw(int64_t index) {
  auto generator = CounterRng(7, static_cast<uint64_t>(index));
  const auto uniform = [&] { return static_cast<float>(generator.below(1 << 24)) / (1 << 24); };
  const auto fill = [&](std::vector<int64_t> shape, auto f) {
    at::Tensor t = at::empty(shape, at::kFloat);
    for (int64_t i = 0; i < t.numel(); ++i) t.mutable_data_ptr<float>()[i] = f(i);
    return t;
  };
  const auto any = [&](int64_t) { return 2 * uniform() - 1; };
  Piece p{fill({1, kPiece, kHeads, kDim}, any), fill({1, kPiece, kHeads, kDim}, any), fill({1, kPiece, kHeads, kDim}, any), {}, {}};
  // Heads from one that forgets nothing to one that forgets within a few tokens; the last changes from token to token.
  p.g = fill({1, kPiece, kHeads}, [&](int64_t i) {
    const int64_t head = i % kHeads;
    return head == 0 ? 0.0F : head == 1 ? -1e-5F : head == 2 ? -0.5F : -std::exp(-12 * uniform());
  });
  p.beta = fill({1, kPiece, kHeads}, [&](int64_t) { return 0.02F + 0.96F * uniform(); });
  return p;
}

// The formula of gated_delta.h, one token of one head.
class Oracle {
 public:
  void step(const Piece& p, int64_t t) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const float* q = p.q.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const float* k = p.k.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const float* v = p.v.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const double a = std::exp(static_cast<double>(p.g.const_data_ptr<float>()[t * kHeads + h])), b = p.beta.const_data_ptr<float>()[t * kHeads + h];
      double qq = 1e-6, kk = 1e-6;
      for (int64_t j = 0; j < kDim; ++j) {
        qq += static_cast<double>(q[j]) * q[j];
        kk += static_cast<double>(k[j]) * k[j];
      }
      for (int64_t i = 0; i < kDim; ++i) {
        double* S = &state[static_cast<size_t>((h * kDim + i) * kDim)];
        double predicted = 0, read = 0;
        for (int64_t j = 0; j < kDim; ++j) predicted += a * S[j] * k[j] / std::sqrt(kk);
        for (int64_t j = 0; j < kDim; ++j) {
          S[j] = a * S[j] + b * (v[i] - predicted) * k[j] / std::sqrt(kk);
          read += S[j] * q[j] / std::sqrt(qq);
        }
        o[static_cast<size_t>(h * kDim + i)] = read / std::sqrt(static_cast<double>(kDim));
      }
    }
  }
  std::vector<double> state = std::vector<double>(kHeads * kDim * kDim), o = std::vector<double>(kHeads * kDim);
};

// max|x - ref| / max|ref|, the worst head; infinity for NaN.
double error(const at::Tensor& x, const std::vector<double>& ref) {
  const at::Tensor r = at::tensor(ref, at::kDouble).view({kHeads, -1}), d = (x.to(at::kDouble).reshape({kHeads, -1}) - r).abs();
  const double worst = (d.amax(1) / r.abs().amax(1)).max().item<double>();
  return std::isfinite(worst) ? worst : INFINITY;
}

TEST(GatedDeltaLong, AMillionStepsStayNearFloat64) {
  const at::NoGradGuard no_grad;
  Oracle oracle;
  at::Tensor stepped = at::zeros({1, kHeads, kDim, kDim}), pieces = stepped.clone(), o_step, o_piece;
  for (int64_t done = 0; done < kSteps;) {
    const Piece p = draw(done);
    const auto q = p.q.unbind(1), k = p.k.unbind(1), v = p.v.unbind(1), g = p.g.unbind(1), beta = p.beta.unbind(1);
    for (size_t t = 0; t < kPiece; ++t) {
      o_step = gated_delta_step(q[t], k[t], v[t], g[t], beta[t], stepped);
      oracle.step(p, static_cast<int64_t>(t));
    }
    const auto r = gated_delta_rule(p.q, p.k, p.v, p.g, p.beta, pieces);
    pieces = r.final_state;
    o_piece = r.o[0][kPiece - 1];
    done += kPiece;
    if (done != 1000 && done != 10000 && done != 100000 && done != kSteps) continue;
    const double worst[] = {error(stepped, oracle.state), error(o_step, oracle.o), error(pieces, oracle.state), error(o_piece, oracle.o)};
    const char* of[] = {"steps: S", "steps: o", "pieces: S", "pieces: o"};
    for (int i = 0; i < 4; ++i) {
      EXPECT_LT(worst[i], kBound) << of[i] << " after " << done;
      RecordProperty(std::string(of[i]) + " " + std::to_string(done), fmt::format("{:.1e}", worst[i]));
    }
  }
}

}  // namespace
}  // namespace oryx::ops
