#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/selftest/selftest.h"
#include "oryx/ops/short_conv/short_conv.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;
constexpr int64_t kChannels = 192;

template <class F>
SelftestFunction packed(F f) {
  return [f](const Tensors& x) {
    const ShortConvResult r = f(x[0], x[1], x[2], x[3], x[4], Activation::kSilu);
    return Tensors{r.y, r.final_state};
  };
}

template <class F>
SelftestFunction plain(F f) {
  return [f](const Tensors& x) {
    const ShortConvResult r = f(x[0], x[1], std::nullopt, x[2], std::nullopt, Activation::kNone);
    return Tensors{r.y, r.final_state};
  };
}

std::vector<SelftestCase> parallel(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    const at::Tensor x = selftest_random({1, T, kChannels}, 1), weight = selftest_random({kChannels, 4}, 2), bias = selftest_random({kChannels}, 3);
    all.push_back({fmt::format("T {} C {} w 4, SiLU, packed", T, kChannels),
                   {{x}, {weight, true}, {bias, true}, {selftest_random({4, kChannels, 3}, 4)}, {selftest_documents(T)}},
                   packed(short_conv), packed(short_conv_naive)});
    all.push_back({fmt::format("B 2 T {} C {} w 4", T, kChannels),
                   {{selftest_random({2, T, kChannels}, 1)}, {weight, true}, {selftest_random({2, kChannels, 3}, 4)}},
                   plain(short_conv), plain(short_conv_naive)});
  }
  return all;
}

std::vector<SelftestCase> step(bool) {
  const auto run = [](const Tensors& x) {
    at::Tensor state = x[2].clone();
    const at::Tensor y = short_conv_step(x[0], x[1], std::nullopt, state, Activation::kSilu);
    return Tensors{y, state};
  };
  const auto naive = [](const Tensors& x) {
    const ShortConvResult r = short_conv_naive(x[0].unsqueeze(1), x[1], std::nullopt, x[2], std::nullopt, Activation::kSilu);
    return Tensors{r.y.squeeze(1), r.final_state};
  };
  SelftestCase c{fmt::format("N 5 C {} w 4, SiLU", kChannels),
                 {{selftest_random({5, kChannels}, 1)}, {selftest_random({kChannels, 4}, 2), true}, {selftest_random({5, kChannels, 3}, 3)}}, run, naive};
  c.gradients = false;
  return {c};
}

ORYX_SELFTEST(short_conv, parallel);
ORYX_SELFTEST(short_conv_step, step);

}  // namespace
}  // namespace oryx::ops
