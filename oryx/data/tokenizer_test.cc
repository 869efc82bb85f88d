#include "oryx/data/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/random.h"
#include "oryx/data/sentencepiece.h"
#include "oryx/data/test_support.h"

namespace oryx {
namespace {

using test::error_of;
using test::TemporaryFolder;
using ::testing::HasSubstr;

// Words from a small alphabet, so that there is something to merge.
std::string prose(uint64_t seed, int words) {
  constexpr const char* kWords[] = {"the",    "state", "of",     "token",  "mixer", "linear", "attention", "reads",
                                    "writes", "a",     "length", "recall", "naïve", "größe",  "12",        "345"};
  CounterRng r(seed);
  std::string text;
  for (int i = 0; i < words; ++i) {
    text += kWords[r.below(std::size(kWords))];
    text += r.below(12) == 0 ? ".\n" : r.below(30) == 0 ? "    " : " ";
  }
  return text;
}

class SentencePieceTest : public ::testing::Test {
 protected:
  static std::unique_ptr<Tokenizer> train(int64_t vocab_size, uint64_t sample_bytes = 1 << 20) {
    TemporaryFolder folder;
    for (int i = 0; i < 4; ++i) write_file(folder / fmt::format("{}.txt", i), prose(i, 4000));
    TextSource source(list_text_files(folder.path()));
    return train_sentencepiece(source,
                               {.vocab_size = vocab_size, .sample_bytes = sample_bytes, .seed = 1, .progress = false});
  }
  static void SetUpTestSuite() { shared_ = train(400).release(); }
  static void TearDownTestSuite() { delete shared_; }
  static Tokenizer* shared_;
};
Tokenizer* SentencePieceTest::shared_ = nullptr;

const std::vector<std::string>& tricky() {
  static const std::vector<std::string> texts = {
      "",
      " ",
      "   ",
      "a",
      " leading and trailing ",
      "two  spaces   three\n\n\nnewlines\n",
      "\t\ttabs\tand\r\nCRLF\r",
      "def f(x):\n    if x:\n        return 1\n",
      "12345 0.5e-3 ٣٤",
      "naïve größe 日本語 emoji 👩‍👩‍👧 \xF4\x8F\xBF\xBF",
      "the mark \xE2\x96\x81 and \xE2\x96\x81\xE2\x96\x81 itself",
      "\xE2\x96\x81",
      "<s> </s> <unk> <0x0A> <0xFF> \xE2\x81\x87",
      std::string("nul \0 byte", 10),
      "e\xCC\x81 is not \xC3\xA9, \xEF\xAC\x81 is not fi, \xC2\xA0 is no space, \xE3\x80\x80",
      "\xEF\xBB\xBF bom \xEF\xBF\xBD",
      "\x01\x02\x7F",
  };
  return texts;
}

std::vector<std::pair<std::string, const Tokenizer*>> both(const Tokenizer* trained) {
  static const auto byte = make_byte_tokenizer();
  return {{"byte", byte.get()}, {"sentencepiece", trained}};
}

TEST_F(SentencePieceTest, RoundTripOfTrickyText) {
  for (const auto& [name, t] : both(shared_)) {
    for (const auto& text : tricky()) EXPECT_EQ(t->decode(t->encode(text)), text) << name;
  }
}

TEST_F(SentencePieceTest, RoundTripOfRandomCharacters) {
  CounterRng r(11);
  for (int i = 0; i < 200; ++i) {
    std::string text;
    for (uint64_t n = r.below(60); n > 0; --n) {
      const uint32_t limits[] = {0x80, 0x800, 0xD800, 0x110000};
      uint32_t c = static_cast<uint32_t>(r.below(limits[r.below(4)]));
      if (c >= 0xD800 && c < 0xE000) c = ' ';
      test::append_utf8(text, c);
    }
    for (const auto& [name, t] : both(shared_)) ASSERT_EQ(t->decode(t->encode(text)), text) << name;
  }
}

TEST_F(SentencePieceTest, LongTextIsCutWithoutATrace) {
  const std::string text = prose(3, 60000);
  ASSERT_GT(text.size(), size_t{3} << 16);
  std::vector<int32_t> lines;
  for (size_t i = 0; i < text.size();) {
    const size_t end = std::min(text.find('\n', i + 1), text.size());
    const auto ids = shared_->encode(text.substr(i, end - i));
    lines.insert(lines.end(), ids.begin(), ids.end());
    i = end;
  }
  const auto ids = shared_->encode(text);
  EXPECT_EQ(ids, lines);
  EXPECT_EQ(shared_->decode(ids), text);
  EXPECT_LT(ids.size(), text.size() / 2);
}

TEST_F(SentencePieceTest, DigitsAndNewlinesStandAlone) {
  for (const char* text : {"345", "\n\n", "\t\t"}) {
    EXPECT_EQ(shared_->encode(text).size(), std::string_view(text).size()) << text;
  }
}

TEST_F(SentencePieceTest, FrameAndSpecialIds) {
  EXPECT_EQ(shared_->vocab_size(), 400);
  EXPECT_EQ(shared_->unk_id(), 0);
  EXPECT_EQ(shared_->bos_id(), 1);
  EXPECT_EQ(shared_->eos_id(), 2);
  for (const auto& [name, t] : both(shared_)) {
    const auto ids = t->encode_document("the state");
    EXPECT_EQ(ids.front(), t->bos_id());
    EXPECT_EQ(ids.back(), t->eos_id());
    EXPECT_EQ(t->decode(ids), "the state");
    auto prompt = t->encode_prompt("the state");
    prompt.push_back(t->eos_id());
    EXPECT_EQ(prompt, ids);
  }
}

TEST_F(SentencePieceTest, StreamingNeverSplitsACharacter) {
  for (const auto& [name, t] : both(shared_)) {
    for (const auto& text : tricky()) {
      StreamDecoder decoder(*t);
      std::string all;
      for (const int32_t id : t->encode(text)) {
        const std::string piece = decoder.add(id);
        EXPECT_TRUE(test::utf8_is_whole(piece)) << name;
        all += piece;
      }
      EXPECT_EQ(all + decoder.finish(), text) << name;
    }
  }
}

TEST(StreamDecoder, BrokenBytesBecomeReplacementCharacters) {
  const auto t = make_byte_tokenizer();
  EXPECT_EQ(t->decode(std::vector<int32_t>{0xE2, 0x96}), "\xEF\xBF\xBD\xEF\xBF\xBD");
  EXPECT_EQ(t->decode(std::vector<int32_t>{0xFF, 'a', 0xC3, 'b'}),
            "\xEF\xBF\xBD"
            "a\xEF\xBF\xBD"
            "b");
  EXPECT_EQ(t->decode(std::vector<int32_t>{0xC3, 0xA9, 256}), "é");
  EXPECT_THAT(error_of([&] { t->decode(std::vector<int32_t>{257}); }), HasSubstr("257"));
  EXPECT_THAT(error_of([&] { t->decode(std::vector<int32_t>{-1}); }), HasSubstr("-1"));
}

TEST_F(SentencePieceTest, TextThatIsNotUtf8IsRefused) {
  for (const auto& [name, t] : both(shared_)) {
    EXPECT_THAT(error_of([&, t = t] { t->encode("ab\xFFz"); }), HasSubstr("not UTF-8 at byte 2")) << name;
  }
}

TEST_F(SentencePieceTest, TrainingIsDeterministicAlsoWhenItSamples) {
  const auto again = train(400), sampled = train(400, 50000), sampled_again = train(400, 50000);
  EXPECT_EQ(again->serialized(), shared_->serialized());
  EXPECT_EQ(sampled->serialized(), sampled_again->serialized());
  EXPECT_NE(sampled->serialized(), shared_->serialized());
}

TEST_F(SentencePieceTest, SaveLoadAndFingerprint) {
  TemporaryFolder folder;
  for (const auto& [name, t] : both(shared_)) {
    const auto path = folder / name / t->file_name();
    make_folders(path.parent_path());
    t->save(path);
    for (const auto& from : {path, path.parent_path()}) {
      const auto loaded = load_tokenizer(from);
      EXPECT_EQ(loaded->fingerprint(), t->fingerprint());
      EXPECT_EQ(loaded->encode("the state of größe"), t->encode("the state of größe"));
    }
  }
  EXPECT_NE(shared_->fingerprint(), make_byte_tokenizer()->fingerprint());
  EXPECT_EQ(parse_fingerprint(fingerprint_text(shared_->fingerprint())), shared_->fingerprint());
  EXPECT_THAT(error_of([] { parse_fingerprint("12"); }), HasSubstr("16 hexadecimal digits"));
}

TEST_F(SentencePieceTest, BadFiles) {
  TemporaryFolder folder;
  const std::string good = shared_->serialized();
  const std::vector<std::tuple<std::string, std::string, std::string>> table = {
      {"empty.model", "", "empty.model"},
      {"text.model", "hello, this is no model", "not a SentencePiece model"},
      {"half.model", good.substr(0, good.size() / 2), "half.model"},
      {"cut.model", good.substr(0, good.size() - 1), "not a SentencePiece model"},
      // A piece of three bytes: SentencePiece alone would end the process.
      {"nul.model", std::string("\x0A\x05\x0A\x03x\0y", 7) + good, "holds a NUL byte"},
      {"json.json", "{}", "not a tokenizer.json"},
      {"other.bin", "no tokeniser", "not a tokeniser file"},
  };
  for (const auto& [name, content, message] : table) {
    write_file(folder / name, content);
    const std::string error = error_of([&, file = folder / name] { load_tokenizer(file); });
    EXPECT_THAT(error, HasSubstr(message)) << name;
    EXPECT_THAT(error, HasSubstr(name));
    EXPECT_THAT(error, ::testing::Not(HasSubstr("\n")));
  }
  EXPECT_THAT(error_of([&] { load_tokenizer(folder / "none.model"); }), HasSubstr("No such file"));
  make_folders(folder / "nothing");
  EXPECT_THAT(error_of([&] { load_tokenizer(folder / "nothing"); }), HasSubstr("no tokeniser in this folder"));
}

// A damaged byte may give another valid model; it must never end the process.
TEST_F(SentencePieceTest, DamagedModelsNeverCrash) {
  const std::string good = shared_->serialized();
  CounterRng r(5);
  int refused = 0;
  for (int i = 0; i < 150; ++i) {
    std::string bad = good;
    for (int k = 0; k < 3; ++k) bad[r.below(bad.size())] = static_cast<char>(r.below(256));
    const std::string error = error_of([&] {
      const auto t = load_sentencepiece("bad.model", bad);
      t->decode(t->encode("the state of the größe 12\n"));
    });
    refused += !error.empty();
  }
  EXPECT_GT(refused, 0);
}

TEST(SentencePieceTraining, BadInput) {
  TemporaryFolder folder;
  write_file(folder / "a.txt", "\n\n\t\n");
  auto train = [&](int64_t vocab) {
    return error_of([&] {
      TextSource source(list_text_files(folder.path()));
      train_sentencepiece(source, {.vocab_size = vocab, .progress = false});
    });
  };
  EXPECT_THAT(train(400), HasSubstr("no text to learn"));
  EXPECT_THAT(train(100), HasSubstr("vocabulary size 100"));
  std::string many;
  for (uint32_t c = 0x4E00; c < 0x4E00 + 500; ++c) test::append_utf8(many, c);
  write_file(folder / "a.txt", many);
  const std::string error = train(400);
  EXPECT_THAT(error, HasSubstr("could not learn 400 pieces"));
  EXPECT_THAT(error, ::testing::Not(HasSubstr("\n")));
}

TEST(SentencePieceTraining, TooLittleTextGivesASmallerVocabulary) {
  TemporaryFolder folder;
  write_file(folder / "a.txt", "one two three one two three");
  TextSource source(list_text_files(folder.path()));
  const auto t = train_sentencepiece(source, {.vocab_size = 1000, .progress = false});
  EXPECT_LT(t->vocab_size(), 1000);
  EXPECT_EQ(t->decode(t->encode("one six")), "one six");
}

}  // namespace
}  // namespace oryx
