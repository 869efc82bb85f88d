#include "oryx/common/interrupt.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>

namespace oryx {
namespace {

using ::testing::ExitedWithCode;

TEST(InterruptDeathTest, WorkThatCannotAskEndsAtOnceWithOneLine) {
  for (const int signal : {SIGINT, SIGTERM}) {
    EXPECT_EXIT(
        {
          catch_interrupts();
          const InterruptsEndAtOnce scope;
          std::raise(signal);
          std::exit(0);
        },
        ExitedWithCode(130), "^oryx: error: interrupted\n$");
  }
}

TEST(InterruptDeathTest, BehindItSignalsAreAskedForAgain) {
  EXPECT_EXIT(
      {
        catch_interrupts();
        { const InterruptsEndAtOnce scope; }
        std::raise(SIGINT);
        std::exit(interrupted() ? 7 : 0);
      },
      ExitedWithCode(7), "");
}

}  // namespace
}  // namespace oryx
