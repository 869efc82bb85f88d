// router(MIXER=SHARE;file=PATH): the named mixer gets the share of the tokens at which a trained head (oryx/modes/gain_head.h) predicts that attention gains most. Of a
// prompt exactly that share, the best of all; of what is generated token by token, as GainBudget decides. With causal=1 the prompt's tokens are decided as those of generated text.
// With window=W the budget's threshold follows the last W gains, and the share is kept from below as well. With average=1 all tokens are taken that are above the threshold of the
// share: of texts like those that the head was held out on, the share on average; of one text more or less. Other tokens stay with the schedule's earlier entries.
#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/modes/gain_budget.h"
#include "oryx/modes/policy.h"

namespace oryx {

namespace {

struct RouterSettings {
  double share = 0;
  bool causal = false, average = false;
  int64_t window = 0;
};

// What a router has decided of a text so far.
class RouterDecisions : public PolicyNotes::Note {
 public:
  RouterDecisions(const GainHead& head, const RouterSettings& settings)
      : settings_(settings), threshold_(head.threshold(settings.share)), budget_(head, settings.share, settings.window) {}

  bool taken(int64_t t) const { return taken_[static_cast<size_t>(t)] != 0; }

  // Decides on the tokens up to `end`.
  void extend(const ModeContext& context, const std::vector<float>& gains, int64_t end) {
    while (decided() < end) {
      const int64_t prompt = settings_.causal || settings_.average ? 0 : prompt_end(context, decided());
      if (prompt > decided()) {
        take_best(gains, prompt);
      } else {
        take_next(gains);
      }
    }
  }

 private:
  int64_t decided() const { return static_cast<int64_t>(taken_.size()); }

  // Of the prompt that holds token t; 0: it is generated.
  static int64_t prompt_end(const ModeContext& context, int64_t t) {
    if (context.facts->prompts.empty()) return t < context.prompt_length ? context.prompt_length : 0;
    for (const auto& [begin, end] : context.facts->prompts) {
      if (t >= begin && t < end) return end;
    }
    return 0;
  }

  // A prompt up to `end`, which is decided as a whole.
  void take_best(const std::vector<float>& gains, int64_t end) {
    const int64_t begin = decided();
    if (static_cast<int64_t>(gains.size()) < end) fail("schedule: 'router' wants the gains that its head predicts of the prompt's tokens, and there are none here");
    const std::vector<float> own(gains.begin() + begin, gains.begin() + end);
    taken_.resize(static_cast<size_t>(end), 0);
    if (std::any_of(own.begin(), own.end(), [](float g) { return std::isnan(g); })) return;
    for (const int64_t t : highest_share(own, end - begin, settings_.share)) taken_[static_cast<size_t>(begin + t)] = 1;
  }

  void take_next(const std::vector<float>& gains) {
    const int64_t t = decided();
    if (gains.empty()) fail("schedule: 'router' wants the gains that its head predicts of the prompt's tokens, and there are none here");
    if (static_cast<int64_t>(gains.size()) <= t) {
      fail("schedule: 'router' wants the gain of token {}, behind the prompt, which is known where text is generated one at a time; keep it to the prompt: router(...)@prompt", t);
    }
    const float gain = gains[static_cast<size_t>(t)];
    const bool take = !std::isnan(gain) && (settings_.average ? static_cast<double>(gain) > threshold_ : budget_.take(gain));
    taken_.push_back(take ? 1 : 0);
  }

  RouterSettings settings_;
  double threshold_;
  GainBudget budget_;
  std::vector<uint8_t> taken_;
};

class RouterPolicy : public ModePolicy {
 public:
  explicit RouterPolicy(PolicyArguments& arguments) {
    const auto shares = arguments.numbers_by_mixer(0, 1);
    const auto file = arguments.text("file");
    settings_.causal = arguments.integer("causal", 0).value_or(0) != 0;
    settings_.average = arguments.integer("average", 0).value_or(0) != 0;
    settings_.window = arguments.integer("window", 0).value_or(0);
    arguments.finish();
    if (shares.size() != 1 || !file) arguments.refuse("one mixer's share and a router's file, as in router(attention=0.1;file=router.safetensors)");
    if (settings_.average && settings_.window > 0) arguments.refuse("either average=1, one threshold for all texts, or a window, which follows the text");
    if (settings_.window > GainBudget::kMostWindow) arguments.refuse(fmt::format("a window of at most {} tokens", GainBudget::kMostWindow));
    mixer_ = shares[0].first;
    settings_.share = shares[0].second;
    file_ = *file;
    head_ = arguments.head(file_);
    name_ = fmt::format("router {} {} {} {} {}", settings_.share, settings_.causal, settings_.average, settings_.window, file_);
  }

  void assign(const ModeContext& context, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const override {
    const TokenFacts* facts = context.facts.get();
    const auto found = facts != nullptr ? facts->gains.find("router:" + file_) : std::map<std::string, std::vector<float>>::const_iterator{};
    if (facts == nullptr || found == facts->gains.end()) fail("schedule: 'router' wants the gains that its head predicts of the prompt's tokens, and there are none here");
    auto& decisions = static_cast<RouterDecisions&>(facts->notes.of(name_, [&] { return std::make_unique<RouterDecisions>(*head_, settings_); }));
    decisions.extend(context, found->second, end);
    for (int64_t t = begin; t < end; ++t) {
      if (decisions.taken(t)) add_token(t, mixer_, spans);
    }
  }

  std::vector<std::string> needs() const override { return {"router:" + file_}; }
  std::shared_ptr<const GainHead> gain_head() const override { return head_; }

 private:
  int32_t mixer_;
  RouterSettings settings_;
  std::string file_, name_;
  std::shared_ptr<const GainHead> head_;
};

std::unique_ptr<ModePolicy> make_router(PolicyArguments& arguments) { return std::make_unique<RouterPolicy>(arguments); }

}  // namespace

ORYX_MODE_POLICY(router, make_router);

}  // namespace oryx
