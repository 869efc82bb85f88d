// docs/training.md says what the code says, and every config in configs/ can be trained.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "oryx/common/file.h"
#include "oryx/train/options.h"
#include "tests/support/paths.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;

TEST(TrainingDocs, ListEveryKey) {
  const std::string table = train_options_table();
  EXPECT_THAT(table, HasSubstr("| `steps` |"));
  EXPECT_THAT(table, ::testing::Not(HasSubstr("`model.")));
  EXPECT_THAT(read_file(test::source_path("docs/training.md")), HasSubstr(table))
      << "replace the table by what `oryx train --keys` prints";
}

TEST(TrainingConfigs, AreValid) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(test::source_path("configs"))) {
    if (entry.path().extension() != ".json") continue;
    ++count;
    // A data set's vocabulary, as `oryx train` passes it, and none.
    EXPECT_NO_THROW(load_train_options(entry.path(), {}).validate()) << entry.path();
    EXPECT_EQ(load_train_options(entry.path(), {"steps=5000"}, 8000).model.vocab_size, 8000) << entry.path();
  }
  EXPECT_GE(count, 3);
}

}  // namespace
}  // namespace oryx
