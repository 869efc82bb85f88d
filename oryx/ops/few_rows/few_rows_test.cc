#include "oryx/ops/few_rows/few_rows.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace oryx::ops {
namespace {

TEST(FewRows, MatchesFloat64AtOddShapes) {
  at::manual_seed(3);
  for (const int64_t M : {1, 2, 3, 5, 16}) {
    for (const int64_t K : {1, 7, 16, 63, 100, 1000}) {
      for (const int64_t N : {1, 3, 4, 101}) {
        const at::Tensor x = at::randn({M, K}), w = at::randn({N, K});
        // Relative to the sum of magnitudes: a sum may cancel.
        const at::Tensor error = (few_rows_product(x, w) - at::linear(x.to(at::kDouble), w.to(at::kDouble))).abs() /
                                 at::linear(x.to(at::kDouble).abs(), w.to(at::kDouble).abs());
        EXPECT_LE(error.max().item<double>(), 1e-6) << M << " " << K << " " << N;
      }
    }
  }
}

TEST(FewRows, ARowDoesNotDependOnTheOthersNorOnThreads) {
  at::manual_seed(4);
  const int threads = at::get_num_threads();
  for (const int64_t K : {48, 100, 777}) {
    const at::Tensor x = at::randn({kFewRows, K}), w = at::randn({777, K + 5}).narrow(1, 2, K);
    const at::Tensor all = few_rows_product(x, w);
    for (int64_t M = 1; M <= kFewRows; ++M) {
      at::set_num_threads(M % 2 == 0 ? 1 : 2);
      EXPECT_TRUE(at::equal(few_rows_product(x.narrow(0, kFewRows - M, M), w), all.narrow(0, kFewRows - M, M)))
          << M << " of " << K;
    }
  }
  at::set_num_threads(threads);
}

// The widths are those at which vectors of 8 and of 16 values leave something over.
TEST(FewRows, ElementwiseFunctionsOfRowsApart) {
  at::manual_seed(5);
  const at::Tensor zero = at::zeros({});
  for (const int64_t n : {1, 3, 4, 8, 12, 20, 33, 100}) {
    const at::Tensor x = at::randn({kFewRows, 1, n}) * 4;
    for (int64_t M = 2; M <= kFewRows; ++M) {
      const at::Tensor some = x.narrow(0, 0, M), apart = rows_apart(some);
      EXPECT_TRUE(at::equal(apart, some));
      const at::Tensor sigmoid = apart.sigmoid(), softplus = at::logaddexp(apart, zero);
      for (int64_t i = 0; i < M; ++i) {
        EXPECT_TRUE(at::equal(sigmoid[i], x[i].sigmoid())) << n << ", row " << i << " of " << M;
        EXPECT_TRUE(at::equal(softplus[i], at::logaddexp(x[i], zero))) << n << ", row " << i << " of " << M;
      }
    }
  }
}

TEST(FewRows, SuitsFloat32WithoutGradients) {
  const at::Tensor w = at::ones({3, 4});
  EXPECT_TRUE(few_rows_suit(at::ones({2, 8, 4}), w));
  EXPECT_FALSE(few_rows_suit(at::ones({17, 4}), w));
  EXPECT_FALSE(few_rows_suit(at::ones({1, 4}, at::kBFloat16), w));
  EXPECT_FALSE(few_rows_suit(at::ones({1, 4}), at::ones({3, 4}).requires_grad_()));
  EXPECT_EQ(few_rows_product(at::ones({2, 1, 4}), w).sizes(), (std::vector<int64_t>{2, 1, 3}));
  EXPECT_THROW(few_rows_product(at::ones({2, 3}), w), c10::Error);
}

}  // namespace
}  // namespace oryx::ops
