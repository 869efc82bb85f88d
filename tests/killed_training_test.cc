// SIGKILL at random moments of training: the short form of tools/kill_test.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

TEST(Kill, ATrainingRunResumesBitForBit) {
  const auto r = run_command({"python3", test::source_path("tools/kill_test.py"), "--program", test::program_path(),
                              "--kills", "5", "--steps", "12"},
                             {.env = {{"OMP_NUM_THREADS", "1"}}});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, ::testing::HasSubstr("5 kills"));
}

}  // namespace
}  // namespace oryx::test
