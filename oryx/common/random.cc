#include "oryx/common/random.h"

#include <cmath>
#include <numbers>

namespace oryx {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(p0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return c;
}

CounterRng::CounterRng(uint64_t seed, uint64_t a, uint32_t b)
    : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
      counter_{0, b, static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32)} {}

uint32_t CounterRng::next32() {
  if (left_ == 0) {
    block_ = philox(counter_, key_);
    ++counter_[0];
    left_ = 4;
  }
  return block_[4 - left_--];
}

uint64_t CounterRng::below(uint64_t n) {
  const uint64_t limit = UINT64_MAX - UINT64_MAX % n;
  uint64_t x = next64();
  while (x >= limit) x = next64();
  return x % n;
}

double CounterRng::normal() {
  const double radius = std::sqrt(-2 * std::log(1 - uniform()));
  return radius * std::cos(2 * std::numbers::pi * uniform());
}

}  // namespace oryx
