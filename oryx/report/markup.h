// Text for HTML and SVG.
#pragma once

#include <string>
#include <string_view>

namespace oryx {

// Escaped for element content and quoted attributes. Control characters and bytes that are not UTF-8, which would make
// the document invalid, become '?'.
std::string escape_markup(std::string_view text);

// A number as people write it on an axis or in a tooltip: "0.25", "20k", "1.5M", "3e-05".
std::string short_number(double value);

}  // namespace oryx
