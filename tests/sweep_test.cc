// `oryx sweep` as a user runs it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/file.h"
#include "oryx/common/json.h"
#include "oryx/common/options.h"
#include "tests/support/byte_model.h"
#include "tests/support/folder.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

void expect_sweep_error(const ProgramResult& r, const std::string& part) {
  EXPECT_EQ(r.exit_code, 1);
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, StartsWith("oryx: error: "));
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  EXPECT_THAT(r.err, HasSubstr(part));
}

TEST(SweepProgram, MakesTablesAndPictures) {
  const TemporaryFolder folder;
  std::vector<std::string> models;
  for (const uint64_t seed : {1, 2}) {
    const auto path = folder.path() / fmt::format("seed{}", seed);
    save_byte_model(path, seed);
    models.push_back(path.string());
  }
  const auto sweep = [&](const std::string& task, const std::vector<std::string>& more) {
    std::vector<std::string> command{"sweep", task, models[0], models[1], "--tokenizer", "byte", "--threads", "1", "--out", (folder.path() / task).string()};
    command.insert(command.end(), more.begin(), more.end());
    return run(command);
  };
  const auto needle = sweep("needle", {"--option", "lengths=240", "--option", "depths=0.5", "--option", "examples=1", "--setting", "shares=0.25", "--setting", "rows=32"});
  ASSERT_EQ(needle.exit_code, 0) << needle.err;
  for (const char* text : {"surprising and question", "last rows (bounded)", "rows that change the state most", "report.html"}) EXPECT_THAT(needle.out, HasSubstr(text));
  for (const char* name : {"report.html", "share.svg", "kv.svg"}) EXPECT_GT(read_file(folder.path() / "needle" / name).size(), 1000u) << name;
  const Json json = read_json_file(folder.path() / "needle" / "sweep.json");
  EXPECT_EQ(json["models"].size(), 2u);
  EXPECT_EQ(json["measure"], "accuracy");

  // A text's perplexity under switch points that nobody chose; there is no --kv to sweep.
  write_file(folder.path() / "text.txt", "Twelve words of text are enough to see that this does run.");
  const std::string data = "data=" + (folder.path() / "text.txt").string();
  const auto perplexity = sweep("perplexity", {"--option", data, "--set", "switches", "--setting", "parts=false", "--setting", "chunks=1,8", "--setting", "draws=1"});
  ASSERT_EQ(perplexity.exit_code, 0) << perplexity.err;
  EXPECT_THAT(perplexity.out, HasSubstr("a switch at every token"));
  EXPECT_EQ(read_json_file(folder.path() / "perplexity" / "sweep.json")["measure"], "perplexity");
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "perplexity" / "kv.svg"));

  expect_sweep_error(sweep("needle", {"--set", "shares"}), "unknown set 'shares', known: share, kv, switches");
  expect_sweep_error(sweep("needles", {"--set", "kv"}), "unknown task 'needles'");
  expect_sweep_error(sweep("needle", {"--option", "length=3"}), "length");
  expect_sweep_error(sweep("needle", {"--setting", "rows=4"}), "of which 8 are the window's");
  const auto second = run({"sweep", "needle", models[0], (folder.path() / "none").string(), "--tokenizer", "byte", "--out", (folder.path() / "late").string()});
  expect_sweep_error(second, "none: is no folder");
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "late")) << "refused before the first model is run";
  expect_sweep_error(run({"sweep"}), "wants a task and a model's folder");
  const auto keys = run({"sweep", "--keys"});
  EXPECT_EQ(keys.exit_code, 0);
  EXPECT_THAT(keys.out, HasSubstr("`draws`"));
}

}  // namespace
}  // namespace oryx::test
