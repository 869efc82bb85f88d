#include "oryx/common/json.h"

#include <set>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace {

constexpr int kDeepest = 64;  // what copies, reads and prints values recurses

[[noreturn]] void fail_depth(std::string_view source) { fail("{}: JSON nested deeper than {} levels", source, kDeepest); }

}  // namespace

void check_json_depth(std::string_view text, std::string_view source) {
  int depth = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    switch (text[i]) {
      case '"':
        for (++i; i < text.size() && text[i] != '"'; ++i) i += text[i] == '\\' ? 1 : 0;
        break;
      case '[':
      case '{':
        if (++depth > kDeepest) fail_depth(source);
        break;
      case ']':
      case '}':
        --depth;  // below 0 it is no JSON, which the parser says
        break;
      default:
        break;
    }
  }
}

Json parse_json(std::string_view text, std::string_view source) {
  std::vector<std::set<std::string>> open;  // the keys seen in each object that is being read
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kDeepest) fail_depth(source);
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
