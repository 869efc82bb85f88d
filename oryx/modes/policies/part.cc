// part(MIXER=NAME): the tokens of a named part of the prompt are the named mixer's: "question", or "needle", which nobody but a task that hid one can know (an
// oracle). Tokens outside stay with the schedule's earlier entries.
#include <algorithm>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"
#include "oryx/modes/policy.h"

namespace oryx {

namespace {

class PartPolicy : public ModePolicy {
 public:
  explicit PartPolicy(PolicyArguments& arguments) {
    const auto parts = arguments.names_by_mixer();
    arguments.finish();
    if (parts.size() != 1) arguments.refuse("one mixer and a part's name, as in part(attention=question)");
    mixer_ = parts[0].first;
    name_ = parts[0].second;
  }

  void assign(const ModeContext& context, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const override {
    const auto found = context.facts ? context.facts->parts.find(name_) : decltype(context.facts->parts.find(name_)){};
    if (!context.facts || found == context.facts->parts.end()) {
      std::vector<std::string> names;
      if (context.facts) {
        for (const auto& [name, ranges] : context.facts->parts) names.push_back(name);
      }
      fail("schedule: part '{}' of the prompt is not known here; known: {}", shown(name_), names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", ")));
    }
    for (const auto& [from, to] : found->second) {
      const int64_t lo = std::max(from, begin), hi = std::min(to, end);
      if (lo < hi) spans.push_back({static_cast<int32_t>(lo), static_cast<int32_t>(hi), mixer_});
    }
  }

  std::vector<std::string> needs() const override { return {"part:" + name_}; }

 private:
  int32_t mixer_;
  std::string name_;
};

std::unique_ptr<ModePolicy> make_part(PolicyArguments& arguments) { return std::make_unique<PartPolicy>(arguments); }

}  // namespace

ORYX_MODE_POLICY(part, make_part);

}  // namespace oryx
