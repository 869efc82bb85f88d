#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

std::vector<SelftestCase> cases(bool quick) {
  std::vector<SelftestCase> all;
  for (const int64_t T : selftest_lengths(quick)) {
    for (const int64_t rotated : {0, 32}) {
      // Far from the start, where angles in float32 would have lost their digits.
      const at::Tensor positions = (at::arange(T, at::kInt) * 1009).view({1, T});
      all.push_back({fmt::format("T {} H 4 d 64, {} rotated", T, rotated > 0 ? rotated : 64), {{selftest_random({1, T, 4, 64}, 1)}, {positions}},
                     [rotated](const Tensors& x) { return Tensors{rope(x[0], x[1], 10000, rotated)}; },
                     [rotated](const Tensors& x) { return Tensors{rope_naive(x[0], x[1], 10000, rotated)}; }});
    }
  }
  return all;
}

ORYX_SELFTEST(rope, cases);

}  // namespace
}  // namespace oryx::ops
