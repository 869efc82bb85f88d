#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/gated_delta/long_test_support.h"

namespace oryx::ops {
namespace {

TEST(GatedDeltaLong, AMillionStepsStayNearFloat64) {
  delta_long::expect_near_float64(
      1, [](auto&... x) { return gated_delta_step(x...); }, [](auto&... x) { return gated_delta_rule(x...); });
}

}  // namespace
}  // namespace oryx::ops
