// docs/model.md says what the code says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/file.h"
#include "oryx/common/options.h"
#include "oryx/mixers/mixer.h"
#include "oryx/model/config.h"
#include "tests/support/paths.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;

TEST(ModelDocs, ListEveryKeyOfTheConfig) {
  const std::string page = read_file(test::source_path("docs/model.md"));
  EXPECT_THAT(page, HasSubstr(options_table<ModelConfig>()))
      << "replace the table by what `oryx inspect --keys` prints";
}

TEST(ModelDocs, NameEveryMixerAndVariant) {
  const std::string page = read_file(test::source_path("docs/model.md"));
  for (const auto& name : mixer_names()) EXPECT_THAT(page, HasSubstr("`" + name + "`"));
  for (const auto& name : preset_variants()) EXPECT_THAT(page, HasSubstr("`" + name + "`"));
  for (const auto& name : preset_sizes()) EXPECT_THAT(page, HasSubstr("`" + name + "`"));
}

}  // namespace
}  // namespace oryx
