#include "oryx/ops/gated_delta/long_test_support.h"
#include "oryx/ops/kda/kda.h"

namespace oryx::ops {
namespace {

TEST(KdaLong, AMillionStepsStayNearFloat64) {
  delta_long::expect_near_float64(
      delta_long::kDim, [](auto&... x) { return kda_step(x...); }, [](auto&... x) { return kda(x...); });
}

}  // namespace
}  // namespace oryx::ops
