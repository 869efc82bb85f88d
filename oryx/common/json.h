// JSON files that people write: one-line errors with line and column; duplicate keys and more than 64 levels are refused.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace oryx {

// Keeps the order of keys.
using Json = nlohmann::ordered_json;

// `source` (a file's name) starts the message of an oryx::Error.
Json parse_json(std::string_view text, std::string_view source);

// Throws Error for text nested deeper than 64 levels: what copies, reads and prints values recurses. For large files that are parsed without parse_json.
void check_json_depth(std::string_view text, std::string_view source);

// What a value is, for an error's "found ...": its text, shortened, and its type where that is not plain to see.
std::string describe_json(const Json& value);

}  // namespace oryx
