#include "tests/support/paths.h"

namespace oryx::test {

std::string source_path(const std::string& relative) { return std::string(ORYX_SOURCE_DIR "/") + relative; }
std::string program_path() { return ORYX_PROGRAM; }

}  // namespace oryx::test
