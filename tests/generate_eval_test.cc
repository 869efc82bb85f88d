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
#include "tests/support/byte_model.h"
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
    make_endless(m);
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

TEST_F(GenerateEval, ASessionIsSavedAndGoneOnFrom) {
  const std::string session = file("a.session").string();
  const auto first = generate({"--prompt", "Hello", "--max-new-tokens", "6", "--save-session", session, "--kv", "bounded:2+20", "--json"});
  ASSERT_EQ(first.exit_code, 0) << first.err;
  const Json a = parse_json(first.out, "output");
  const int64_t held = 6 + static_cast<int64_t>(a["ids"].size());
  const std::vector<std::string> more = {"--prompt", " again", "--max-new-tokens", "4", "--json"};
  const auto on = [&](std::vector<std::string> options) {
    options.insert(options.end(), more.begin(), more.end());
    return generate(options);
  };
  const auto second = on({"--session", session, "--save-session", session});  // over itself
  ASSERT_EQ(second.exit_code, 0) << second.err;
  const Json b = parse_json(second.out, "output");
  EXPECT_EQ(b["stats"]["held_tokens"], held);
  EXPECT_EQ(b["stats"]["prompt_tokens"], 6);  // without bos
  EXPECT_EQ(b["kv"], "bounded:2+20");
  const auto third = on({"--session", session, "--stats"});
  ASSERT_EQ(third.exit_code, 0) << third.err;
  EXPECT_THAT(third.err, HasSubstr(fmt::format("session    {} tokens, not read again", held + 6 + static_cast<int64_t>(b["ids"].size()))));

  expect_error(on({"--session", file("none").string()}), "none: cannot open");
  expect_error(on({"--session", session, "--kv", "drop"}), "--session excludes --kv");
  expect_error(on({"--session", session, "--precision", "bfloat16"}), "it was saved in Float, this one computes in BFloat16");
  expect_error(on({"--session", session, "--schedule", "linear,surprise(attention=0.1)"}), "wants to know the whole prompt");
  expect_error(on({"--session", (model() / "model.safetensors").string()}), "its format is 'oryx', expected 'oryx-state 1'");
  expect_error(on({"--save-session", file("none/here").string()}), "there is no folder");
  expect_error(on({"--save-session", text().string()}), "is a folder, expected a file name");
  EXPECT_EQ(parse_json(on({"--session", session}).out, "output")["ids"], parse_json(third.out, "output")["ids"]);  // nothing of this touched the session
}

TEST_F(GenerateEval, ADraftedTextIsTheSame) {
  for (const std::vector<std::string>& sampling : {std::vector<std::string>{}, {"--temperature", "1.2", "--top-p", "0.95", "--seed", "4"}}) {
    std::vector<std::string> options = {"--prompt", "Hello", "--schedule", "attention", "--max-new-tokens", "30", "--race"};
    options.insert(options.end(), sampling.begin(), sampling.end());
    const auto alone = generate(options);
    ASSERT_EQ(alone.exit_code, 0) << alone.err;
    options.insert(options.end(), {"--draft", "linear", "--draft-tokens", "5", "--no-draft-adapt", "--stats"});
    const auto drafted = generate(options);
    ASSERT_EQ(drafted.exit_code, 0) << drafted.err;
    EXPECT_EQ(drafted.out, alone.out);
    EXPECT_THAT(drafted.err, HasSubstr("% of those tested accepted"));
  }
  expect_error(generate({"--prompt", "a", "--draft", "linear", "--draft-tokens", "99"}), "99 tokens to draft at once, expected 1 to 15");
  expect_error(generate({"--prompt", "a", "--draft", "atention"}), "Did you mean 'attention'?");
  expect_error(generate({"--prompt", "a", "--draft", ""}), "--draft '': expected a schedule, as linear");
  expect_error(generate({"--prompt", "a", "--draft", "linear", "--kv", "write:budget=6"}), "draft with all rows (--kv keep)");
  EXPECT_NE(generate({"--prompt", "a", "--draft-tokens", "4"}).exit_code, 0);
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
       "\"$0\" generate \"$1\" --tokenizer byte --threads 1 --prompt a --temperature 1 --top-k 3 --max-new-tokens 100000 > "
       "\"$2\" & "
       "while [ ! -s \"$2\" ]; do sleep 0.02; done; kill -INT $!; wait $!; echo \"code $?\"; tail -c 1 \"$2\" | wc -l",
       test::program_path(), model().string(), file("out.txt").string()});
  EXPECT_EQ(r.out, "code 130\n1\n");
  EXPECT_THAT(r.err, StartsWith("oryx: error: interrupted after "));
}

TEST_F(GenerateEval, AReaderThatLeavesIsNoError) {
  const auto r = run_command({"bash", "-c", "\"$0\" generate \"$1\" --tokenizer byte --threads 1 --prompt a --temperature 1 --top-k 3 --max-new-tokens 100000 | head -c 1 > /dev/null; echo ${PIPESTATUS[0]}",
                              test::program_path(), model().string()});
  EXPECT_EQ(r.out, "141\n");
  EXPECT_EQ(r.err, "");
}

TEST_F(GenerateEval, GenerateBadInput) {
  expect_error(generate({"--prompt", "a", "--temperature", "-1"}), "temperature is -1, expected");
  expect_error(generate({"--prompt", "a", "--top-p", "0"}), "top_p is 0, expected");
  expect_error(generate({"--prompt", "a", "--max-new-tokens", "0"}), "max_new_tokens is 0");
  expect_error(generate({"--prompt", "a", "--seed", "99999999999999999999"}), "--seed: '99999999999999999999', expected an integer that fits into 64 bits");
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
  const auto three = eval("needle", {"--lengths", "300", "--depths", "0,1", "--examples", "1", "--schedule", "linear", "--kind", "noise,essay_number,essay_word",
                                     "--hay", text().string(), "--json", json});
  ASSERT_EQ(three.exit_code, 0) << three.err;
  EXPECT_EQ(parse_json(read_file(json), json)["rows"].size(), 3u * 2);
}

// One process, many tasks: each result is a file, what is there is left alone, what fails does not stop the others.
TEST_F(GenerateEval, ASuiteRunsWhatIsMissing) {
  const auto plan = file("plan.json"), out = file("suite");
  write_file(plan, "[{\"name\": \"words\", \"task\": \"recall\", \"options\": {\"pairs\": [2], \"examples\": 2, \"key_symbols\": 100000, \"words\": true}},\n"
                   " {\"name\": \"noise\", \"task\": \"needle\", \"options\": {\"lengths\": [300], \"depths\": [0.5], \"examples\": 1}, \"schedules\": [\"question\"]}]\n");
  const auto first = eval("suite", {"--plan", plan.string(), "--out", out.string()});
  EXPECT_EQ(first.exit_code, 1);
  EXPECT_THAT(first.err, HasSubstr("1 of 2 tasks failed: words"));
  EXPECT_THAT(first.err, HasSubstr("symbols want as many words"));
  const Json j = parse_json(read_file(out / "noise.json"), "noise.json");
  EXPECT_EQ(j["task"], "needle");
  ASSERT_EQ(j["rows"].size(), 1u);
  EXPECT_EQ(j["rows"][0]["schedule"], "question");
  const auto again = eval("suite", {"--plan", plan.string(), "--out", out.string()});
  EXPECT_THAT(again.err, HasSubstr("noise.json: is there"));
  write_file(plan, "[{\"name\": \"a\", \"task\": \"nedle\"}]");
  expect_error(eval("suite", {"--plan", plan.string(), "--out", out.string()}), "Did you mean 'needle'?");
  write_file(plan, "[{\"name\": \"a\", \"task\": \"needle\", \"options\": {\"length\": 3}}]");
  expect_error(eval("suite", {"--plan", plan.string(), "--out", out.string()}), "length");
}

TEST_F(GenerateEval, LanguageModelTasksAndRetrieval) {
  const auto data = file("tasks");
  for (const char* folder : {"piqa", "lambada_openai", "winogrande", "squad", "kv"}) make_folders(data / folder);
  write_file(data / "piqa" / "validation.jsonl",
             "{\"goal\": \"dry boots\", \"sol1\": \"newspaper\", \"sol2\": \"wet sand\", \"label\": 0}\n\n"
             "{\"goal\": \"keep bread\", \"sol1\": \"in the rain\", \"sol2\": \"in a cloth\", \"label\": 1}\n");
  write_file(data / "lambada_openai" / "test.jsonl", "{\"text\": \"the rain came and she ran back for the key\"}");
  write_file(data / "squad" / "xquad_en.jsonl", "{\"context\": \"Ana has a boat.\", \"question\": \"Who has a boat?\", \"answers\": [{\"text\": \"Ana\"}]}\n");
  write_file(data / "kv" / "kv_retrieval_2_keys.jsonl", "{\"ordered_kv_records\": [[\"a\", \"1\"], [\"b\", \"2\"]], \"key\": \"a\", \"value\": \"1\"}\n");
  const std::string json = file("tasks.json").string();
  const auto piqa = eval("piqa", {"--data", data.string(), "--json", json});
  ASSERT_EQ(piqa.exit_code, 0) << piqa.err;
  EXPECT_THAT(piqa.out, HasSubstr("acc_norm"));
  const Json j = parse_json(read_file(json), json);
  ASSERT_EQ(j["rows"].size(), 2u);  // linear, attention
  for (const auto& row : j["rows"]) {
    EXPECT_EQ(row["examples"], 2);
    for (const char* key : {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "attention_share", "flops_per_token", "state_bytes"}) EXPECT_TRUE(row.contains(key)) << key;
  }
  EXPECT_EQ(j["rows"][1]["attention_share"], 1.0);
  const auto lambada = eval("lambada", {"--data", data.string(), "--schedule", "linear"});
  ASSERT_EQ(lambada.exit_code, 0) << lambada.err;
  const auto squad = eval("squad", {"--data", data.string(), "--max-new-tokens", "4", "--kv", "bounded:2+16", "--schedule", "question", "--schedule",
                                    "linear,surprise(attention=0.2),attention@gen", "--json", json});
  ASSERT_EQ(squad.exit_code, 0) << squad.err;
  const Json s = parse_json(read_file(json), json);
  EXPECT_EQ(s["rows"][0]["kv"], "bounded:2+16");
  EXPECT_GT(s["rows"][0]["attention_share"].get<double>(), 0.3);
  // Side by side or one after the other makes no difference.
  write_file(data / "squad" / "xquad_en.jsonl", "{\"context\": \"Ana has a boat.\", \"question\": \"Who has a boat?\", \"answers\": [{\"text\": \"a\"}]}\n"
                                                "{\"context\": \"The red hen has gone up the hill.\", \"question\": \"Where is it?\", \"answers\": [{\"text\": \"e\"}]}\n");
  const auto rows_with = [&](const char* batch) {
    const auto r = eval("squad", {"--data", data.string(), "--max-new-tokens", "8", "--batch-tokens", batch, "--schedule", "question", "--schedule", "linear", "--json", json});
    EXPECT_EQ(r.exit_code, 0) << r.err;
    return parse_json(read_file(json), json)["rows"];
  };
  EXPECT_EQ(rows_with("0"), rows_with("4096"));
  ASSERT_EQ(eval("kv_retrieval", {"--data", data.string(), "--keys", "2", "--max-new-tokens", "2", "--schedule", "linear"}).exit_code, 0);

  expect_error(eval("piqa", {}), "--data is missing");
  expect_error(eval("piqa", {"--data", "/nowhere"}), "/nowhere/piqa: there is no such folder; --data is the folder");
  expect_error(eval("boolq", {"--data", data.string()}), "boolq: there is no such folder");
  expect_error(eval("piqa", {"--data", data.string(), "--split", "test"}), "holds no test.jsonl");
  expect_error(eval("winogrande", {"--data", data.string()}), "holds no validation.jsonl");
  write_file(data / "winogrande" / "validation.jsonl", "{\"sentence\": \"no blank\", \"option1\": \"a\", \"option2\": \"b\", \"answer\": \"1\"}");
  expect_error(eval("winogrande", {"--data", data.string()}), "line 1: 'sentence' has no blank");
  write_file(data / "piqa" / "bad.jsonl", "{\"goal\": 3, \"sol1\": \"a\", \"sol2\": \"b\", \"label\": 0}\n");
  expect_error(eval("piqa", {"--data", data.string(), "--split", "bad"}), "bad.jsonl: line 1: 'goal' is 3, expected a string");
  write_file(data / "piqa" / "bad.jsonl", "{\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"b\", \"label\": 2}\n");
  expect_error(eval("piqa", {"--data", data.string(), "--split", "bad"}), "number 2 of 2 choices");
  write_file(data / "piqa" / "bad.jsonl", "not json\n");
  expect_error(eval("piqa", {"--data", data.string(), "--split", "bad"}), "line 1: not valid JSON");
}

TEST_F(GenerateEval, KeysAndValuesMayBeBoundedOrDropped) {
  const std::vector<std::string> options = {"--prompt", "Some words to read before the rest", "--max-new-tokens", "30", "--schedule", "attention", "--json"};
  auto with = [&](const std::string& kv) {
    auto all = options;
    all.insert(all.end(), {"--kv", kv});
    return generate(all);
  };
  const auto kept = with("keep"), wide = with("bounded:4+1000"), tight = with("bounded:2+8");
  ASSERT_EQ(kept.exit_code, 0) << kept.err;
  ASSERT_EQ(wide.exit_code, 0) << wide.err;
  ASSERT_EQ(tight.exit_code, 0) << tight.err;
  EXPECT_EQ(parse_json(wide.out, "wide")["ids"], parse_json(kept.out, "kept")["ids"]);
  const Json k = parse_json(kept.out, "kept")["stats"], t = parse_json(tight.out, "tight")["stats"];
  EXPECT_EQ(t["state_bytes"]["total"], t["predicted_state_bytes"]["total"]);
  EXPECT_LT(t["state_bytes"]["tokens"].get<int64_t>(), k["state_bytes"]["tokens"].get<int64_t>() / 4);
  expect_error(with("drop"), "keys and values were dropped");
  expect_error(with("bounded:-1+4"), "expected keep, drop or bounded:F+W");
  expect_error(with("bounded:4+0"), "W at least 1");
  const auto linear = generate({"--prompt", "abc", "--max-new-tokens", "4", "--schedule", "attention@prompt,linear@gen", "--kv", "drop", "--json"});
  ASSERT_EQ(linear.exit_code, 0) << linear.err;
  EXPECT_EQ(parse_json(linear.out, "linear")["stats"]["state_bytes"]["tokens"], 0);
  const auto inspect = run({"inspect", "130m", "--context", "1000,100000", "--kv", "bounded:4+1024", "--json"});
  ASSERT_EQ(inspect.exit_code, 0) << inspect.err;
  const Json state = parse_json(inspect.out, "inspect")["state_bytes"];
  EXPECT_LT(state[1]["tokens"].get<double>(), 1.1 * state[0]["tokens"].get<double>());
  expect_error(run({"inspect", "130m", "--kv", "some"}), "keys and values 'some'");
}

TEST_F(GenerateEval, EvalHelpListsTheTasks) {
  const auto r = run({"eval", "--help"});
  EXPECT_EQ(r.exit_code, 0);
  for (const char* word : {"perplexity", "recall", "needle", "haystack", "lambada", "hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "boolq",
                           "winogrande", "squad", "nq", "triviaqa", "kv_retrieval"}) EXPECT_THAT(r.out, HasSubstr(word));
  EXPECT_THAT(run({"eval", "recall", "--help"}).out, HasSubstr("--key-symbols"));
}

TEST_F(GenerateEval, EvalBadInput) {
  expect_error(run({"eval"}), "expected one of: arc_challenge, arc_easy, boolq");
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
  expect_error(eval("needle", {"--lengths", ""}), "needle: no lengths, expected at least one");
  expect_error(eval("recall", {"--pairs", "[]"}), "recall: no pairs, expected at least one");
  expect_error(eval("needle", {"--kv", "bounded:4"}), "expected keep, drop or bounded:F+W");
  expect_error(eval("needle", {"--schedule", "part(attention=answer)", "--examples", "1"}), "known: needle, question");
  expect_error(eval("perplexity", {"--data", text().string(), "--schedule", "part(attention=question)"}), "not known here; known: none");
  expect_error(run({"eval", "needle", model().string()}), "has no tokeniser");
  write_file(file("junk.tok"), "no token file");
  expect_error(eval("perplexity", {"--data", file("junk.tok").string()}), "junk.tok");
}

}  // namespace
}  // namespace oryx::test
