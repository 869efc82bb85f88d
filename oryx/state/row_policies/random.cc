// random: tokens drawn at random, other ones in each layer: what a policy that looks at tokens has to beat. A draw is a function of (seed, layer, position).
#include "oryx/common/random.h"
#include "oryx/state/row_policy.h"

namespace oryx {

namespace {

constexpr uint64_t kRandomRows = 0x726f77732f726e64;  // keeps these draws apart from others of the same seed

float score_at_random(const RowToken& token) {
  const uint64_t seed = token.seed ^ kRandomRows;
  const auto bits = philox({static_cast<uint32_t>(token.position), static_cast<uint32_t>(token.position >> 32), static_cast<uint32_t>(token.layer), 0},
                           {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return static_cast<float>(bits[0] >> 8) * 0x1.0p-24F;  // [0, 1)
}

}  // namespace

ORYX_ROW_POLICY(random, "tokens drawn at random", TokenMeasure::kNone, score_at_random);

}  // namespace oryx
