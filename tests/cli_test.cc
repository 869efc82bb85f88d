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
// Only of what it is told to: a value that is missing is no missing command.
TEST(Program, HelpInOtherWords) {
  EXPECT_EQ(run({"help"}).out, run({"--help"}).out);
  EXPECT_EQ(run({"help", "tokenizer", "train"}).out, run({"tokenizer", "train", "--help"}).out);
  const auto value = run({"--threads"}), key = run({"train", "--steps", "5"});
  expect_one_line_error(value);
  EXPECT_THAT(value.err, HasSubstr("--threads: 1 required"));
  expect_one_line_error(key);
  EXPECT_THAT(key.err, HasSubstr("unknown option '--steps' of oryx train; a key is written without dashes, steps=VALUE; see oryx train --help"));
}

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

// Also where the disk is full in the middle of the output, and the buffer's rest meets it again at the end.
TEST(Program, FullDiskIsOneErrorInTheMiddleToo) {
  const auto r = run({"inspect", "1.4b", "--json", "--context", "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24"}, {.stdout_path = "/dev/full"});
  expect_one_line_error(r);
  const auto streamed = run({"selftest", "--quick", "--only", "rope"}, {.stdout_path = "/dev/full"});
  expect_one_line_error(streamed);
}

TEST(Program, ClosedPipeEndsQuietly) {
  // A pipe whose reader is gone before the program begins.
  const auto r = run_command({"bash", "-c", "exec 3> >(exec 0<&-); wait $!; \"$0\" --help >&3; echo \"code $?\" >&2", test::program_path()});
  EXPECT_EQ(r.err, "code 141\n");
}

}  // namespace
}  // namespace oryx::test
