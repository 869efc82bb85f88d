// A room includes only rooms that stand above it in docs/architecture.md.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <regex>

#include "oryx/common/file.h"
#include "tests/support/paths.h"

namespace oryx::test {
namespace {

namespace fs = std::filesystem;

// Room -> its place in the table.
std::map<std::string, int> rooms() {
  std::map<std::string, int> order;
  const std::string page = read_file(test::source_path("docs/architecture.md"));
  const std::regex row(R"(\n\| `oryx/([a-z_]+)/` \|)");
  for (std::sregex_iterator it(page.begin(), page.end(), row), end; it != end; ++it)
    order.emplace((*it)[1], static_cast<int>(order.size()));
  return order;
}

bool is_source(const fs::path& p) {
  const std::string name = p.filename().string();
  return (p.extension() == ".cc" || p.extension() == ".h") && name.find("_test.") == std::string::npos &&
         name.find("_bench.") == std::string::npos && name.find("test_support.h") == std::string::npos;
}

TEST(Rooms, IncludeOnlyRoomsAbove) {
  const auto order = rooms();
  ASSERT_GT(order.size(), 10u);
  const std::regex include(R"(#include "oryx/([a-z_]+)/)");
  int checked = 0;
  for (const auto& entry : fs::recursive_directory_iterator(test::source_path("oryx"))) {
    if (!entry.is_regular_file() || !is_source(entry.path())) continue;
    const std::string room = (*++fs::relative(entry.path(), test::source_path("")).begin()).string();
    ASSERT_TRUE(order.count(room)) << "the room oryx/" << room << " is missing in docs/architecture.md";
    const std::string text = read_file(entry.path());
    for (std::sregex_iterator it(text.begin(), text.end(), include), end; it != end; ++it) {
      const std::string used = (*it)[1];
      ASSERT_TRUE(order.count(used)) << entry.path() << " includes " << used;
      EXPECT_LE(order.at(used), order.at(room))
          << entry.path() << " includes the room " << used << ", which stands below " << room;
      ++checked;
    }
  }
  EXPECT_GT(checked, 100);
}

TEST(Rooms, FilesAreShort) {
  for (const auto& entry : fs::recursive_directory_iterator(test::source_path("oryx"))) {
    if (!entry.is_regular_file() || !is_source(entry.path())) continue;
    const std::string text = read_file(entry.path());
    EXPECT_LE(std::count(text.begin(), text.end(), '\n'), 500) << entry.path();
  }
}

}  // namespace
}  // namespace oryx::test
