#include "oryx/common/json.h"

#include <set>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx {

Json parse_json(std::string_view text, std::string_view source) {
  constexpr int kDeepest = 64;              // what reads and prints values recurses
  std::vector<std::set<std::string>> open;  // the keys seen in each object that is being read
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kDeepest) fail("{}: JSON nested deeper than {} levels", source, kDeepest);
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key && !open.back().insert(parsed.get<std::string>()).second) {
      fail("{}: the key '{}' stands twice in one object", source, shown(parsed.get<std::string>()));
    }
    return true;
  };
  try {
    return Json::parse(text, watch);
  } catch (const Json::exception& e) {
    const std::string_view what = e.what();  // "[json.exception.parse_error.101] parse error at line 1, column 5: ..."
    const size_t end = what.find("] ");
    fail("{}: not valid JSON: {}", source, shown(end == std::string_view::npos ? what : what.substr(end + 2), 300));
  }
}

std::string describe_json(const Json& value) {
  constexpr size_t kLongest = 60;
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > kLongest) {
    size_t end = kLongest;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;  // not within a character
    text = text.substr(0, end) + "...";
  }
  if (value.is_string()) return text + " (a string)";
  if (value.is_array()) return text + " (a list)";
  if (value.is_object()) return text + " (an object)";
  return text;
}

}  // namespace oryx
