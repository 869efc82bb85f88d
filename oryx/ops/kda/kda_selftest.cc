#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/kda/kda.h"
#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

// q, k, v, g, beta, initial state: Hq query heads on Hk key and value heads of width d; channels that decay not at all beside channels that forget at once.
std::vector<SelftestInput> inputs(int64_t T, int64_t Hq, int64_t Hk, int64_t d, int64_t sequences) {
  return {{selftest_random({1, T, Hq, d}, 1)}, {selftest_random({1, T, Hk, d}, 2)}, {selftest_random({1, T, Hk, d}, 3)},
          {selftest_decays(T, Hk * d).view({1, T, Hk, d}), true}, {selftest_random({1, T, Hk}, 4).sigmoid(), true},
          {selftest_random({sequences, Hk, d, d}, 5), true}};
}

template <class F>
SelftestFunction form(F f) {
  return [f](const Tensors& x) {
    const auto given = [&](size_t i) { return i < x.size() ? std::optional(x[i]) : std::nullopt; };
    const KdaResult r = f(x[0], x[1], x[2], x[3], x[4], x[5], given(6), given(7), std::nullopt, 1e-6);
    return Tensors{r.o, r.final_state};
  };
}

std::vector<SelftestCase> parallel(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    all.push_back({fmt::format("T {} H 2 K 64, decays 0 to -60", T), inputs(T, 2, 2, 64, 1), form(kda), form(kda_naive)});
    auto in = inputs(T, 4, 2, 64, 4);
    in.push_back({selftest_documents(T)});
    in.push_back({selftest_spans(T)});
    all.push_back({fmt::format("T {} H 4/2 K 64, packed, spans", T), in, form(kda), form(kda_naive)});
  }
  all.push_back({"T 130 H 2 K 128", inputs(130, 2, 2, 128, 1), form(kda), form(kda_naive)});
  return all;
}

std::vector<SelftestCase> step(bool) {
  const auto run = [](const Tensors& x) {
    at::Tensor state = x[5].clone();
    const at::Tensor o = kda_step(x[0], x[1], x[2], x[3], x[4], state);
    return Tensors{o, state};
  };
  const auto naive = [](const Tensors& x) {
    const auto one = [](const at::Tensor& t) { return t.unsqueeze(1); };
    const KdaResult r = kda_naive(one(x[0]), one(x[1]), one(x[2]), one(x[3]), one(x[4]), x[5]);
    return Tensors{r.o.squeeze(1), r.final_state};
  };
  const int64_t N = 5, H = 2, d = 128;
  SelftestCase c{"N 5 H 4/2 K 128",
                 {{selftest_random({N, 2 * H, d}, 1)}, {selftest_random({N, H, d}, 2)}, {selftest_random({N, H, d}, 3)},
                  {selftest_decays(N, H * d).view({N, H, d}), true}, {selftest_random({N, H}, 4).sigmoid(), true}, {selftest_random({N, H, d, d}, 5), true}},
                 run, naive};
  c.gradients = false;
  return {c};
}

ORYX_SELFTEST(kda, parallel);
ORYX_SELFTEST(kda_step, step);

}  // namespace
}  // namespace oryx::ops
