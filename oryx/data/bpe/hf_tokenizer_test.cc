// tokenizer.json files against the ids that the `tokenizers` library gives (tools/make_bpe_fixtures.py).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include <ctime>
#include <cstdlib>
#include <filesystem>
#include <functional>

#include "oryx/common/file.h"
#include "oryx/common/random.h"
#include "oryx/data/test_support.h"
#include "oryx/data/tokenizer.h"
#include "tests/support/paths.h"

namespace oryx {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::error_of;
using test::TemporaryFolder;
using ::testing::HasSubstr;

const fs::path kSmall = fs::path(test::source_path("tests/data/bpe"));

std::vector<fs::path> files_in(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& e : fs::directory_iterator(folder)) {
    if (e.path().extension() == ".ids") files.push_back(fs::path(e.path()).replace_extension(".json"));
  }
  std::sort(files.begin(), files.end());
  return files;
}

// Ids equal for every text; and the text comes back, normalised or not, from tokenisers that add nothing to it.
void replay(const fs::path& folder) {
  const auto texts = json::parse(read_file(folder / "texts.json")).get<std::vector<std::string>>();
  for (const auto& file : files_in(folder)) {
    const auto t = load_tokenizer(file);
    const json tokenizer = json::parse(read_file(file));
    const auto want =
        json::parse(read_file(fs::path(file).replace_extension(".ids"))).get<std::vector<std::vector<int32_t>>>();
    ASSERT_EQ(want.size(), texts.size());
    const bool same_back = tokenizer["normalizer"].is_null() &&
                           tokenizer["pre_tokenizer"].dump().find("\"Removed\"") == std::string::npos &&
                           !t->leading_space();
    size_t compared = 0;
    for (size_t i = 0; i < texts.size(); ++i) {
      const auto ids = t->encode(texts[i]);
      EXPECT_EQ(ids, want[i]) << file.filename() << " text " << i << ": " << json(texts[i]).dump(-1, ' ', true);
      const bool framed =
          std::any_of(ids.begin(), ids.end(), [&](int32_t id) { return id == t->bos_id() || id == t->eos_id(); });
      if (!same_back || framed) continue;
      EXPECT_EQ(t->decode(ids), texts[i]) << file.filename() << " text " << i;
      ++compared;
    }
    EXPECT_EQ(same_back, compared > 100) << file;
  }
}

TEST(HuggingFaceTokenizer, IdsOfTheSmallFiles) {
  ASSERT_EQ(files_in(kSmall).size(), 7u);
  replay(kSmall);
}

TEST(HuggingFaceTokenizer, IdsOfPublishedFiles) {
  const char* folder = std::getenv("ORYX_TOKENIZERS");
  if (folder == nullptr)
    GTEST_SKIP() << "no published tokenizer.json here: set ORYX_TOKENIZERS to a folder that tools/make_bpe_fixtures.py "
                    "--of wrote";
  ASSERT_FALSE(files_in(folder).empty()) << folder;
  replay(folder);
}

TEST(HuggingFaceTokenizer, NormalisedTextComesBackComposed) {
  const auto t = load_tokenizer(kSmall / "qwen.json");
  EXPECT_EQ(t->decode(t->encode("cafe\u0301 \u212b")), "caf\u00e9 \u00c5");
  EXPECT_EQ(t->encode("e\u0301"), t->encode("\u00e9"));
}

TEST(HuggingFaceTokenizer, FrameFromPostProcessorNamesAndConfig) {
  const auto llama = load_tokenizer(kSmall / "llama3.json");
  EXPECT_EQ(llama->bos_id(), 0);
  EXPECT_EQ(llama->eos_id(), 1);
  EXPECT_EQ(llama->decode(llama->encode_document("the state")), "the state");
  const auto gpt2 = load_tokenizer(kSmall / "gpt2.json");
  EXPECT_EQ(gpt2->bos_id(), gpt2->eos_id());
  TemporaryFolder folder;
  fs::copy_file(kSmall / "qwen.json", folder / "tokenizer.json");
  EXPECT_EQ(load_tokenizer(folder.path())->eos_id(), 0);
  write_file(folder / "tokenizer_config.json", R"({"bos_token": null, "eos_token": {"content": "<|im_end|>"}})");
  const auto qwen = load_tokenizer(folder.path());
  EXPECT_EQ(qwen->eos_id(), 2);
  EXPECT_EQ(qwen->bos_id(), 2);
  // A template's own first token, by whatever name, counts.
  json j = json::parse(read_file(kSmall / "llama3.json"));
  for (auto& token : j["added_tokens"]) {
    if (token["id"] == 0) token["content"] = "[BEGIN]";
  }
  j["post_processor"]["processors"][1]["single"][0]["SpecialToken"]["id"] = "[BEGIN]";
  write_file(folder / "named.json", j.dump());
  fs::remove(folder / "tokenizer_config.json");
  EXPECT_EQ(load_tokenizer(folder / "named.json")->bos_id(), 0);
  EXPECT_EQ(load_tokenizer(folder / "named.json")->eos_id(), 1);
}

TEST(HuggingFaceTokenizer, ACopyIsTheSameTokeniser) {
  TemporaryFolder folder;
  fs::copy_file(kSmall / "qwen.json", folder / "tokenizer.json");
  write_file(folder / "tokenizer_config.json", R"({"eos_token": "<|im_end|>"})");
  const auto t = load_tokenizer(folder.path());
  make_folders(folder / "copy");
  t->save(folder / "copy" / t->file_name());
  const auto copy = load_tokenizer(folder / "copy");  // no tokenizer_config.json beside it
  EXPECT_EQ(copy->eos_id(), t->eos_id());
  EXPECT_EQ(copy->bos_id(), t->bos_id());
  // Nothing unknown at the top: the `tokenizers` library would refuse the copy.
  const json original = json::parse(read_file(kSmall / "qwen.json")), written = json::parse(copy->serialized());
  for (const auto& [key, value] : written.items()) EXPECT_TRUE(original.contains(key)) << key;
  EXPECT_EQ(written["added_tokens"][2]["oryx"], "bos eos");
  EXPECT_EQ(copy->fingerprint(), t->fingerprint());
  EXPECT_EQ(copy->encode("the state's größe"), t->encode("the state's größe"));
}

TEST(HuggingFaceTokenizer, TextThatIsNotUtf8IsRefused) {
  const auto t = load_tokenizer(kSmall / "gpt2.json");
  EXPECT_THAT(error_of([&] { t->encode("ab\xFFz"); }), HasSubstr("not UTF-8 at byte 2"));
  EXPECT_THAT(error_of([&] { t->encode("abc\xE2\x96"); }), HasSubstr("not UTF-8 at byte 3"));
}

// Long pieces take time in proportion to their length, nearly: a piece of a million bytes is a second or so, not an
// hour.
TEST(HuggingFaceTokenizer, LongPieces) {
  const auto t = load_tokenizer(kSmall / "llama3.json");
  for (const std::string& text : {std::string(400000, 'x'), std::string(400000, ' '), std::string(400000, '\n'),
                                  std::string(200000, ' ') + "\nend", std::string(400000, '7')}) {
    const std::clock_t start = std::clock();  // of this process: how busy the machine is does not count
    EXPECT_EQ(t->decode(t->encode(text)), text);
    EXPECT_LT(std::clock() - start, 100 * CLOCKS_PER_SEC) << text.front();
  }
}

TEST(HuggingFaceTokenizer, BadFiles) {
  TemporaryFolder folder;
  const json good = json::parse(read_file(kSmall / "llama3.json"));
  const auto refused = [&](const std::string& content, const std::string& message) {
    write_file(folder / "bad.json", content);
    const std::string error = error_of([&] { load_tokenizer(folder / "bad.json"); });
    EXPECT_THAT(error, HasSubstr(message));
    EXPECT_THAT(error, HasSubstr("bad.json: "));
    EXPECT_THAT(error, ::testing::Not(HasSubstr("\n")));
  };
  refused("", "not a JSON object");
  refused("[1]", "not a JSON object");
  refused(good.dump().substr(0, 5000), "was the file cut short?");
  refused(R"({"hidden_size": 64})", "not a tokenizer.json: it has no object \"model\"");
  // Copies and prints of what is nested would recurse until the stack is used up.
  refused(R"({"model": {}, "x": )" + std::string(1000000, '[') + std::string(1000000, ']') + "}", "JSON nested deeper than 64 levels");

  using Change = std::function<void(json&)>;
  const std::vector<std::pair<std::string, Change>> table = {
      {"model is Unigram, expected BPE", [](json& j) { j["model"]["type"] = "Unigram"; }},
      {"model is BPE, expected BPE with vocab and merges", [](json& j) { j["model"].erase("merges"); }},
      {"model.byte_fallback is on", [](json& j) { j["model"]["byte_fallback"] = true; }},
      {"model.end_of_word_suffix is not read", [](json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }},
      {"model.dropout is not read", [](json& j) { j["model"]["dropout"] = 0.1; }},
      {"merges: entry 0 is 7, expected two tokens", [](json& j) { j["model"]["merges"][0] = 7; }},
      {"merges: entry 1 joins 'q' and 'xyz', which the vocabulary lacks",
       [](json& j) { j["model"]["merges"][1] = "q xyz"; }},
      {"vocab: 'a' has id -3, expected 0", [](json& j) { j["model"]["vocab"]["a"] = -3; }},
      {"vocab: 'a' has id \"x\", expected 0", [](json& j) { j["model"]["vocab"]["a"] = "x"; }},
      {"vocab: 'a' has id 99999999999, expected 0", [](json& j) { j["model"]["vocab"]["a"] = 99999999999; }},
      {"is given twice", [](json& j) { j["model"]["vocab"]["a"] = j["model"]["vocab"]["b"]; }},
      {"vocab: byte 98 has no token", [](json& j) { j["model"]["vocab"].erase("b"); }},
      {"pre_tokenizer is missing", [](json& j) { j.erase("pre_tokenizer"); }},
      {"pre_tokenizer: found Metaspace",
       [](json& j) {
         j["pre_tokenizer"] = {{"type", "Metaspace"}};
       }},
      {"pre_tokenizer has no ByteLevel", [](json& j) { j["pre_tokenizer"]["pretokenizers"].erase(1); }},
      {"found Split after ByteLevel",
       [](json& j) { j["pre_tokenizer"]["pretokenizers"].push_back(j["pre_tokenizer"]["pretokenizers"][0]); }},
      {"the expression '(' cannot be read at 1",
       [](json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "("; }},
      {"the expression '\\C' cannot be read",  // half of a character
       [](json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\C"; }},
      {"a Split's pattern is {}, expected",
       [](json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"] = json::object(); }},
      {"a Split's behavior is 'Contiguous', expected",
       [](json& j) { j["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Contiguous"; }},
      {"a Sequence within a Sequence", [](json& j) { j["pre_tokenizer"]["pretokenizers"][0] = j["pre_tokenizer"]; }},
      {"normalizer is {\"type\":\"Lowercase\"}, expected none or NFC",
       [](json& j) {
         j["normalizer"] = {{"type", "Lowercase"}};
       }},
      {"added_tokens is not a list", [](json& j) { j["added_tokens"] = 3; }},
      {"expected an id and content", [](json& j) { j["added_tokens"][0].erase("id"); }},
      {"expected an id and content", [](json& j) { j["added_tokens"][0]["content"] = ""; }},
      {"'<|begin_of_text|>' is a single_word", [](json& j) { j["added_tokens"][0]["single_word"] = true; }},
      {"no token that ends a text was found; name it as eos_token", [](json& j) { j["added_tokens"].erase(1); }},
      {"added_tokens: oryx is \"begin\", expected bos, eos or bos eos",
       [](json& j) { j["added_tokens"][0]["oryx"] = "begin"; }},
      {"not a tokenizer.json: ", [](json& j) { j["model"]["ignore_merges"] = "yes"; }},
  };
  for (const auto& [message, change] : table) {
    json bad = good;
    change(bad);
    refused(bad.dump(), message);
  }
}

// A damaged byte may give another valid file; it must never end the process.
TEST(HuggingFaceTokenizer, DamagedFilesNeverCrash) {
  TemporaryFolder folder;
  const std::string good = read_file(kSmall / "added.json");
  CounterRng r(5);
  int refused = 0;
  for (int i = 0; i < 200; ++i) {
    std::string bad = good;
    for (int k = 0; k < 3; ++k) bad[r.below(bad.size())] = static_cast<char>(r.below(256));
    write_file(folder / "bad.json", bad);
    refused += !error_of([&] {
                  const auto t = load_tokenizer(folder / "bad.json");
                  t->decode(t->encode("the <mask> of größe 12\n"));
                }).empty();
  }
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace oryx
