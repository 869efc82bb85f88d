// `oryx import` and `oryx export` as a user runs them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/file.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/checkpoint.h"
#include "tests/support/folder.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// A random Llama of bytes in FOLDER/own.
void save_transformer(const std::filesystem::path& folder) {
  ModelConfig c = preset("tiny-transformer");
  c.vocab_size = make_byte_tokenizer()->vocab_size() + 3;
  LanguageModel m(c);
  m.initialize(1);
  save_model(m, folder);
}

TEST(ImportExport, CtrlCLeavesNothing) {
  const TemporaryFolder folder;
  ModelConfig c = preset("tiny-transformer");
  c.vocab_size = 200000;  // 100 MB
  save_model(LanguageModel(c), folder / "own");
  const ProgramResult r = run_interrupted({"export", (folder / "own").string(), "--out", (folder / "hf").string()},
                                          fmt::format("[ -e {}/.hf.partial-$! ]", folder.path().string()));
  EXPECT_EQ(r.exit_code, 130);
  EXPECT_EQ(r.err, "oryx: error: interrupted\n");
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) EXPECT_EQ(entry.path().filename(), "own");
}

TEST(ImportExport, AnImportedModelIsInspectedEvaluatedAndGenerates) {
  const TemporaryFolder folder;
  save_transformer(folder / "own");
  const auto path = [&](const std::string& name) { return (folder / name).string(); };
  ProgramResult r = run({"export", path("own"), "--out", path("hf")});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("llama of 4 layers"));
  // A tokeniser of a kind that is not read here goes along and stands in the way of nobody who brings another.
  write_file(folder / "hf/tokenizer.json", "{}");
  r = run({"import", path("hf"), "--out", path("model")});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("llama of 4 layers"));
  EXPECT_EQ(read_file(folder / "model/tokenizer.json"), "{}");
  EXPECT_EQ(run({"inspect", path("model")}).exit_code, 0);

  const std::vector<std::string> generate{"--prompt",    "It was", "--max-new-tokens", "8", "--temperature", "0",
                                          "--tokenizer", "byte",   "--threads",        "1"};
  const auto generated = [&](const std::string& model) {
    std::vector<std::string> args{"generate", path(model)};
    args.insert(args.end(), generate.begin(), generate.end());
    const ProgramResult g = run(args);
    EXPECT_EQ(g.exit_code, 0) << g.err;
    return g.out;
  };
  EXPECT_EQ(generated("model"), generated("own"));
  make_folders(folder / "text");
  write_file(folder / "text/a.txt", "Some text to be scored.\n");
  const auto scored = [&](const std::string& model) {
    const ProgramResult e = run({"eval", "perplexity", path(model), "--data", path("text"), "--tokenizer", "byte", "--threads", "1"});
    EXPECT_EQ(e.exit_code, 0) << e.err;
    return e.out;
  };
  EXPECT_EQ(scored("model"), scored("own"));
  r = run({"generate", path("model"), "--prompt", "It was"});
  EXPECT_EQ(r.exit_code, 1);
  EXPECT_THAT(r.err, HasSubstr("model/tokenizer.json: not a tokenizer.json"));
}

TEST(ImportExport, MistakesAreOneLine) {
  const TemporaryFolder folder;
  const auto path = [&](const std::string& name) { return (folder / name).string(); };
  const auto expect_error = [](const ProgramResult& r, const std::string& part) {
    EXPECT_EQ(r.exit_code, 1);
    EXPECT_THAT(r.err, StartsWith("oryx: error: "));
    EXPECT_THAT(r.err, HasSubstr(part));
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  };
  expect_error(run({"import", path("none"), "--out", path("out")}), "is no folder");
  make_folders(folder / "empty");
  expect_error(run({"import", path("empty"), "--out", path("out")}), "config.json");
  write_file(folder / "empty/config.json", "[1, 2]");
  expect_error(run({"import", path("empty"), "--out", path("out")}), "expected an object");
  write_file(folder / "empty/config.json", R"({"model_type": "lama"})");
  expect_error(run({"import", path("empty"), "--out", path("out")}), "Did you mean 'llama'?");
  save_transformer(folder / "own");
  ASSERT_EQ(run({"export", path("own"), "--out", path("hf")}).exit_code, 0);
  expect_error(run({"export", path("own"), "--out", path("hf")}), "is there already");
  std::filesystem::remove(folder / "hf/model.safetensors");
  expect_error(run({"import", path("hf"), "--out", path("out")}), "holds none of model.safetensors and model.safetensors.index.json");
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
}

}  // namespace
}  // namespace oryx::test
