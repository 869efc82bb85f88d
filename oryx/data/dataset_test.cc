#include "oryx/data/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>

#include "oryx/data/test_support.h"

namespace oryx {
namespace {

using test::error_of;
using test::TemporaryFolder;
using ::testing::HasSubstr;

class DatasetTest : public ::testing::Test {
 protected:
  // `count` documents in two files; the text tells the number.
  void put_text(int count) {
    std::string first, second;
    for (int i = 0; i < count; ++i) {
      (i % 2 ? first : second) += nlohmann::json{{"text", fmt::format("document {} ä", i)}}.dump() + "\n";
    }
    write_file(text_ / "a.jsonl", first);
    write_file(text_ / "b.jsonl", second);
  }
  DatasetInfo build(DatasetOptions options) {
    options.progress = false;
    return build_dataset(list_text_files(text_.path()), *tokenizer_, out_.path(), options);
  }
  std::vector<std::string> documents(const TokenFile& file) const {
    std::vector<std::string> texts;
    for (uint64_t i = 0; i < file.documents(); ++i) {
      std::vector<int64_t> ids(file.document_size(i));
      file.read(file.document_begin(i), ids);
      EXPECT_EQ(ids.front(), tokenizer_->bos_id());
      EXPECT_EQ(ids.back(), tokenizer_->eos_id());
      texts.push_back(tokenizer_->decode(std::vector<int32_t>(ids.begin(), ids.end())));
    }
    return texts;
  }

  std::unique_ptr<Tokenizer> tokenizer_ = make_byte_tokenizer();
  TemporaryFolder text_, out_;
};

TEST_F(DatasetTest, EveryDocumentIsOnOneSideAndTheCountsAgree) {
  put_text(400);
  for (const auto encoding : {TokenEncoding::raw, TokenEncoding::zstd}) {
    build({.valid = 0.1, .tokens = {.encoding = encoding}, .overwrite = true});
    const Dataset d = open_dataset(out_.path());
    const auto train = documents(*d.train), valid = documents(*d.valid);
    EXPECT_GT(valid.size(), 20u);
    EXPECT_LT(valid.size(), 65u);
    std::map<std::string, int> all;
    uint64_t bytes = 0;
    for (const auto& list : {train, valid}) {
      for (const auto& t : list) {
        ++all[t];
        bytes += t.size();
      }
    }
    EXPECT_EQ(all.size(), 400u);
    EXPECT_EQ(d.info.train.documents + d.info.valid.documents, 400u);
    EXPECT_EQ(d.info.train.bytes + d.info.valid.bytes, bytes);
    EXPECT_EQ(d.info.valid.tokens, d.valid->tokens());
    EXPECT_EQ(d.info.sources, (std::vector<std::string>{"a.jsonl", "b.jsonl"}));
  }
}

TEST_F(DatasetTest, ADocumentKeepsItsSideWhenTextIsAdded) {
  put_text(200);
  build({.valid = 0.2});
  const auto before = documents(*open_dataset(out_.path()).valid);
  put_text(400);
  build({.valid = 0.2, .overwrite = true});
  const auto after = documents(*open_dataset(out_.path()).valid);
  EXPECT_THAT(after, ::testing::IsSupersetOf(before));
}

TEST_F(DatasetTest, TheSameTextGivesTheSameBytes) {
  put_text(100);
  build({});
  const std::string first = read_file(out_ / "train.tok") + read_file(out_ / "dataset.json");
  build({.overwrite = true});
  EXPECT_EQ(read_file(out_ / "train.tok") + read_file(out_ / "dataset.json"), first);
}

TEST_F(DatasetTest, SmallTextStillHasAValidationSet) {
  put_text(5);
  const DatasetInfo few = build({.valid = 0.0001});
  EXPECT_EQ(few.valid.documents, 1u);
  EXPECT_EQ(few.train.documents, 4u);

  std::filesystem::remove(text_ / "a.jsonl");
  std::filesystem::remove(text_ / "b.jsonl");
  write_file(text_ / "one.txt", std::string(1000, 'x') + std::string(1000, 'y'));
  const DatasetInfo one = build({.valid = 0.25, .overwrite = true});
  const Dataset d = open_dataset(out_.path());
  EXPECT_EQ(documents(*d.train).at(0), std::string(1000, 'x') + std::string(500, 'y'));
  EXPECT_EQ(documents(*d.valid).at(0), std::string(500, 'y'));
  EXPECT_EQ(one.train.bytes, 1500u);
  EXPECT_EQ(one.valid.bytes, 500u);
}

TEST_F(DatasetTest, ValidationFilesAndNoValidation) {
  put_text(20);
  const DatasetInfo named = build({.valid_files = {"b.*"}});
  EXPECT_EQ(named.valid.documents, 10u);
  for (const auto& t : documents(*open_dataset(out_.path()).valid)) EXPECT_EQ(std::stoi(t.substr(9)) % 2, 0);
  const DatasetInfo none = build({.valid = 0, .overwrite = true});
  EXPECT_EQ(none.valid.documents, 0u);
  EXPECT_EQ(open_dataset(out_.path()).valid->tokens(), 0u);
}

TEST_F(DatasetTest, WhatCannotBeBuiltLeavesNothing) {
  put_text(10);
  const auto error = [&](DatasetOptions o) { return error_of([&] { build(o); }); };
  EXPECT_THAT(error({.valid = 1}), HasSubstr("share of validation 1"));
  EXPECT_THAT(error({.valid = -0.1}), HasSubstr("share of validation -0.1"));
  EXPECT_THAT(error({.valid_files = {"c.*"}}), HasSubstr("no text file matches 'c.*'"));
  EXPECT_THAT(error({.valid_files = {"*"}}), HasSubstr("no document is left to train on"));
  EXPECT_TRUE(std::filesystem::is_empty(out_.path()));
  write_file(text_ / "c.txt", "bad \xFF");
  EXPECT_THAT(error({}), HasSubstr("c.txt: byte 4 (0xff) is not UTF-8"));
  EXPECT_TRUE(std::filesystem::is_empty(out_.path()));
  for (const char* name : {"a.jsonl", "b.jsonl", "c.txt"}) write_file(text_ / name, "");
  EXPECT_THAT(error({}), HasSubstr("no document is left to train on"));
  EXPECT_TRUE(std::filesystem::is_empty(out_.path()));
}

TEST_F(DatasetTest, FailedReplacementKeepsTheOld) {
  put_text(10);
  build({});
  EXPECT_THAT(error_of([&] { build({}); }), HasSubstr("holds a data set already"));
  write_file(text_ / "c.txt", "bad \xFF");
  EXPECT_NE(error_of([&] { build({.overwrite = true}); }), "");
  EXPECT_EQ(open_dataset(out_.path()).info.train.documents, 9u);
}

TEST_F(DatasetTest, PartsThatDoNotBelongTogetherAreRefused) {
  EXPECT_THAT(error_of([&] { open_dataset(out_.path()); }), HasSubstr("not a data set (no dataset.json)"));
  put_text(10);
  build({});
  const std::string info = read_file(out_ / "dataset.json"), tokens = read_file(out_ / "train.tok");
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = info;
    text.replace(text.find(from), from.size(), to);
    write_file(out_ / "dataset.json", text);
    return error_of([&] { open_dataset(out_.path()); });
  };
  EXPECT_THAT(changed("oryx dataset 1", "oryx dataset 2"), HasSubstr("format 'oryx dataset 2'"));
  EXPECT_THAT(changed("\"fingerprint\": \"", "\"fingerprint\": \"0"), HasSubstr("not a fingerprint"));
  EXPECT_THAT(changed(fingerprint_text(tokenizer_->fingerprint()), "0123456789abcdef"), HasSubstr("0123456789abcdef"));
  EXPECT_THAT(changed("\"documents\": 9", "\"documents\": 8"), HasSubstr("train.tok"));
  EXPECT_THAT(changed("\"train\"", "\"trane\""), HasSubstr("not the description of a data set"));
  EXPECT_THAT(changed("tokenizer.model", "../other.model"), HasSubstr("not a plain name"));
  write_file(out_ / "dataset.json", info);
  write_file(out_ / "train.tok", tokens.substr(0, tokens.size() - 8));
  EXPECT_THAT(error_of([&] { open_dataset(out_.path()); }), HasSubstr("is it truncated?"));
}

}  // namespace
}  // namespace oryx
