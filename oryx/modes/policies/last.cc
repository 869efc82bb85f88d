// last(MIXER=TOKENS): the prompt's last TOKENS tokens are the named mixer's (of several, the first named stands nearest to the end). All other tokens, and what
// is generated, stay with the schedule's earlier entries.
#include <algorithm>

#include "oryx/modes/policy.h"

namespace oryx {

namespace {

class LastPolicy : public ModePolicy {
 public:
  explicit LastPolicy(PolicyArguments& arguments) {
    parts_ = arguments.integers_by_mixer(1);
    arguments.finish();
    if (parts_.empty()) arguments.refuse("a mixer's tokens, as in last(attention=256)");
  }

  void assign(const ModeContext& context, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const override {
    std::vector<ModeSpan> all;  // from the prompt's end backwards
    int64_t at = context.prompt_length;
    for (const auto& [mixer, tokens] : parts_) {
      const int64_t from = std::max<int64_t>(0, at - tokens), lo = std::max(from, begin), hi = std::min(at, end);
      if (lo < hi) all.push_back({static_cast<int32_t>(lo), static_cast<int32_t>(hi), mixer});
      at = from;
    }
    spans.insert(spans.end(), all.rbegin(), all.rend());
  }

 private:
  std::vector<std::pair<int32_t, int64_t>> parts_;
};

std::unique_ptr<ModePolicy> make_last(PolicyArguments& arguments) { return std::make_unique<LastPolicy>(arguments); }

}  // namespace

ORYX_MODE_POLICY(last, make_last);

}  // namespace oryx
