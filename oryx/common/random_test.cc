#include "oryx/common/random.h"

#include <gtest/gtest.h>

#include <set>

namespace oryx {
namespace {

// Known answers of Philox4x32-10 from the Random123 distribution (kat_vectors).
TEST(Philox, KnownAnswers) {
  const std::array<uint32_t, 4> zeros = philox({0, 0, 0, 0}, {0, 0});
  EXPECT_EQ(zeros, (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const std::array<uint32_t, 4> ones = philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u});
  EXPECT_EQ(ones, (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(CounterRng, IsAFunctionOfSeedAndStream) {
  CounterRng a(7, 3, 1), b(7, 3, 1), c(7, 3, 2);
  std::set<uint64_t> seen;
  for (int i = 0; i < 100; ++i) {
    const uint64_t x = a.next64();
    EXPECT_EQ(x, b.next64());
    seen.insert(x);
    seen.insert(c.next64());
  }
  EXPECT_EQ(seen.size(), 200u);
}

TEST(CounterRng, UniformAndNormalMoments) {
  CounterRng r(1);
  double sum = 0, squares = 0, uniform = 0;
  constexpr int kN = 20000;
  for (int i = 0; i < kN; ++i) {
    const double x = r.normal();
    sum += x;
    squares += x * x;
    uniform += r.uniform();
  }
  EXPECT_NEAR(sum / kN, 0, 0.03);
  EXPECT_NEAR(squares / kN, 1, 0.05);
  EXPECT_NEAR(uniform / kN, 0.5, 0.01);
}

}  // namespace
}  // namespace oryx
