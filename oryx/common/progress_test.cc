#include "oryx/common/progress.h"

#include <gtest/gtest.h>

namespace oryx {
namespace {

TEST(ProgressBar, FitsIntoARow) {
  const std::string label = "linear,part(attention=question)", bar = " [######......]", text = "  50% 1/2 prompts | found 50%";
  const auto row = [&](size_t width) { return ProgressBar::one_row(label, bar, text, width); };
  EXPECT_EQ(row(0), label + bar + text) << "of no known width";
  EXPECT_EQ(row(76), label + bar + text);
  EXPECT_EQ(row(75), label + text);
  EXPECT_EQ(row(61), label + text);
  EXPECT_EQ(row(60), "linear,part(attention=questi.." + text);
  EXPECT_EQ(row(42), "linear,par.." + text);
  EXPECT_EQ(row(20), "linear,p..  50% 1/2");
  for (size_t width = 1; width < 90; ++width) EXPECT_LT(row(width).size(), width);
  EXPECT_EQ(ProgressBar::one_row("a", bar, text, 12), "a..  50% 1/");
}

}  // namespace
}  // namespace oryx
