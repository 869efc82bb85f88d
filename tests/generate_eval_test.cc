// `oryx generate` and `oryx eval` as a user runs them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "oryx/common/file.h"
#include "oryx/common/json.h"
#include "oryx/data/synthetic.h"
#include "oryx/data/test_support.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/checkpoint.h"
#include "tests/support/paths.h"
#include "tests/support/program.h"

namespace oryx::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// A random model of bytes in RUN/model, as a training run leaves it, and a folder of text.
class GenerateEval : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder;
    ModelConfig c = preset("tiny");
    c.vocab_size = make_byte_tokenizer()->vocab_size() + 3;  // padded beyond the tokeniser
    LanguageModel m(c);
    m.initialize(1);
    save_model(m, model());
    make_folders(text());
    write_file(text() / "a.txt", "The first file.\nIt has two lines.\n");
    write_file(text() / "b.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two more words\"}\n");
  }
  static void TearDownTestSuite() {
    delete folder_;
    folder_ = nullptr;
  }
  static std::filesystem::path run_folder() { return *folder_ / "run"; }
  static std::filesystem::path model() { return run_folder() / "model"; }
  static std::filesystem::path text() { return *folder_ / "text"; }
  static std::filesystem::path file(const std::string& name) { return *folder_ / name; }

  static std::vector<std::string> command(std::vector<std::string> head, const std::vector<std::string>& more) {
    head.insert(head.end(), {"--tokenizer", "byte", "--threads", "1"});
    head.insert(head.end(), more.begin(), more.end());
    return head;
  }
  static ProgramResult generate(const std::vector<std::string>& more, const ProgramOptions& options = {}) {
    return run(command({"generate", model().string()}, more), options);
  }
  static ProgramResult eval(const std::string& task, const std::vector<std::string>& more) {
    return run(command({"eval", task, model().string()}, more));
  }

 private:
  static inline TemporaryFolder* folder_ = nullptr;
};

void expect_error(const ProgramResult& r, const std::string& part, int code = 1) {
  EXPECT_EQ(r.exit_code, code);
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, StartsWith("oryx: error: "));
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  EXPECT_THAT(r.err, HasSubstr(part));
}

TEST_F(GenerateEval, StreamsTheTextThatJsonHolds) {
  const std::vector<std::string> options = {"--max-new-tokens", "40", "--temperature", "1.2",
                                            "--top-k",          "50", "--top-p",       "0.95",
                                            "--seed",           "4",  "--schedule",    "attention@prompt,linear@gen"};
  auto with = [&](std::vector<std::string> more) {
    more.insert(more.end(), options.begin(), options.end());
    return more;
  };
  const auto streamed = generate(with({"--prompt", "Hello"}));
  ASSERT_EQ(streamed.exit_code, 0) << streamed.err;
  EXPECT_EQ(streamed.err, "");
  const auto json = generate(with({"--prompt", "Hello", "--json"}));
  ASSERT_EQ(json.exit_code, 0) << json.err;
  const Json j = parse_json(json.out, "output");
  const auto text = j["text"].get<std::string>();
  EXPECT_EQ(streamed.out, text.ends_with('\n') ? text : text + "\n");
  EXPECT_EQ(j["prompt"], "Hello");
  EXPECT_EQ(j["schedule"], "attention@prompt,linear@gen");
  EXPECT_EQ(j["stats"]["prompt_tokens"], 6);  // with bos
  EXPECT_EQ(j["stats"]["state_bytes"]["total"], j["stats"]["predicted_state_bytes"]["total"]);
  const auto new_tokens = j["stats"]["new_tokens"].get<size_t>();
  EXPECT_EQ(j["ids"].size() + (j["stop"] == "eos" ? 1 : 0), new_tokens);
  EXPECT_LE(new_tokens, 40u);

  // The same prompt from standard input, with its line end, and from a file, of a run's folder.
  EXPECT_EQ(generate(options, {.input = "Hello\n"}).out, streamed.out);
  write_file(file("prompt.txt"), "Hello\n");
  EXPECT_EQ(run(command({"generate", run_folder().string()}, with({"--prompt-file", file("prompt.txt").string()}))).out,
            streamed.out);
}

TEST_F(GenerateEval, GenerateStatsGoToStandardError) {
  const auto r = generate({"--prompt", "abc", "--max-new-tokens", "3", "--stats", "--precision", "bfloat16"});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  for (const char* word : {"prompt", "tokens/s", "ms a token", "attention", "keys and values", "predicted"})
    EXPECT_THAT(r.err, HasSubstr(word));
}

TEST_F(GenerateEval, InterruptEndsTheTextCleanly) {
  // Waits for the first token, which is flushed as it comes.
  const auto r = run_command(
      {"bash", "-c",
       "\"$0\" generate \"$1\" --tokenizer byte --threads 1 --prompt a --temperature 1 --max-new-tokens 100000 > "
       "\"$2\" & "
       "while [ ! -s \"$2\" ]; do sleep 0.02; done; kill -INT $!; wait $!; echo \"code $?\"; tail -c 1 \"$2\" | wc -l",
       test::program_path(), model().string(), file("out.txt").string()});
  EXPECT_EQ(r.out, "code 130\n1\n");
  EXPECT_THAT(r.err, StartsWith("oryx: error: interrupted after "));
}

TEST_F(GenerateEval, GenerateBadInput) {
  expect_error(generate({"--prompt", "a", "--temperature", "-1"}), "temperature is -1, expected");
  expect_error(generate({"--prompt", "a", "--top-p", "0"}), "top_p is 0, expected");
  expect_error(generate({"--prompt", "a", "--max-new-tokens", "0"}), "max_new_tokens is 0");
  expect_error(generate({"--prompt", "a", "--max-new-tokens", "2000000000"}), "of memory are free");
  expect_error(generate({"--prompt", "a", "--schedule", "atention"}), "Did you mean 'attention'?");
  expect_error(generate({"--prompt", "\xff"}), "UTF-8");
  expect_error(generate({"--prompt", "a", "--prompt-file", "b"}), "--prompt");
  expect_error(generate({"--prompt-file", "/nowhere/prompt"}), "/nowhere/prompt");
  expect_error(generate({"--prompt", "a", "--precision", "int8"}), "--precision");
  expect_error(run({"generate", model().string(), "--prompt", "a"}), "has no tokeniser");
  expect_error(run({"generate", "/nowhere", "--prompt", "a"}), "/nowhere");
  expect_error(run({"generate", text().string(), "--prompt", "a", "--tokenizer", "byte"}), "config.json");
  expect_error(run({"generate"}), "MODEL is required");
}

TEST_F(GenerateEval, PerplexityOfAFolderOfText) {
  const std::string json = file("perplexity.json").string();
  const auto r =
      eval("perplexity", {"--data", text().string(), "--seq-len", "16", "--batch-tokens", "64", "--json", json});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("bits/byte"));
  const Json j = parse_json(read_file(json), json);
  EXPECT_EQ(j["options"]["seq_len"], 16);
  ASSERT_EQ(j["rows"].size(), 7u);  // two modes, four shares, the last tenth
  EXPECT_EQ(j["rows"][0]["attention_share"], 0.0);
  EXPECT_EQ(j["rows"][1]["attention_share"], 1.0);
  for (const auto& row : j["rows"]) {
    EXPECT_EQ(row["text_bytes"], 34 + 3 + 14);
    EXPECT_EQ(row["targets"], 34 + 3 + 14 + 3);             // three eos
    EXPECT_NEAR(row["perplexity"].get<double>(), 260, 80);  // a random model
    EXPECT_NEAR(row["bits_per_byte"].get<double>(), row["nats"].get<double>() * 54 / 51 / std::log(2.0), 1e-9);
  }
  const auto two = eval("perplexity", {"--data", text().string(), "--schedule", "attention", "--schedule",
                                       "linear,attention@50%:", "--max-tokens", "20"});
  ASSERT_EQ(two.exit_code, 0) << two.err;
  EXPECT_EQ(std::count(two.out.begin(), two.out.end(), '\n'), 3);
}

TEST_F(GenerateEval, RecallAndNeedle) {
  const std::string json = file("recall.json").string();
  const auto recall = eval("recall", {"--pairs", "2,4", "--lengths", "0,40", "--examples", "4", "--json", json});
  ASSERT_EQ(recall.exit_code, 0) << recall.err;
  const Json j = parse_json(read_file(json), json);
  ASSERT_EQ(j["rows"].size(), 3u * 2 * 2);  // linear, attention, queries
  EXPECT_EQ(j["rows"].back()["schedule"], "queries");
  EXPECT_NEAR(j["rows"].back()["attention_share"].get<double>(), 0.1, 1e-12);
  const auto needle =
      eval("needle", {"--lengths", "[300]", "--depths", "0.5", "--examples", "1", "--schedule", "question"});
  ASSERT_EQ(needle.exit_code, 0) << needle.err;
  EXPECT_THAT(needle.out, HasSubstr("question"));
}

TEST_F(GenerateEval, EvalHelpListsTheTasks) {
  const auto r = run({"eval", "--help"});
  EXPECT_EQ(r.exit_code, 0);
  for (const char* word : {"perplexity", "recall", "needle", "haystack"}) EXPECT_THAT(r.out, HasSubstr(word));
  EXPECT_THAT(run({"eval", "recall", "--help"}).out, HasSubstr("--key-symbols"));
}

TEST_F(GenerateEval, EvalBadInput) {
  expect_error(run({"eval"}), "expected one of: needle, perplexity, recall");
  expect_error(run({"eval", "perplexty"}), "Did you mean 'perplexity'?");
  expect_error(eval("perplexity", {}), "--data is missing");
  expect_error(eval("perplexity", {"--data", "/nowhere"}), "/nowhere");
  expect_error(eval("perplexity", {"--data", text().string(), "--seq-len", "0"}), "seq_len is 0, expected");
  expect_error(eval("perplexity", {"--data", text().string(), "--seq-len", "many"}), "seq_len");
  expect_error(eval("perplexity", {"--data", text().string(), "--schedule", "atention"}), "Did you mean 'attention'?");
  expect_error(eval("perplexity", {"--data", text().string(), "--json", "/nowhere/x.json"}), "/nowhere");
  expect_error(eval("recall", {"--pairs", "100"}), "100 pairs need as many keys");
  expect_error(eval("recall", {"--key-symbols", "5000", "--examples", "1"}), "vocabulary");
  expect_error(eval("recall", {"--exampels", "4"}), "Did you mean '--examples'?");
  expect_error(eval("needle", {"--kind", "essay_nunber"}), "Did you mean 'essay_number'?");
  expect_error(eval("needle", {"--kind", "essay_word"}), "needs --hay");
  expect_error(eval("needle", {"--lengths", "20"}), "too short");
  expect_error(run({"eval", "needle", model().string()}), "has no tokeniser");
  write_file(file("junk.tok"), "no token file");
  expect_error(eval("perplexity", {"--data", file("junk.tok").string()}), "junk.tok");
}

}  // namespace
}  // namespace oryx::test
