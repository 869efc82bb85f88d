// The program's conventions: exit codes, one-line errors, where output goes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::StartsWith;

void expect_one_line_error(const ProgramResult& r, int code = 1) {
  EXPECT_EQ(r.exit_code, code);
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, StartsWith("oryx: error: "));
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  EXPECT_EQ(r.err.back(), '\n');
}

TEST(Program, Version) {
  const auto r = run({"--version"});
  EXPECT_EQ(r.exit_code, 0);
  EXPECT_THAT(r.out, MatchesRegex("oryx [0-9]+\\.[0-9]+\\.[0-9]+ \\(libtorch 2\\..*\\)\n"));
  EXPECT_EQ(r.err, "");
}

TEST(Program, HelpGoesToStandardOutput) {
  const auto r = run({"--help"});
  EXPECT_EQ(r.exit_code, 0);
  EXPECT_THAT(r.out, HasSubstr("--threads N"));
  EXPECT_EQ(r.err, "");
}

TEST(Program, NoCommandIsAnError) {
  const auto r = run({});
  expect_one_line_error(r);
  EXPECT_THAT(r.err, HasSubstr("no command given"));
}

TEST(Program, UnknownOptionNamesTheNearest) {
  const auto r = run({"--verison"});
  expect_one_line_error(r);
  EXPECT_THAT(r.err, HasSubstr("unknown option '--verison' of oryx. Did you mean '--version'?"));
}

TEST(Program, UnknownOptionWithNothingNear) {
  const auto r = run({"--frobnicate=3"});
  expect_one_line_error(r);
  EXPECT_THAT(r.err, HasSubstr("unknown option '--frobnicate' of oryx; see oryx --help"));
}

TEST(Program, UnknownCommand) {
  const auto r = run({"frobnicate"});
  expect_one_line_error(r);
  EXPECT_THAT(r.err, HasSubstr("'frobnicate'"));
}

TEST(Program, ThreadsMustBeAPositiveNumber) {
  for (const char* bad : {"0", "-1", "two", "1.5", "99999999999"}) {
    const auto r = run({"--threads", bad, "inspect", "--list"});
    expect_one_line_error(r);
    EXPECT_THAT(r.err, HasSubstr("--threads")) << bad;
  }
}

// A command that leaves nothing by halves ends at once, here in the middle of reading its input.
TEST(Program, CtrlCIsOneLine) {
  const auto r = run_command({"bash", "-c",
                              "d=$(mktemp -d); mkfifo $d/pipe; \"$0\" tokenizer encode byte < $d/pipe & exec 3> $d/pipe; rm -r $d; "
                              "while kill -0 $! && ! grep -q '^SigCgt:.*[2367abef]$' /proc/$!/status; do sleep 0.005; done; kill -INT $!; wait $!",
                              program_path()});
  expect_one_line_error(r, 130);
  EXPECT_EQ(r.err, "oryx: error: interrupted\n");
}

TEST(Program, FullDiskIsAnError) {
  const auto r = run({"--help"}, {.stdout_path = "/dev/full"});
  expect_one_line_error(r);
  EXPECT_THAT(r.err, HasSubstr("standard output: cannot write: No space left on device"));
}

TEST(Program, ClosedPipeEndsQuietly) {
  // A pipe whose reader is gone before the program begins.
  const auto r = run_command({"bash", "-c", "exec 3> >(exec 0<&-); wait $!; \"$0\" --help >&3; echo \"code $?\" >&2", test::program_path()});
  EXPECT_EQ(r.err, "code 141\n");
}

}  // namespace
}  // namespace oryx::test
