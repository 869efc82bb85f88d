#include "oryx/common/utf8.h"

#include <gtest/gtest.h>

namespace oryx {
namespace {

TEST(Utf8, TableOfPrefixes) {
  struct Row {
    std::string text;
    size_t valid;
    bool incomplete;
  };
  const std::vector<Row> table = {
      {"", 0, false},
      {"plain ascii, longer than eight bytes", 36, false},
      {"\xC3\xA9", 2, false},
      {"\xC3", 0, true},
      {"a\xE2\x96", 1, true},
      {"a\xF0\x9F\x98", 1, true},
      {"\xF4\x8F\xBF\xBF", 4, false},
      {"\xF4\x90\x80\x80", 0, false},  // above U+10FFFF
      {"\xC0\x80", 0, false},          // overlong
      {"\xE0\x9F\xBF", 0, false},      // overlong
      {"\xF0\x8F\xBF\xBF", 0, false},  // overlong
      {"\xED\xA0\x80", 0, false},      // surrogate
      {"\xED\x9F\xBF", 3, false},
      {"12345678\x80", 8, false},
      {"\xE2\x28\xA1", 0, false},
      {"\xFF", 0, false},
  };
  for (const auto& row : table) {
    const Utf8Scan scan = scan_utf8(row.text);
    EXPECT_EQ(scan.valid, row.valid) << row.text;
    EXPECT_EQ(scan.incomplete, row.incomplete) << row.text;
  }
}

TEST(Utf8, ReplacesWhatIsNoCharacter) {
  EXPECT_EQ(replace_invalid_utf8("a\xFFz\xC3"), "a\xEF\xBF\xBDz\xEF\xBF\xBD");
  EXPECT_EQ(replace_invalid_utf8("größe"), "größe");
}

}  // namespace
}  // namespace oryx
