#include "oryx/ops/halves/halves.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace oryx::ops {
namespace {

TEST(Bfloat16Halves, AddUpToSixteenBitsOnCuda) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  at::manual_seed(1);
  for (const int64_t in : {1, 7, 2048}) {
    const std::vector<at::Tensor> parts = {at::randn({3, in}).to(at::kCUDA), at::randn({1, in}).to(at::kCUDA), 1e-3 * at::randn({16, in}).to(at::kCUDA)};
    for (size_t count = 1; count <= parts.size(); ++count) {
      const std::vector<at::Tensor> some(parts.begin(), parts.begin() + static_cast<int64_t>(count));
      const at::Tensor w = at::cat(some), hi = w.to(at::kBFloat16);
      EXPECT_TRUE(at::equal(bfloat16_halves(some), at::cat({hi, (w - hi).to(at::kBFloat16)}))) << count << " parts of " << in;
    }
  }
  EXPECT_THROW(bfloat16_halves({at::randn({2, 3}).to(at::kCUDA), at::randn({2, 4}).to(at::kCUDA)}), c10::Error);
  EXPECT_THROW(bfloat16_halves({at::randn({2, 3}).to(at::kCUDA, at::kBFloat16)}), c10::Error);
}

}  // namespace
}  // namespace oryx::ops
