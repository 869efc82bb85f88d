// `oryx router` as a user runs it, and the schedules that use it.
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

void expect_router_error(const ProgramResult& r, const std::string& part) {
  EXPECT_EQ(r.exit_code, 1);
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, HasSubstr("oryx: error: "));
  EXPECT_THAT(r.err, HasSubstr(part));
}

TEST(RouterProgram, TrainsShowsEvaluatesAndGenerates) {
  const TemporaryFolder folder;
  const auto model = (folder / "model").string(), other = (folder / "other").string(), text = (folder / "text.txt").string(), out = (folder / "router.safetensors").string();
  save_byte_model(model, 1);
  save_byte_model(other, 2);
  std::string words;
  for (int i = 0; i < 30; ++i) words += fmt::format("Line {} of a text that says little, and says it {} times. ", i, i * 7 % 10);
  write_file(text, words);
  const auto train = [&](std::vector<std::string> more) {
    std::vector<std::string> command{"router", "train", model, "--tokenizer", "byte", "--threads", "1", "tokens=700", "readings=2", "width=4", "epochs=2", "holdout=0.3"};
    command.insert(command.end(), more.begin(), more.end());
    return run(command);
  };
  const auto trained = train({"--data", text, "--seq-len", "100", "--out", out, "flips=5", "--json", (folder / "fit.json").string()});
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  for (const char* part : {"held out:", "correlation", "gains of", "50%", "router: "}) EXPECT_THAT(trained.out, HasSubstr(part));
  EXPECT_EQ(read_json_file(folder / "fit.json")["captured"].size(), 6u);
  const auto show = run({"router", "show", out});
  EXPECT_EQ(show.exit_code, 0) << show.err;
  EXPECT_THAT(show.out, HasSubstr("predicted gain above"));

  // The share is exact in an evaluation, and reported by generation.
  const std::string schedule = "linear,router(attention=0.25;file=" + out + ")";
  const auto evaluated = run({"eval", "perplexity", model, "--tokenizer", "byte", "--data", text, "--seq-len", "100", "--max-tokens", "300", "--schedule", schedule, "--schedule",
                              "linear,oracle(attention=0.25)", "--threads", "1", "--json", (folder / "p.json").string()});
  ASSERT_EQ(evaluated.exit_code, 0) << evaluated.err;
  for (const Json& row : read_json_file(folder / "p.json")["rows"]) EXPECT_NEAR(row["attention_share"].get<double>(), 0.25, 0.005) << row.dump();
  const auto generated = run({"generate", model, "--tokenizer", "byte", "--prompt", "It was so", "--schedule", schedule, "--max-new-tokens", "9", "--stats", "--threads", "1"});
  EXPECT_EQ(generated.exit_code, 0) << generated.err;
  EXPECT_THAT(generated.err, HasSubstr("% of tokens"));
  const auto needle = run({"eval", "needle", model, "--tokenizer", "byte", "--lengths", "240", "--kind", "noise", "--examples", "1", "--depths", "0.5", "--schedule", schedule, "--threads", "1"});
  EXPECT_EQ(needle.exit_code, 0) << needle.err;

  // Left and gone on with it is the text that was never left.
  const std::string session = (folder / "s").string(), routed = "linear,router(attention=0.3;window=16;file=" + out + ")";
  const auto generate = [&](std::vector<std::string> more) {
    std::vector<std::string> command{"generate", model, "--tokenizer", "byte", "--schedule", routed, "--threads", "1", "--temperature", "0.8", "--json"};
    command.insert(command.end(), more.begin(), more.end());
    const auto r = run(command);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    return Json::parse(r.out)["ids"].get<std::vector<int>>();
  };
  const auto whole = generate({"--prompt", "It was so", "--max-new-tokens", "20"});
  auto first = generate({"--prompt", "It was so", "--max-new-tokens", "8", "--save-session", session});
  const auto second = generate({"--prompt", "", "--max-new-tokens", "12", "--session", session});
  first.insert(first.end(), second.begin(), second.end());
  EXPECT_EQ(first, whole);
  ASSERT_EQ(run({"generate", model, "--tokenizer", "byte", "--prompt", "It", "--max-new-tokens", "3", "--threads", "1", "--save-session", session}).exit_code, 0);
  expect_router_error(run({"generate", model, "--tokenizer", "byte", "--prompt", "It", "--schedule", routed, "--threads", "1", "--session", session}), "was saved under a schedule without one");

  // Associative recall instead of text.
  const auto recall = train({"--recall", "pairs=6,queries=3,key_symbols=20,value_symbols=20", "--out", (folder / "r2").string()});
  EXPECT_EQ(recall.exit_code, 0) << recall.err;

  expect_router_error(run({"generate", other, "--tokenizer", "byte", "--prompt", "It was", "--schedule", schedule, "--threads", "1"}), "was trained for the model");
  expect_router_error(run({"eval", "perplexity", other, "--tokenizer", "byte", "--data", text, "--schedule", schedule, "--threads", "1"}), "was trained for the model");
  expect_router_error(run({"generate", model, "--tokenizer", "byte", "--prompt", "It was", "--schedule", "router(attention=0.1;file=" + text + ")", "--threads", "1"}), "text.txt");
  expect_router_error(run({"router", "show", model + "/model.safetensors"}), "its format is 'oryx', expected 'oryx-router 1'");
  expect_router_error(run({"router", "train", model, "--data", text}), "a file to write");
  expect_router_error(run({"router", "train"}), "wants a model's folder");
  expect_router_error(train({"--out", out}), "either --data, text, or --recall");
  expect_router_error(train({"--data", text, "--out", (folder / "nowhere" / "r").string()}), "nowhere");
  expect_router_error(train({"--data", text, "--out", out, "width=0"}), "width");
  expect_router_error(train({"--data", text, "--out", out, "depth=1"}), "depth");
  expect_router_error(train({"--recall", "pairs=90,key_symbols=4", "--out", out}), "keys");
  expect_router_error(train({"--recall", "key_symbols=4000", "--out", out}), "vocabulary");
  write_file(folder / "one.txt", "x");
  expect_router_error(train({"--data", (folder / "one.txt").string(), "--out", (folder / "r3").string()}), "too few texts");
  EXPECT_FALSE(std::filesystem::exists(folder / "r3"));
  const auto keys = run({"router", "train", "--keys"});
  EXPECT_THAT(keys.out, HasSubstr("`readings`"));

  // Ctrl-C: one line, and nothing by halves.
  const auto stopped = run_interrupted({"router", "train", model, "--tokenizer", "byte", "--threads", "1", "--recall", "pairs=30", "--out", (folder / "r4").string(), "tokens=3000000"}, "true", 0.2);
  EXPECT_EQ(stopped.exit_code, 130) << stopped.err;
  EXPECT_THAT(stopped.err, HasSubstr("interrupted"));
  EXPECT_FALSE(std::filesystem::exists(folder / "r4"));
}

}  // namespace
}  // namespace oryx::test
