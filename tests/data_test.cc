// oryx tokenizer and oryx data, as a user runs them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>

#include "oryx/common/file.h"
#include "oryx/data/test_support.h"
#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

class DataCommands : public ::testing::Test {
 protected:
  void SetUp() override {
    make_folders(folder_ / "text");
    std::string lines;
    for (int i = 0; i < 60; ++i) {
      lines += nlohmann::json{{"text", fmt::format("Document {} says that the state of the mixer is {}.\n\n    größe",
                                                   i, i * i)}}
                   .dump() +
               "\n";
    }
    write_file(folder_ / "text/a.jsonl", lines);
  }
  std::string path(const char* name) const { return (folder_ / name).string(); }
  void expect_error(const std::vector<std::string>& args, const std::string& message) {
    const auto r = run(args);
    EXPECT_EQ(r.exit_code, 1) << args[1];
    EXPECT_EQ(r.out, "");
    EXPECT_THAT(r.err, HasSubstr(message));
    EXPECT_THAT(r.err, StartsWith("oryx: error: "));
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  }
  TemporaryFolder folder_;
};

TEST_F(DataCommands, FromTextToADataSet) {
  const auto trained = run({"tokenizer", "train", path("text"), "--vocab-size", "350", "--out", path("made/t.model")});
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  EXPECT_THAT(trained.out, HasSubstr("350 pieces"));

  const std::string text = "  größe\n\t12 \xE2\x96\x81 日本";
  const auto encoded = run({"tokenizer", "encode", path("made/t.model")}, {.input = text});
  ASSERT_EQ(encoded.exit_code, 0) << encoded.err;
  const auto decoded = run({"tokenizer", "decode", path("made/t.model")}, {.input = encoded.out});
  EXPECT_EQ(decoded.out, text);

  for (const char* compress : {"", "--compress"}) {
    std::vector<std::string> args = {"data",  "build",     path("text"), "--tokenizer", path("made/t.model"),
                                     "--out", path("set"), "--valid",    "0.1",         "--overwrite"};
    if (*compress) args.push_back(compress);
    const auto built = run(args);
    ASSERT_EQ(built.exit_code, 0) << built.err;
    const auto inspected = run({"data", "inspect", path("set/train.tok"), "--json", "--verify"});
    ASSERT_EQ(inspected.exit_code, 0) << inspected.err;
    const auto json = nlohmann::json::parse(inspected.out);
    EXPECT_EQ(json.at("vocab_size"), 350);
    EXPECT_EQ(json.at("encoding"), *compress ? "zstd" : "raw");
    EXPECT_THAT(built.out, HasSubstr(json.at("tokens").dump()));
    EXPECT_EQ(run({"data", "inspect", path("set")}).exit_code, 0);
  }
  expect_error({"data", "build", path("text"), "--tokenizer", "byte", "--out", path("set")},
               "holds a data set already");
}

// A warning names the files that data sets hold out by their name: text alone, not sources that happen to be called so.
TEST_F(DataCommands, HeldOutTextIsKnownByItsName) {
  const std::string text = read_file(folder_ / "text/a.jsonl");
  for (const char* name : {"text/valid-00.jsonl", "text/test.txt", "text/test_support.h", "text/validate.md"}) write_file(folder_ / name, text);
  std::vector<std::string> args = {"data", "build", path("text"), "--tokenizer", "byte", "--out", path("set")};
  for (const char* e : {".txt", ".jsonl", ".h", ".md"}) args.insert(args.end(), {"--extension", e});
  const auto built = run(args);
  ASSERT_EQ(built.exit_code, 0) << built.err;
  EXPECT_THAT(built.err, HasSubstr("valid-00.jsonl: by its name held-out text"));
  EXPECT_THAT(built.err, HasSubstr("test.txt: by its name held-out text"));
  EXPECT_THAT(built.err, Not(HasSubstr("test_support.h")));
  EXPECT_THAT(built.err, Not(HasSubstr("validate.md")));
}

// A Hugging Face tokenizer.json all the way: data set, training, generation from the run's own copy.
TEST_F(DataCommands, ATokenizerJsonFromTextToGeneration) {
  const std::string tokenizer = test::source_path("tests/data/bpe/llama3.json"), text = "  größe\n\t12 don't 日本";
  const auto encoded = run({"tokenizer", "encode", tokenizer}, {.input = text});
  ASSERT_EQ(encoded.exit_code, 0) << encoded.err;
  EXPECT_EQ(run({"tokenizer", "decode", tokenizer}, {.input = encoded.out}).out, text);

  const auto built =
      run({"data", "build", path("text"), "--tokenizer", tokenizer, "--out", path("set"), "--valid", "0.1"});
  ASSERT_EQ(built.exit_code, 0) << built.err;
  EXPECT_TRUE(std::filesystem::exists(folder_ / "set/tokenizer.json"));
  const auto trained = run({"train", "data=" + path("set"), "out=" + path("run"), "steps=2", "warmup_steps=1",
                            "batch_size=1", "seq_len=64", "--threads", "1"});
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  const auto generated =
      run({"generate", path("run"), "--prompt", "The state", "--max-new-tokens", "4", "--threads", "1", "--json"});
  ASSERT_EQ(generated.exit_code, 0) << generated.err;
  EXPECT_EQ(nlohmann::json::parse(generated.out).at("ids").size(), 4u);
}

TEST_F(DataCommands, BadInput) {
  expect_error({"data", "build", path("none"), "--tokenizer", "byte", "--out", path("o")},
               "none: no such file or folder");
  expect_error({"data", "build", path("text"), "--tokenizer", path("none.model"), "--out", path("o")}, "none.model");
  expect_error({"data", "build", path("text"), "--tokenizer", "byte", "--out", path("o"), "--valid", "2"},
               "share of validation 2");
  expect_error({"data", "build", path("text"), "--tokenizer", "byte"}, "--out");
  expect_error({"data", "inspect", path("text/a.jsonl")}, "a.jsonl: not a token file");
  expect_error({"data", "inspect", path("text")}, "not a data set");
  expect_error({"tokenizer", "train", path("text"), "--vocab-size", "5", "--out", path("t.model")},
               "vocabulary size 5");
  expect_error({"tokenizer", "train", path("text"), "--vocab-sise", "5", "--out", path("t.model")}, "--vocab-size");
  expect_error({"tokenizer", "decode", "byte", "999"}, "999");
  expect_error({"tokenizer", "decode", "byte", "x"}, "'x' is not a token id");
  expect_error({"tokenizer", "encode", "byte", "\xFF"}, "not UTF-8");
  write_file(folder_ / "text/b.txt", "\xFF");
  expect_error({"data", "build", path("text"), "--tokenizer", "byte", "--out", path("o")},
               "b.txt: byte 0 (0xff) is not UTF-8");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "o"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "t.model"));
}

// What stands under a name is replaced by a file that is whole: a pipe or a device, /dev/stdout say, must not be.
TEST_F(DataCommands, DevicesAndPipesAreNotReplaced) {
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  const auto r = run({"tokenizer", "train", path("text"), "--vocab-size", "350", "--out", path("pipe")});
  EXPECT_EQ(r.exit_code, 1);
  EXPECT_THAT(r.err, HasSubstr("pipe: is a device or a pipe, expected the name of a file"));
  EXPECT_TRUE(std::filesystem::is_fifo(folder_ / "pipe"));
}

TEST_F(DataCommands, FilesAllowWhatTheUserAllows) {
  const auto r = run_command({"bash", "-c", "umask 027; \"$0\" data build \"$1/text\" --tokenizer byte --out \"$1/set\" > /dev/null 2>&1; stat -c %a \"$1/set\" \"$1/set/train.tok\" \"$1/set/dataset.json\"",
                              program_path(), folder_.path().string()});
  EXPECT_EQ(r.out, "750\n640\n640\n") << r.err;
}

TEST_F(DataCommands, ARunWantsAFolderOfItsOwn) {
  ASSERT_EQ(run({"data", "build", path("text"), "--tokenizer", "byte", "--out", path("set"), "--extension", "jsonl"}).exit_code, 0);
  expect_error({"train", "data=" + path("set"), "out=" + path("set")}, "set: is a data set; choose another folder for the run");
  expect_error({"train", "data=" + path("set"), "out=" + path("run"), "seq_len=100000000"}, "of memory are free");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "run"));
  write_file(folder_ / "file", "text");
  expect_error({"train", "data=" + path("set"), "out=" + path("file")}, "file: is a file, expected a folder");
  expect_error({"train", "--resume", path("set")}, "set: holds no training run");
  make_folders(folder_ / "old");
  write_file(folder_ / "old/config.json", "{}");
  expect_error({"train", "--resume", path("old"), "out=elsewhere"}, "goes on in that folder: leave out=elsewhere out");
  expect_error({"generate", path("old"), "--prompt", "a"}, "old: holds no model.safetensors; expected a model's folder");
  write_file(folder_ / "old/lock", "");  // as a run that was killed before its first checkpoint
  expect_error({"generate", path("old"), "--prompt", "a"}, "old: is a training run that has saved no checkpoint yet; train on with: oryx train --resume");
}

}  // namespace
}  // namespace oryx::test
