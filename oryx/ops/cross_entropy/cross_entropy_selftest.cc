#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/cross_entropy/cross_entropy.h"
#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;
constexpr double kZ = 1e-3;

at::Tensor targets(int64_t T, int64_t classes) {
  at::Tensor t = (at::arange(T) * 7919).remainder(classes);
  if (T > 5) t[5] = -100;  // ignored
  return t;
}

std::vector<SelftestCase> linear(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t classes : {101, 4000}) {
      all.push_back({fmt::format("{} x 64, {} classes", T, classes),
                     {{selftest_random({T, 64}, 1)}, {selftest_random({classes, 64}, 2) * 0.3}, {targets(T, classes)}},
                     [](const Tensors& x) { return Tensors{linear_cross_entropy(x[0], x[1], x[2], -100, kZ).loss}; },
                     [](const Tensors& x) { return Tensors{cross_entropy_naive(at::linear(x[0], x[1]), x[2], -100, kZ).loss}; }});
    }
  }
  return all;
}

std::vector<SelftestCase> of_logits(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t classes : {101, 4000}) {
      all.push_back({fmt::format("{} x {} classes", T, classes),
                     {{selftest_random({T, classes}, 3) * 2}, {targets(T, classes)}},
                     [](const Tensors& x) { return Tensors{cross_entropy(x[0], x[1], -100, kZ).loss}; },
                     [](const Tensors& x) { return Tensors{cross_entropy_naive(x[0], x[1], -100, kZ).loss}; }});
    }
  }
  return all;
}

ORYX_SELFTEST(linear_cross_entropy, linear);
ORYX_SELFTEST(cross_entropy, of_logits);

}  // namespace
}  // namespace oryx::ops
