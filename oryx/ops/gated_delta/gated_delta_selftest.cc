#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/gated_delta/gates.h"
#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

// q, k, v, g, beta, initial state: Hq query heads on Hk key and value heads of width d.
std::vector<SelftestInput> inputs(int64_t T, int64_t Hq, int64_t Hk, int64_t d, int64_t sequences) {
  return {{selftest_random({1, T, Hq, d}, 1)}, {selftest_random({1, T, Hk, d}, 2)}, {selftest_random({1, T, Hk, d}, 3)},
          {selftest_decays(T, Hk), true}, {selftest_random({1, T, Hk}, 4).sigmoid(), true}, {selftest_random({sequences, Hk, d, d}, 5), true}};
}

template <class F>
SelftestFunction plain(F f) {
  return [f](const Tensors& x) {
    const GatedDeltaResult r = f(x[0], x[1], x[2], x[3], x[4], x[5], std::nullopt, std::nullopt, std::nullopt, 1e-6);
    return Tensors{r.o, r.final_state};
  };
}

template <class F>
SelftestFunction packed(F f) {
  return [f](const Tensors& x) {
    const GatedDeltaResult r = f(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], std::nullopt, 1e-6);
    return Tensors{r.o, r.final_state};
  };
}

std::vector<SelftestCase> parallel(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t d : {64, 128}) {
      all.push_back({fmt::format("T {} H 2 K {}, decays 0 to -60", T, d), inputs(T, 2, 2, d, 1), plain(gated_delta_rule), plain(gated_delta_rule_naive)});
    }
    auto in = inputs(T, 4, 2, 128, 4);
    in.push_back({selftest_documents(T)});
    in.push_back({selftest_spans(T)});
    all.push_back({fmt::format("T {} H 4/2 K 128, packed, spans", T), in, packed(gated_delta_rule), packed(gated_delta_rule_naive)});
  }
  return all;
}

std::vector<SelftestCase> step(bool) {
  const auto run = [](const Tensors& x) {
    at::Tensor state = x[5].clone();
    const at::Tensor o = gated_delta_step(x[0], x[1], x[2], x[3], x[4], state);
    return Tensors{o, state};
  };
  const auto naive = [](const Tensors& x) {
    const auto one = [](const at::Tensor& t) { return t.unsqueeze(1); };
    const GatedDeltaResult r = gated_delta_rule_naive(one(x[0]), one(x[1]), one(x[2]), one(x[3]), one(x[4]), x[5]);
    return Tensors{r.o.squeeze(1), r.final_state};
  };
  const int64_t N = 5, H = 2, d = 128;
  SelftestCase c{"N 5 H 4/2 K 128",
                 {{selftest_random({N, 2 * H, d}, 1)}, {selftest_random({N, H, d}, 2)}, {selftest_random({N, H, d}, 3)},
                  {selftest_decays(N, H).squeeze(0), true}, {selftest_random({N, H}, 4).sigmoid(), true}, {selftest_random({N, H, d, d}, 5), true}},
                 run, naive};
  c.gradients = false;
  return {c};
}

std::vector<SelftestCase> gates(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t H : {3, 16}) {
      const auto form = [](auto f) {
        return [f](const Tensors& x) {
          const auto [g, beta] = f(x[0], x[1], x[2], 2.0);
          return Tensors{g, beta};
        };
      };
      all.push_back({fmt::format("T {} H {}", T, H),
                     {{selftest_random({1, T, 2 * H}, 1) * 9, true}, {at::linspace(-6, 3, H, at::kDouble), true}, {selftest_random({H}, 2), true}},
                     form(gated_delta_gates), form(gated_delta_gates_naive)});
    }
  }
  return all;
}

ORYX_SELFTEST(gated_delta_gates, gates);
ORYX_SELFTEST(gated_delta_rule, parallel);
ORYX_SELFTEST(gated_delta_step, step);

}  // namespace
}  // namespace oryx::ops
