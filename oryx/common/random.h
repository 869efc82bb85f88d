// Counter-based random numbers: the n-th draw of a stream is a pure function of (seed, stream, n), so that resumed, split and
// data-parallel runs draw the same. Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
#pragma once

#include <array>
#include <cstdint>

namespace oryx {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// A stream of draws, named by a seed and up to two indices (a step and a sequence, say).
class CounterRng {
 public:
  explicit CounterRng(uint64_t seed, uint64_t a = 0, uint32_t b = 0);
  uint32_t next32();
  uint64_t next64() { return (uint64_t{next32()} << 32) | next32(); }
  double uniform() { return static_cast<double>(next64() >> 11) * 0x1.0p-53; }  // [0, 1)
  // [0, n), without the bias of a plain modulo. n > 0.
  uint64_t below(uint64_t n);
  double normal();  // mean 0, deviation 1 (Box-Muller)

 private:
  std::array<uint32_t, 2> key_;
  std::array<uint32_t, 4> counter_;  // [draw block, b, a low, a high]
  std::array<uint32_t, 4> block_{};
  int left_ = 0;
};

}  // namespace oryx
