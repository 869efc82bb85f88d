// A million steps in float32 against the recurrence in float64, by the step form and by the parallel form in pieces.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "oryx/ops/long_test_support.h"
#include "oryx/ops/ssd/ssd.h"

namespace oryx::ops::ssd_long {
namespace {

using namespace long_test;

// The first head decays by less at a step than float32 resolves near 1 (6e-8): its factor's rounding adds up with the steps.
constexpr double kFirstHeadBoundAStep = 5e-9;

struct Piece {
  at::Tensor q, k, v, dt;  // [1, T, heads, ...]
};

Piece draw(int64_t index) {
  Draw of(index);
  Piece p{of.vectors(), of.vectors(), of.vectors(), {}};
  p.dt = of.fill({1, kPiece, kHeads}, [&](int64_t) { return 6 * of.uniform() - 3; });
  return p;
}

// Heads from one that hardly forgets within a million tokens to one that forgets within a few.
struct Heads {
  at::Tensor dt_bias = at::tensor({-2.0F, -4.0F, -1.0F, 0.5F});
  at::Tensor A_log = at::tensor({-14.0F, -5.0F, 0.0F, 1.5F});
  at::Tensor D = at::tensor({1.0F, 0.5F, 0.0F, -1.0F});
};

// The formula of ssd.h, one token of one head.
class Oracle {
 public:
  void step(const Heads& heads, const Piece& p, int64_t t) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const float* q = p.q.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const float* k = p.k.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const float* v = p.v.const_data_ptr<float>() + (t * kHeads + h) * kDim;
      const double raw = static_cast<double>(p.dt.const_data_ptr<float>()[t * kHeads + h]) + heads.dt_bias.const_data_ptr<float>()[h];
      const double dt = std::log1p(std::exp(raw)), a = std::exp(-dt * std::exp(static_cast<double>(heads.A_log.const_data_ptr<float>()[h])));
      for (int64_t i = 0; i < kDim; ++i) {
        double* S = &state[static_cast<size_t>((h * kDim + i) * kDim)];
        double read = heads.D.const_data_ptr<float>()[h] * static_cast<double>(v[i]);
        for (int64_t j = 0; j < kDim; ++j) {
          S[j] = a * S[j] + dt * v[i] * k[j];
          read += S[j] * q[j];
        }
        o[static_cast<size_t>(h * kDim + i)] = read;
      }
    }
  }
  std::vector<double> state = std::vector<double>(kHeads * kDim * kDim), o = std::vector<double>(kHeads * kDim);
};

TEST(SsdLong, AMillionStepsStayNearFloat64) {
  const at::NoGradGuard no_grad;
  at::set_num_threads(1);  // a million small steps, in which threads would only wait for one another
  const Heads heads;
  Oracle oracle;
  at::Tensor stepped = at::zeros({1, kHeads, kDim, kDim}), pieces = stepped.clone(), o_step, o_piece;
  for (int64_t done = 0; done < kSteps;) {
    const Piece p = draw(done);
    const auto q = p.q.unbind(1), k = p.k.unbind(1), v = p.v.unbind(1), dt = p.dt.unbind(1);
    for (size_t t = 0; t < kPiece; ++t) {
      o_step = ssd_step(q[t], k[t], v[t], dt[t], heads.dt_bias, heads.A_log, heads.D, stepped);
      oracle.step(heads, p, static_cast<int64_t>(t));
    }
    const auto r = ssd(p.q, p.k, p.v, p.dt, heads.dt_bias, heads.A_log, heads.D, pieces);
    pieces = r.final_state;
    o_piece = r.o[0][kPiece - 1];
    done += kPiece;
    if (done != 1000 && done != 10000 && done != 100000 && done != kSteps) continue;
    const std::pair<const char*, double> worst[] = {{"steps: S", error(stepped, oracle.state, 1, kHeads)},
                                                    {"steps: o", error(o_step, oracle.o, 1, kHeads)},
                                                    {"pieces: S", error(pieces, oracle.state, 1, kHeads)},
                                                    {"pieces: o", error(o_piece, oracle.o, 1, kHeads)}};
    for (const auto& [of, e] : worst) {
      EXPECT_LT(e, kBound) << of << " after " << done;
      RecordProperty(fmt::format("{} {}", of, done), fmt::format("{:.1e}", e));
    }
    const double slow = std::max(error(stepped, oracle.state, 0, 1), error(pieces, oracle.state, 0, 1));
    EXPECT_LT(slow, kBound + kFirstHeadBoundAStep * static_cast<double>(done));
    RecordProperty(fmt::format("first head {}", done), fmt::format("{:.1e}", slow));
  }
}

}  // namespace
}  // namespace oryx::ops::ssd_long
