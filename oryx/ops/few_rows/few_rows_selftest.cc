#include <ATen/ATen.h>

#include "oryx/common/error.h"
#include "oryx/ops/few_rows/few_rows.h"
#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

std::vector<SelftestCase> few_rows_cases(bool) {
  using Tensors = std::vector<at::Tensor>;
  std::vector<SelftestCase> all;
  for (const int64_t M : {1, 3, 16}) {
    for (const int64_t K : {63, 768}) {
      all.push_back({fmt::format("{} x {}", M, K),
                     {{selftest_random({M, K}, 1)}, {selftest_random({101, K}, 2)}},
                     [](const Tensors& x) {
                       return Tensors{few_rows_suit(x[0], x[1]) ? few_rows_product(x[0], x[1])
                                                                : at::linear(x[0], x[1])};
                     },
                     [](const Tensors& x) { return Tensors{at::linear(x[0], x[1])}; },
                     false});
    }
  }
  return all;
}

ORYX_SELFTEST(few_rows_product, few_rows_cases);

}  // namespace
}  // namespace oryx::ops
