#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/selftest/selftest.h"
#include "oryx/ops/swiglu/swiglu.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

std::vector<SelftestCase> cases(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t F : {63, 2048}) {
      all.push_back({fmt::format("{} x {}", T, F), {{selftest_random({T, F}, 1) * 4}, {selftest_random({T, F}, 2)}},
                     [](const Tensors& x) { return Tensors{swiglu(x[0], x[1])}; }, [](const Tensors& x) { return Tensors{swiglu_naive(x[0], x[1])}; }});
    }
  }
  return all;
}

ORYX_SELFTEST(swiglu, cases);

}  // namespace
}  // namespace oryx::ops
