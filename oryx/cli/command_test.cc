// How commands are found and what becomes of what they throw; the commands here exist only in this test.
#include "oryx/cli/command.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <new>
#include <sstream>
#include <system_error>

#include "oryx/common/error.h"

namespace oryx::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::EndsWith;
using ::testing::StartsWith;

struct ThrowOptions {
  std::string what;
};

void throw_it(const std::string& what) {
  if (what == "error") fail("file.json: found {},\nexpected {}", 1, 2);
  if (what == "interrupted") throw Interrupted("interrupted");
  if (what == "bad_alloc") throw std::bad_alloc();
  if (what == "torch") TORCH_CHECK(false, "shapes differ\nsecond line");
  if (what == "torch_memory") at::empty({int64_t{1} << 60}, at::kByte);
  if (what == "logic") throw std::logic_error("first\nsecond");
  if (what == "system") throw std::system_error(ENOSPC, std::generic_category(), "folder/file");
  if (what == "pipe") throw OutputClosed{};
  if (what == "int") throw 3;
  print("nothing thrown: {} threads\n", at::get_num_threads());
}

ORYX_COMMAND(zthrow, "throw something", [](CLI::App& app) {
  auto o = std::make_shared<ThrowOptions>();
  app.add_option("what", o->what, "what to throw")->required();
  app.callback([o] { throw_it(o->what); });
});

ORYX_COMMAND(group, "a command with commands", [](CLI::App& app) {
  app.require_subcommand(1);
  auto n = std::make_shared<int>(0);
  CLI::App* train = app.add_subcommand("train", "train it");
  train->add_option("--size", *n, "the size")->required();
  train->callback([n] { print("size {}\n", *n); });
  auto big = std::make_shared<int64_t>(0);
  CLI::App* count = app.add_subcommand("count", "count it");
  count->add_option("--n", *big, "how many")->check(integer(0));
  count->callback([big] { print("n {}\n", *big); });
  app.add_subcommand("show", "show it")->callback([] { print("shown\n"); });
});

struct Outcome {
  int code;
  std::string out, err;
};

Outcome run(std::vector<std::string> args) {
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  const int code = run_program(std::move(args));
  std::string out = testing::internal::GetCapturedStdout();
  return {code, std::move(out), testing::internal::GetCapturedStderr()};
}

void expect_error(std::vector<std::string> args, int code, const std::string& line) {
  const Outcome o = run(std::move(args));
  EXPECT_EQ(o.code, code);
  EXPECT_EQ(o.out, "");
  EXPECT_EQ(o.err, "oryx: error: " + line + "\n");
}

// Without what AddressSanitizer says of an allocation that it refuses ("==PID==WARNING: ...").
std::vector<std::string> own_lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with("==")) lines.push_back(line);
  }
  return lines;
}

TEST(Commands, AreSortedByName) {
  const auto all = commands();
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].name, "group");
  EXPECT_EQ(all[1].name, "zthrow");
}

TEST(Commands, ThrownErrorsBecomeOneLine) {
  expect_error({"zthrow", "error"}, 1, "file.json: found 1, expected 2");
  expect_error({"zthrow", "interrupted"}, 130, "interrupted");
  expect_error({"zthrow", "bad_alloc"}, 1, "out of memory");
  expect_error({"zthrow", "torch"}, 2, "internal error: shapes differ");
  expect_error({"zthrow", "logic"}, 2, "internal error: first");
  expect_error({"zthrow", "int"}, 2, "internal error: an exception of unknown type");
  expect_error({"zthrow", "system"}, 1, "folder/file: No space left on device");
}

TEST(Commands, LibtorchOutOfMemory) {
  const Outcome o = run({"zthrow", "torch_memory"});
  EXPECT_EQ(o.code, 1);
  EXPECT_THAT(own_lines(o.err), ElementsAre(AllOf(StartsWith("oryx: error: out of memory: "), EndsWith("TiB were asked for at once; use fewer or shorter inputs, or a smaller model")))) << o.err;
}

TEST(Commands, IntegersThatDoNotFitAreRefused) {
  EXPECT_EQ(run({"group", "count", "--n", "9223372036854775807"}).out, "n 9223372036854775807\n");
  for (const char* n : {"9223372036854775808", "-1", "1e3", "3x"}) {
    expect_error({"group", "count", "--n=" + std::string(n)}, 1, fmt::format("--n: '{}', expected an integer of at least 0 that fits into 64 bits; see oryx group count --help", n));
  }
}

TEST(Commands, ClosedOutputIsQuiet) {
  const Outcome o = run({"zthrow", "pipe"});
  EXPECT_EQ(o.code, 141);
  EXPECT_EQ(o.err, "");
}

TEST(Commands, ThreadsStandBeforeOrBehindTheCommand) {
  const int before = at::get_num_threads();
  EXPECT_EQ(run({"--threads", "3", "zthrow", "nothing"}).out, "nothing thrown: 3 threads\n");
  EXPECT_EQ(run({"zthrow", "nothing", "--threads=2"}).out, "nothing thrown: 2 threads\n");
  EXPECT_EQ(run({"group", "--threads", "1", "show"}).out, "shown\n");
  EXPECT_EQ(at::get_num_threads(), 1);
  at::set_num_threads(before);
}

TEST(Commands, UnknownNamesAreNamedWithTheNearest) {
  expect_error({"gruop"}, 1, "unknown command 'gruop' of oryx. Did you mean 'group'?");
  expect_error({"qqqqqqq"}, 1, "unknown command 'qqqqqqq' of oryx; expected one of: group, zthrow");
  expect_error({"group", "trian", "--size", "3"}, 1, "unknown command 'trian' of oryx group. Did you mean 'train'?");
  expect_error({"group", "train", "--sise", "3"}, 1,
               "unknown option '--sise' of oryx group train. Did you mean '--size'?");
  expect_error({"group", "train", "--sise=3"}, 1,
               "unknown option '--sise' of oryx group train. Did you mean '--size'?");
  expect_error({"group", "train", "--treads", "3"}, 1,
               "unknown option '--treads' of oryx group train. Did you mean '--threads'?");
  expect_error({"group", "show", "extra"}, 1, "unexpected argument 'extra'; see oryx group show --help");
}

TEST(Commands, MissingPartsAreNamed) {
  expect_error({}, 1, "no command given; expected one of: group, zthrow; see oryx --help");
  expect_error({"group"}, 1, "oryx group is given no command; expected one of: train, count, show; see oryx group --help");
  expect_error({"group", "train"}, 1, "--size is required; see oryx group train --help");
  const Outcome o = run({"group", "train", "--size", "many"});
  EXPECT_EQ(o.code, 1);
  EXPECT_THAT(o.err, HasSubstr("--size"));
  EXPECT_THAT(o.err, HasSubstr("many"));
}

TEST(Commands, HelpIsTheInnermostCommands) {
  const Outcome o = run({"group", "train", "--help"});
  EXPECT_EQ(o.code, 0);
  EXPECT_THAT(o.out, HasSubstr("train it"));
  EXPECT_THAT(o.out, HasSubstr("--size"));
  EXPECT_THAT(o.out, HasSubstr("As every command: --threads N"));
  EXPECT_EQ(o.err, "");
}

TEST(Commands, AnArgumentMayBeNamedLikeACommand) {
  EXPECT_EQ(run({"zthrow", "group"}).out.substr(0, 14), "nothing thrown");
}

}  // namespace
}  // namespace oryx::cli
