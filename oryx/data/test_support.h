// For tests.
#pragma once

#include <cstdint>
#include <string>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"
#include "tests/support/folder.h"

namespace oryx::test {

// The message of the oryx::Error that `f` throws, or "".
template <typename F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

inline bool utf8_is_whole(std::string_view text) { return is_utf8(text); }

inline void append_utf8(std::string& out, uint32_t c) {
  auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  if (c < 0x80) return put(c);
  if (c < 0x800) {
    put(0xC0 | c >> 6);
  } else {
    if (c < 0x10000) {
      put(0xE0 | c >> 12);
    } else {
      put(0xF0 | c >> 18);
      put(0x80 | (c >> 12 & 0x3F));
    }
    put(0x80 | (c >> 6 & 0x3F));
  }
  put(0x80 | (c & 0x3F));
}

}  // namespace oryx::test
