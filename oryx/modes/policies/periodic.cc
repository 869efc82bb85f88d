// periodic(MIXER=TOKENS;...;every=N;offset=0): of every N tokens of the document the first TOKENS are the named mixer's
// (of several, one after the other). Tokens in between, and those before `offset`, stay with the schedule's earlier
// entries.
#include <algorithm>

#include "oryx/modes/policy.h"

namespace oryx {

namespace {

class PeriodicPolicy : public ModePolicy {
 public:
  explicit PeriodicPolicy(PolicyArguments& arguments) {
    every_ = arguments.integer("every", 1).value_or(0);
    offset_ = arguments.integer("offset", 0).value_or(0);
    parts_ = arguments.integers_by_mixer(1);
    arguments.finish();
    if (every_ == 0 || parts_.empty())
      arguments.refuse("a mixer's tokens and a period, as in periodic(attention=64;every=256)");
    int64_t left = every_;
    for (const auto& [mixer, tokens] : parts_) {
      if (tokens > left) arguments.refuse("mixers' tokens that fit into 'every'");
      left -= tokens;
    }
  }

  void assign(const ModeContext&, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const override {
    if (end <= offset_) return;
    int64_t period =
        offset_ + std::max<int64_t>(0, begin - offset_) / every_ * every_;  // start of the one that holds `begin`
    for (; period<end; period = end - period> every_ ? period + every_ : end) {
      int64_t at = period;
      for (const auto& [mixer, tokens] : parts_) {
        const int64_t from = std::max(at, begin), to = end - at > tokens ? at + tokens : end;
        if (from < to) spans.push_back({static_cast<int32_t>(from), static_cast<int32_t>(to), mixer});
        if (to == end) return;
        at = to;
      }
    }
  }

 private:
  int64_t every_, offset_;
  std::vector<std::pair<int32_t, int64_t>> parts_;
};

std::unique_ptr<ModePolicy> make_periodic(PolicyArguments& arguments) { return std::make_unique<PeriodicPolicy>(arguments); }

}  // namespace

ORYX_MODE_POLICY(periodic, make_periodic);

}  // namespace oryx
