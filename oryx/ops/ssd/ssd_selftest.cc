#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/selftest/selftest.h"
#include "oryx/ops/ssd/ssd.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

// q, k, v, dt_raw, dt_bias, A_log, D, initial state. Heads of every decay: A from -e^-6 (none to speak of) to -e^3.
std::vector<SelftestInput> inputs(int64_t T, int64_t H, int64_t groups, int64_t K, int64_t V, int64_t sequences) {
  return {{selftest_random({1, T, groups, K}, 1) * 0.3}, {selftest_random({1, T, groups, K}, 2) * 0.3}, {selftest_random({1, T, H, V}, 3)},
          {selftest_random({1, T, H}, 4), true}, {selftest_random({H}, 5), true}, {at::linspace(-6, 3, H, at::kDouble), true},
          {selftest_random({H}, 6), true}, {selftest_random({sequences, H, V, K}, 7), true}};
}

template <class F>
SelftestFunction plain(F f) {
  return [f](const Tensors& x) {
    const SsdResult r = f(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], std::nullopt, std::nullopt);
    return Tensors{r.o, r.final_state};
  };
}

template <class F>
SelftestFunction packed(F f) {
  return [f](const Tensors& x) {
    const SsdResult r = f(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9]);
    return Tensors{r.o, r.final_state};
  };
}

std::vector<SelftestCase> parallel(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    all.push_back({fmt::format("T {} H 4 groups 1 N 128 P 64", T), inputs(T, 4, 1, 128, 64, 1), plain(ssd), plain(ssd_naive)});
    all.push_back({fmt::format("T {} H 2 K 128 V 128", T), inputs(T, 2, 2, 128, 128, 1), plain(ssd), plain(ssd_naive)});
    auto in = inputs(T, 4, 4, 64, 64, 4);
    in.push_back({selftest_documents(T)});
    in.push_back({selftest_spans(T)});
    all.push_back({fmt::format("T {} H 4 K 64 V 64, packed, spans", T), in, packed(ssd), packed(ssd_naive)});
  }
  return all;
}

std::vector<SelftestCase> step(bool) {
  const auto run = [](const Tensors& x) {
    at::Tensor state = x[7].clone();
    const at::Tensor o = ssd_step(x[0], x[1], x[2], x[3], x[4], x[5], x[6], state);
    return Tensors{o, state};
  };
  const auto naive = [](const Tensors& x) {
    const auto one = [](const at::Tensor& t) { return t.unsqueeze(1); };
    const SsdResult r = ssd_naive(one(x[0]), one(x[1]), one(x[2]), one(x[3]), x[4], x[5], x[6], x[7]);
    return Tensors{r.o.squeeze(1), r.final_state};
  };
  const int64_t N = 5, H = 4;
  SelftestCase c{"N 5 H 4 K 128 V 64",
                 {{selftest_random({N, H, 128}, 1) * 0.3}, {selftest_random({N, H, 128}, 2) * 0.3}, {selftest_random({N, H, 64}, 3)},
                  {selftest_random({N, H}, 4), true}, {selftest_random({H}, 5), true}, {at::linspace(-6, 3, H, at::kDouble), true},
                  {selftest_random({H}, 6), true}, {selftest_random({N, H, 64, 128}, 7), true}},
                 run, naive};
  c.gradients = false;
  return {c};
}

ORYX_SELFTEST(ssd, parallel);
ORYX_SELFTEST(ssd_step, step);

}  // namespace
}  // namespace oryx::ops
