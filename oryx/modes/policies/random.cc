// random(MIXER=SHARE;...;chunk=256;seed=N): training's assignment. Each chunk of the document is, independently, a
// named mixer's with the probability SHARE, else the layer's first mixer's. Chunks are counted from the document's
// start. Without `seed` the run's is used.
#include <optional>

#include "oryx/common/random.h"
#include "oryx/modes/policy.h"

namespace oryx {

namespace {

// Keeps these draws apart from others that are made with the same seed, step and sequence.
constexpr uint64_t kStream = 0x6d6f6465732f7264;

class RandomPolicy : public ModePolicy {
 public:
  explicit RandomPolicy(PolicyArguments& arguments) {
    chunk_ = arguments.integer("chunk", 1).value_or(256);
    seed_ = arguments.integer("seed", 0);
    shares_ = arguments.numbers_by_mixer(0, 1);
    arguments.finish();
    double sum = 0;
    for (const auto& [mixer, share] : shares_) sum += share;
    if (shares_.empty()) arguments.refuse("a mixer's share, as in random(attention=0.25)");
    if (sum > 1 + 1e-9) arguments.refuse("shares of at most 1 together");
  }

  void assign(const ModeContext& context, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const override {
    for (int64_t chunk = begin / chunk_; begin < end; ++chunk) {
      // Not (chunk + 1) * chunk_, which a large chunk would overflow.
      const int64_t stop = end - begin > chunk_ - begin % chunk_ ? begin + (chunk_ - begin % chunk_) : end;
      spans.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(stop), draw(context, chunk)});
      begin = stop;
    }
  }

  bool is_random() const override { return true; }

 private:
  int32_t draw(const ModeContext& context, int64_t chunk) const {
    const uint64_t seed = (seed_ ? static_cast<uint64_t>(*seed_) : context.seed) ^ kStream;
    // The chunk is the counter, so that any part of a document can be drawn without the part before it.
    const auto bits = philox({static_cast<uint32_t>(chunk), static_cast<uint32_t>(context.sequence),
                              static_cast<uint32_t>(context.step), static_cast<uint32_t>(context.step >> 32)},
                             {static_cast<uint32_t>(seed),
                              static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(context.sequence >> 32)});
    double u = static_cast<double>((uint64_t{bits[0]} << 21) ^ (bits[1] >> 11)) * 0x1.0p-53;  // [0, 1)
    for (const auto& [mixer, share] : shares_) {
      if (u < share) return mixer;
      u -= share;
    }
    return 0;
  }

  int64_t chunk_;
  std::optional<int64_t> seed_;
  std::vector<std::pair<int32_t, double>> shares_;
};

std::unique_ptr<ModePolicy> make_random(PolicyArguments& arguments) { return std::make_unique<RandomPolicy>(arguments); }

}  // namespace

ORYX_MODE_POLICY(random, make_random);

}  // namespace oryx
