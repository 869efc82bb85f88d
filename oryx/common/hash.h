// FNV-1a, 64 bits (Fowler, Noll, Vo): a fingerprint against mix-ups and damage, not against forgery. Its values stand
// in files, so it never changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace oryx {

constexpr uint64_t kFnvStart = 0xcbf29ce484222325;

// Continues from `hash`, so that a stream may be hashed in pieces: fnv1a(b, fnv1a(a)) == fnv1a(a + b).
inline uint64_t fnv1a(const void* data, size_t size, uint64_t hash = kFnvStart) {
  const auto* p = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < size; ++i) hash = (hash ^ p[i]) * 0x100000001b3;
  return hash;
}
inline uint64_t fnv1a(std::string_view text, uint64_t hash = kFnvStart) {
  return fnv1a(text.data(), text.size(), hash);
}

}  // namespace oryx
