// A fresh folder for a test, removed with all it holds.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <string>

#include "oryx/common/error.h"

namespace oryx::test {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "oryx_test_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) fail_errno(name, "create");
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::filesystem::path& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

}  // namespace oryx::test
