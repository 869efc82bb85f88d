#include "oryx/data/text_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zstd.h>

#include <fstream>

#include "oryx/common/file.h"
#include "oryx/common/random.h"
#include "oryx/data/test_support.h"

namespace oryx {
namespace {

using test::error_of;
using test::TemporaryFolder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string zstd(std::string_view text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

std::vector<std::string> read_all(const std::filesystem::path& path, const TextSourceOptions& options = {},
                                  size_t piece = kTextPiece) {
  TextSource source(list_text_files(path, options), piece);
  std::vector<std::string> texts;
  for (Document d; source.next(d);) texts.push_back(d.text);
  EXPECT_EQ(source.consumed_bytes(), source.total_bytes());
  return texts;
}

class TextSourceTest : public ::testing::Test {
 protected:
  void put(const std::string& name, std::string_view content) {
    make_folders((folder_ / name).parent_path());
    std::ofstream(folder_ / name, std::ios::binary) << content;
  }
  TemporaryFolder folder_;
};

TEST_F(TextSourceTest, FoldersAreReadInOrderAndForeignFilesPassedOver) {
  put("b.txt", "second\n");
  put("a.jsonl",
      "{\"text\": \"one\"}\n\n{\"id\": 3, \"text\": \"two \\u00e9 \\ud83d\\ude00\\n\"}\r\n{\"text\": \"\"}\n{\"text\": "
      "\"three\"}");
  put("sub/c.txt.zst", zstd("third"));
  put("sub/d.jsonl.zst", zstd("{\"text\":\"four\"}\n"));
  put("sub/notes.md", "not read");
  put(".hidden.txt", "not read");
  put(".git/e.txt", "not read");
  put("z.txt", "");
  EXPECT_THAT(read_all(folder_.path()), ElementsAre("one", "two é 😀\n", "three", "second\n", "third", "four"));
  EXPECT_THAT(read_all(folder_ / "b.txt"), ElementsAre("second\n"));
  EXPECT_THAT(read_all(folder_.path(), {.extensions = {".md", ".txt"}}), ElementsAre("second\n", "third", "not read"));
  EXPECT_THAT(read_all(folder_.path(), {.include = {"sub/*"}, .exclude = {"d.*"}}), ElementsAre("third"));
  TextSource source(list_text_files(folder_ / "a.jsonl"));
  Document d;
  while (source.next(d)) {
  }
  EXPECT_EQ(source.empty_documents(), 1u);
  EXPECT_EQ(d.line, 5u);
}

TEST_F(TextSourceTest, LongFilesOfAllKindsComeThroughWhole) {
  CounterRng r(1);
  std::string lines;
  std::vector<std::string> expected;
  for (int i = 0; i < 3000; ++i) {
    expected.push_back(fmt::format("{}", std::string(1 + r.below(3000), static_cast<char>('a' + i % 26))));
    lines += "{\"text\":\"" + expected.back() + "\"}\n";
  }
  ASSERT_GT(lines.size(), size_t{4} << 20);
  put("a.jsonl", lines);
  put("b.jsonl.zst", zstd(lines));
  // Two frames, one after the other, are one file.
  put("c.jsonl.zst", zstd(lines.substr(0, 1000000)) + zstd(lines.substr(1000000)));
  for (const char* name : {"a.jsonl", "b.jsonl.zst", "c.jsonl.zst"})
    EXPECT_EQ(read_all(folder_ / name), expected) << name;
  put("d.txt", lines);
  put("e.txt.zst", zstd(lines));
  EXPECT_THAT(read_all(folder_ / "d.txt"), ElementsAre(lines));
  EXPECT_THAT(read_all(folder_ / "e.txt.zst"), ElementsAre(lines));
}

TEST_F(TextSourceTest, LargeTextIsCutAtLinesOrElseBetweenCharacters) {
  put("a.txt", "one\ntwo\nthree\nfour\n");
  EXPECT_THAT(read_all(folder_ / "a.txt", {}, 9), ElementsAre("one\ntwo\n", "three\n", "four\n"));
  put("b.txt", "äöüäöüäöü");
  EXPECT_THAT(read_all(folder_ / "b.txt", {}, 7), ElementsAre("äöü", "äöü", "äöü"));
}

TEST_F(TextSourceTest, AByteOrderMarkIsNoText) {
  const std::string mark = "\xEF\xBB\xBF";
  put("a.txt", mark + "one\n" + mark + "two");  // the second is a character (U+FEFF) like any other
  put("b.jsonl", mark + "{\"text\": \"three\"}\n");
  put("c.txt.zst", zstd(mark + "four"));
  put("d.txt", mark);
  put("e.txt", "\xEF\xBB");
  EXPECT_THAT(read_all(folder_ / "a.txt"), ElementsAre("one\n" + mark + "two"));
  EXPECT_THAT(read_all(folder_ / "b.jsonl"), ElementsAre("three"));
  EXPECT_THAT(read_all(folder_ / "c.txt.zst"), ElementsAre("four"));
  EXPECT_THAT(read_all(folder_ / "d.txt"), ElementsAre());
  EXPECT_THAT(error_of([&] { read_all(folder_ / "e.txt"); }), HasSubstr("byte 0 (0xef) is not UTF-8"));
}

TEST_F(TextSourceTest, BadTextHasOneLineWithFileAndPlace) {
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "[";
  const std::string whole = zstd("{\"text\": \"" + std::string(5000, 'x') + "\"}\n");
  struct Row {
    std::string name, content, message;
  };
  const std::vector<Row> table = {
      {"latin1.txt", "gr\xF6\xDF", "latin1.txt: byte 2 (0xf6) is not UTF-8"},
      {"cut.txt", "abc\xE2\x96", "cut.txt: byte 3 (0xe2) is not UTF-8"},
      {"latin1.jsonl", "{\"text\": \"a\"}\n{\"text\": \"\xFF\"}\n", "latin1.jsonl:2: byte 24 (0xff) is not UTF-8"},
      {"json.jsonl", "{\"text\": \"a\"}\n{\"text\": \n", "json.jsonl:2: not JSON"},
      {"surrogate.jsonl", "{\"text\": \"\\ud800\"}\n", "surrogate.jsonl:1: not JSON"},
      {"array.jsonl", "[1, 2]\n", "array.jsonl:1: found a JSON array, expected an object"},
      {"field.jsonl", "{\"body\": \"a\", \"id\": 1}\n", "field.jsonl:1: no field \"text\" (found: body, id)"},
      {"number.jsonl", "{\"text\": 5}\n", "number.jsonl:1: field \"text\" is a number"},
      {"deep.jsonl", deep, "deep.jsonl:1: JSON nested deeper"},
      {"plain.jsonl.zst", "{\"text\": \"a\"}\n", "plain.jsonl.zst: not a zstd file, or damaged"},
      {"short.jsonl.zst", whole.substr(0, whole.size() - 3), "short.jsonl.zst: truncated zstd file"},
      {"empty.jsonl.zst", "", "empty.jsonl.zst: truncated zstd file"},
  };
  for (const auto& row : table) {
    put(row.name, row.content);
    const std::string error = error_of([&] { read_all(folder_ / row.name); });
    EXPECT_THAT(error, HasSubstr(row.message)) << row.name;
    EXPECT_THAT(error, ::testing::Not(HasSubstr("\n")));
  }
}

TEST_F(TextSourceTest, NothingToRead) {
  EXPECT_THAT(error_of([&] { list_text_files(folder_.path()); }),
              HasSubstr("no text files in this folder; expected .txt, .jsonl"));
  EXPECT_THAT(error_of([&] { list_text_files(folder_ / "none"); }), HasSubstr("no such file or folder"));
  put("a.md", "x");
  EXPECT_THAT(error_of([&] { list_text_files(folder_ / "a.md"); }), HasSubstr("not a text file by its name"));
  put("a.txt", "x");
  EXPECT_THAT(error_of([&] { list_text_files(folder_.path(), {.exclude = {"*"}}); }), HasSubstr("leave no text file"));
}

}  // namespace
}  // namespace oryx
