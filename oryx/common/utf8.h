// UTF-8 as Unicode defines it (RFC 3629): no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace oryx {

struct Utf8Scan {
  size_t valid;     // bytes of the longest prefix of whole characters
  bool incomplete;  // what follows is the beginning of a character that may still be completed by more bytes
};

// Reads up to the first byte that cannot stand there; valid == text.size() when all of it is UTF-8.
Utf8Scan scan_utf8(std::string_view text);

inline bool is_utf8(std::string_view text) { return scan_utf8(text).valid == text.size(); }

// `text` with U+FFFD in place of each byte that is not part of a whole character.
std::string replace_invalid_utf8(std::string_view text);

// Foreign text as an error shows it: at most `longest` bytes ("..." behind what is cut), UTF-8, each control character a space.
std::string shown(std::string_view text, size_t longest = 80);

}  // namespace oryx
