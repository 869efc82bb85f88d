#include "oryx/model/derived.h"

#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "oryx/model/test_support.h"

namespace oryx {
namespace {

TEST(Derived, IsMadeOnceAndAnewWhenAParameterWasWritten) {
  const at::NoGradGuard no_grad;
  LanguageModel model(test::small({{"mamba2"}}));
  model.initialize(1);
  int made = 0;
  const auto norm = [&](int kind) {
    return model.derived<at::Tensor>(kind, [&] {
      ++made;
      return model.parameter("final_norm.weight") * 2;
    });
  };
  const auto first = norm(0);
  EXPECT_EQ(norm(0), first);
  EXPECT_EQ(made, 1);
  EXPECT_NE(norm(1), first);
  EXPECT_EQ(made, 2);
  model.parameter("layers.0.norm1.weight").add_(1);
  EXPECT_NE(norm(0), first);
  EXPECT_EQ(made, 3);
  EXPECT_TRUE(at::equal(*first, *norm(0)));  // who holds the old one goes on with it
  model.initialize(2);
  (void)norm(0);
  EXPECT_EQ(made, 4);
  EXPECT_EQ(norm(0), norm(0));
}

}  // namespace
}  // namespace oryx
