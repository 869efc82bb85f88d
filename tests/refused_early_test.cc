// What is wrong with a command is said before its work, not after it: these commands would otherwise train, measure or allocate first.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/file.h"
#include "oryx/data/test_support.h"
#include "oryx/model/checkpoint.h"
#include "oryx/model/language_model.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class RefusedEarly : public ::testing::Test {
 protected:
  void SetUp() override {
    make_folders(folder_ / "results");
    ModelConfig c = preset("tiny");
    c.vocab_size = 320;
    c.num_layers = 1;
    LanguageModel model(c);
    model.initialize(0);
    save_model(model, folder_ / "model");
  }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  void expect_line(const std::vector<std::string>& args, const std::string& message, const ProgramOptions& options = {}) {
    const auto r = run(args, options);
    EXPECT_EQ(r.exit_code, 1) << args[0];
    EXPECT_EQ(r.out, "");
    EXPECT_THAT(r.err, StartsWith("oryx: error: "));
    EXPECT_THAT(r.err, HasSubstr(message));
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  }
  TemporaryFolder folder_;
};

TEST_F(RefusedEarly, AResultThatCannotBeWritten) {
  expect_line({"demo", "--only", "recall", "--out", path("demo"), "--json", path("results")}, "results: is a folder, expected a file name");
  expect_line({"bench", "attention", "--json", path("results")}, "results: is a folder");
  expect_line({"bench", "attention", "--charts", path("none/a")}, "there is no folder");
  expect_line({"eval", "recall", path("model"), "--json", path("results")}, "results: is a folder");
  expect_line({"eval", "recall", path("model"), "--json", "/dev/stdout"}, "/dev/stdout: ");
  write_file(folder_ / "text.txt", "text");
  expect_line({"tokenizer", "train", path("text.txt"), "--out", path("results")}, "results: is a folder");
}

TEST_F(RefusedEarly, TheDemosSecondPart) {
  expect_line({"demo", "--out", path("demo"), "--text", path("none")}, "none: no such file or folder");
  make_folders(folder_ / "mine/text");
  write_file(folder_ / "mine/text/a.txt", "mine");
  expect_line({"demo", "--out", path("mine"), "--text", path("mine/text")}, "mine/text: exists and was not made by the demo");
  expect_line({"demo", "--out", path("demo"), "--text", path("mine/text"), "--text-seconds", "nan"}, "training time of the text part is nan s");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "demo"));
}

TEST_F(RefusedEarly, AStepBeyondABatch) { expect_line({"bench", "step", "tiny", "--batch", "1073741824", "--seq", "1073741824"}, "is more tokens than a batch can hold"); }
TEST_F(RefusedEarly, APassBeyondTheMemory) { expect_line({"bench", "forward", "1.4b", "--lengths", "1024,1000000000"}, "a pass over 1000000000 tokens needs about"); }

TEST_F(RefusedEarly, APromptThatIsNoText) {
  const std::vector<std::string> generate = {"generate", path("model"), "--tokenizer", "byte"};
  const auto with = [&](std::initializer_list<std::string> more) {
    auto all = generate;
    all.insert(all.end(), more);
    return all;
  };
  write_file(folder_ / "prompt", "ab\xff");
  expect_line(with({"--prompt-file", path("prompt")}), "prompt: byte 2 (0xff) is not UTF-8");
  expect_line(with({"--prompt", "\xfe"}), "--prompt: byte 0 (0xfe) is not UTF-8");
  expect_line(generate, "standard input: byte 1 (0xff) is not UTF-8", {.input = "a\xff"});
  expect_line({"generate", path("results"), "--prompt", "a"}, "results: holds no config.json; expected a model's folder, or a training run");
}

}  // namespace
}  // namespace oryx::test
