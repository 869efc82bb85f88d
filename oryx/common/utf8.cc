#include "oryx/common/utf8.h"

#include <cstdint>
#include <cstring>

namespace oryx {

namespace {

// The lead byte fixes the length of a character and the range of its second byte.
struct Lead {
  int length;
  unsigned char low, high;
};

Lead lead_of(unsigned char c) {
  if (c >= 0xC2 && c <= 0xDF) return {2, 0x80, 0xBF};
  if (c == 0xE0) return {3, 0xA0, 0xBF};
  if (c == 0xED) return {3, 0x80, 0x9F};
  if (c >= 0xE1 && c <= 0xEF) return {3, 0x80, 0xBF};
  if (c == 0xF0) return {4, 0x90, 0xBF};
  if (c >= 0xF1 && c <= 0xF3) return {4, 0x80, 0xBF};
  if (c == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

Utf8Scan scan_utf8(std::string_view text) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const size_t n = text.size();
  size_t i = 0;
  while (i < n) {
    uint64_t word;
    while (i + 8 <= n && (std::memcpy(&word, p + i, 8), (word & 0x8080808080808080) == 0)) i += 8;
    if (i == n) break;
    if (p[i] < 0x80) {
      ++i;
      continue;
    }
    const Lead lead = lead_of(p[i]);
    if (lead.length == 0) return {i, false};
    for (int k = 1; k < lead.length; ++k) {
      if (i + k == n) return {i, true};
      const unsigned char c = p[i + k];
      const bool good = k == 1 ? c >= lead.low && c <= lead.high : c >= 0x80 && c <= 0xBF;
      if (!good) return {i, false};
    }
    i += lead.length;
  }
  return {n, false};
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  while (true) {
    const size_t valid = scan_utf8(text).valid;
    out.append(text.substr(0, valid));
    if (valid == text.size()) return out;
    out += "\xEF\xBF\xBD";
    text.remove_prefix(valid + 1);
  }
}

std::string shown(std::string_view text, size_t longest) {
  const bool cut = text.size() > longest;
  text = text.substr(0, longest);
  if (cut) text = text.substr(0, scan_utf8(text).incomplete ? scan_utf8(text).valid : text.size());  // not within a character
  std::string out = replace_invalid_utf8(text);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = ' ';
  }
  return cut ? out + "..." : out;
}

}  // namespace oryx
