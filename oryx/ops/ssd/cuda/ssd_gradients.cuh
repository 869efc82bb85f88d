// What the two halves of the gradients' kernel share: its shared memory, its barriers, and the work of a block.
#pragma once

#include "oryx/ops/ssd/cuda/ssd_backward.cuh"

namespace oryx::ssd_cuda {
namespace {

constexpr int kStages = 3;
// Sums of a head, in floats: row sums; column sums of four warps and d tail, both without dt; then the sum of dS S0 and
// four shares of dD.
constexpr int kRow = 0, kColumn = 64, kDTail = 320, kEnd = 448, kSkip = 452, kSumBytes = 2048;

// Of a stage's scalars, in place of the first of exp(G_C - G) dt: D, and 1 for a state's first reader, else 0.
constexpr int kSkipRate = kTail;

template <int kK>
struct Layout {
  static constexpr int kPanels = kK / 64;
  static constexpr int kDo = 0;  // of a stage
  static constexpr int kValues = kPanel;
  static constexpr int kS = 2 * kPanel;
  static constexpr int kDs = kS + kPanels * kPanel;
  static constexpr int kScalars = kDs + kPanels * kPanel;
  static constexpr int kStage = kScalars + kScalarBytes;
  static constexpr int kQueries = kStages * kStage;
  static constexpr int kKeys = kQueries + kPanels * kPanel;
  static constexpr int kW = kKeys + kPanels * kPanel;
  static constexpr int kOut = kW + kPanel;  // a panel for each of two warpgroups
  static constexpr int kSums = kOut + 2 * kPanel;
  static constexpr int kBarriers = kSums + 2 * kSumBytes;
  static constexpr int kBytes = kBarriers + 16 * kStages + 64 + 1024;  // and what aligning the start to 1024 may take
};

struct Barriers {
  uint32_t full, empty, sums_full, sums_free, pair, w, aside;
  __device__ __forceinline__ explicit Barriers(uint32_t at)
      : full(at),
        empty(at + 8 * kStages),
        sums_full(empty + 8 * kStages),
        sums_free(sums_full + 16),
        pair(sums_free + 16),
        w(pair + 8),
        aside(w + 8) {}
};

// Descriptors of panels by addition (see `descriptor`): the low word, which takes sums of bytes / 16, and from k-step
// kk on operands stored n x k (m x k) in panels of 64 k, and k x n.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address) { return (1u << 16) | (address >> 4); }
__device__ __forceinline__ uint64_t descriptor_of(uint32_t low) {
  return static_cast<uint64_t>((1u << 30) | (1024 >> 4)) << 32 | low;
}
__device__ __forceinline__ uint64_t panel_nk(uint32_t low, int kk) {
  return descriptor_of(low + (kk / 4 * kPanel + kk % 4 * 32) / 16);
}
__device__ __forceinline__ uint64_t panel_kn(uint32_t low, int kk) { return descriptor_of(low + kk * 128); }

// The work of a block: heads [first, first + heads), each in V / 64 items.
struct Block {
  int record, token, count;  // the chunk: its number, first token, tokens
  int unit, first, heads;
};

}  // namespace
}  // namespace oryx::ssd_cuda
