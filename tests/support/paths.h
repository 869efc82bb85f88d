// Where the sources and the built program are. Functions rather than macros: the tests' objects then name no absolute path, and two
// checkouts share their ccache entries.
#pragma once

#include <string>

namespace oryx::test {

std::string source_path(const std::string& relative);  // "docs/model.md" -> /.../docs/model.md
std::string program_path();                            // build/<preset>/oryx

}  // namespace oryx::test
