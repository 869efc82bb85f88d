#include "oryx/train/lr_schedule.h"

#include <gtest/gtest.h>

#include "tests/support/fixtures.h"

namespace oryx {
namespace {

TEST(LearningRateFixture, CosineWithWarmup) {
  ORYX_REQUIRE_FIXTURES();
  for (const auto& f : test::fixtures("ops", "cosine_schedule")) {
    SCOPED_TRACE(f.name);
    const at::Tensor steps = f.at("steps").to(at::kCPU, at::kLong), want = f.at("lr").cpu();
    at::Tensor got = at::empty_like(want);
    for (int64_t i = 0; i < steps.numel(); ++i) {
      got.data_ptr<double>()[i] = cosine_with_warmup(steps[i].item<int64_t>(), f.attrs.at("peak"), f.attrs.at("warmup"), f.attrs.at("total"),
                                                     f.attrs.at("min_ratio"));
    }
    EXPECT_LT(test::fixture_error(got, want), 1e-12);
  }
}

TEST(LearningRate, StaysAtTheFloor) {
  EXPECT_DOUBLE_EQ(cosine_with_warmup(1000, 1.0, 10, 100, 0.1), 0.1);
  EXPECT_DOUBLE_EQ(cosine_with_warmup(0, 1.0, 0, 100, 0.1), 1.0);
  EXPECT_DOUBLE_EQ(cosine_with_warmup(0, 1.0, 10, 100, 0.1), 0.0);
}

}  // namespace
}  // namespace oryx
