#include "oryx/ops/rope/rope.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <string>

#include "oryx/common/error.h"
#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using oryx::test::fixture_error;
using oryx::test::norm_error;

at::Tensor random_positions(int64_t B, int64_t T, int64_t limit) { return at::randint(limit, {B, T}, at::kInt); }

TEST(Rope, EqualsNaiveForOddShapesAndPartialWidths) {
  at::manual_seed(1);
  for (const int64_t T : {1, 63, 100, 1000}) {
    for (const auto& [d, rotary] :
         std::vector<std::pair<int64_t, int64_t>>{{64, 0}, {64, 32}, {80, 80}, {6, 2}, {34, 34}}) {
      const at::Tensor x = at::randn({2, T, 3, d}), positions = random_positions(2, T, 5000);
      const at::Tensor ref = rope_naive(x.to(at::kDouble), positions, 10000.0, rotary);
      EXPECT_LT(fixture_error(rope(x, positions, 10000.0, rotary), ref), 4e-7) << T << " " << d << " " << rotary;
    }
  }
}

TEST(Rope, AnglesStayExactAtAMillion) {
  at::manual_seed(2);
  for (const double theta : {10000.0, 500000.0}) {
    const at::Tensor x = at::randn({1, 200, 2, 64}), positions = random_positions(1, 200, 1000000) + 60000;
    const at::Tensor ref = rope_naive(x.to(at::kDouble), positions, theta);
    EXPECT_LT(fixture_error(rope(x, positions, theta), ref), 4e-7);
  }
}

TEST(Rope, OneTokenEqualsItsRowOfTheWhole) {
  at::manual_seed(3);
  const at::Tensor x = at::randn({2, 300, 4, 64}), positions = sequence_positions(2, 300);
  const at::Tensor whole = rope(x, positions, 10000.0);
  for (const int64_t t : {0, 1, 255, 256, 299}) {
    const at::Tensor one = rope(x.narrow(1, t, 1), positions.narrow(1, t, 1), 10000.0);
    EXPECT_TRUE(at::equal(one, whole.narrow(1, t, 1))) << t;
  }
}

TEST(Rope, GradientIsTheRotationBack) {
  at::manual_seed(4);
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    for (const int64_t rotary : {0, 16}) {
      const at::Tensor x = at::randn({2, 63, 3, 32}, dtype).requires_grad_(), up = at::randn({2, 63, 3, 32}, dtype);
      const at::Tensor positions = random_positions(2, 63, 100000);
      const at::Tensor leaf = x.detach().to(at::kDouble).requires_grad_();
      const at::Tensor ref =
          torch::autograd::grad({rope_naive(leaf, positions, 10000.0, rotary)}, {leaf}, {up.to(at::kDouble)})[0];
      const at::Tensor got = torch::autograd::grad({rope(x, positions, 10000.0, rotary)}, {x}, {up})[0];
      EXPECT_LT(fixture_error(got, ref), 4e-7);
    }
  }
}

TEST(Rope, Bfloat16AndStridedInput) {
  at::manual_seed(5);
  const at::Tensor wide = at::randn({2, 50, 6, 64}), positions = random_positions(2, 50, 3000);
  const at::Tensor part = wide.narrow(2, 2, 3);
  EXPECT_TRUE(at::equal(rope(part, positions, 10000.0), rope(part.contiguous(), positions, 10000.0)));
  const at::Tensor low = part.to(at::kBFloat16), y = rope(low, positions, 10000.0);
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_LT(norm_error(y, rope_naive(low.to(at::kDouble), positions, 10000.0)), 3e-3);
}

TEST(Rope, PositionsRestartInPackedRowsAndTakeOffsets) {
  const at::Tensor cu = at::tensor({0, 3, 3, 5}, at::kInt), offset = at::tensor({10, 20, 30}, at::kInt);
  EXPECT_TRUE(at::equal(sequence_positions(1, 5, cu), at::tensor({0, 1, 2, 0, 1}, at::kInt).unsqueeze(0)));
  EXPECT_TRUE(at::equal(sequence_positions(1, 5, cu, offset), at::tensor({10, 11, 12, 30, 31}, at::kInt).unsqueeze(0)));
  const at::Tensor rows = sequence_positions(2, 3, {}, at::tensor({7, 0}, at::kInt));
  EXPECT_TRUE(at::equal(rows, at::tensor({7, 8, 9, 0, 1, 2}, at::kInt).view({2, 3})));
}

TEST(Rope, BadInputIsOneLine) {
  const at::Tensor x = at::randn({1, 2, 1, 8}), p = at::zeros({1, 2}, at::kInt);
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  for (const std::string& m : {message([&] { rope(x, p.to(at::kLong), 1e4); }), message([&] {
                                 rope(x, at::zeros({2, 2}, at::kInt), 1e4);
                               }),
                               message([&] { rope(x, p, 1e4, 7); }), message([&] { rope(x, p, 1e4, 10); }),
                               message([&] { rope(x, p, 0.0); }), message([&] { rope(x, p - 1, 1e4); }),
                               message([&] { rope(x[0], p, 1e4); }), message([&] { rope(x.to(at::kHalf), p, 1e4); })}) {
    EXPECT_NE(m.find("rope: "), std::string::npos) << m;
    EXPECT_EQ(m.find('\n'), std::string::npos) << m;
  }
  EXPECT_NE(message([&] {
              sequence_positions(1, 5, at::tensor({0, 4}, at::kInt));
            }).find("cu_seqlens"),
            std::string::npos);
}

}  // namespace
}  // namespace oryx::ops
