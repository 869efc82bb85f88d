// router(MIXER=SHARE;file=PATH): the named mixer gets the share of the tokens at which a trained head (oryx/modes/gain_head.h) predicts that attention gains most. Of a
// prompt exactly that share, the best of all; of what is generated token by token, as GainBudget decides. With causal=1 the prompt's tokens are decided as those of generated text.
// With average=1 all tokens are that are above the threshold of the share: of texts like those that the head was held out on, the share on average; of one text more or less.
// Other tokens stay with the schedule's earlier entries.
#include <algorithm>

#include "oryx/common/error.h"
#include "oryx/modes/gain_head.h"
#include "oryx/modes/policy.h"

namespace oryx {

namespace {

class RouterPolicy : public ModePolicy {
 public:
  explicit RouterPolicy(PolicyArguments& arguments) {
    const auto shares = arguments.numbers_by_mixer(0, 1);
    const auto file = arguments.text("file");
    causal_ = arguments.integer("causal", 0).value_or(0) != 0;
    average_ = arguments.integer("average", 0).value_or(0) != 0;
    arguments.finish();
    if (shares.size() != 1 || !file) arguments.refuse("one mixer's share and a router's file, as in router(attention=0.1;file=router.safetensors)");
    mixer_ = shares[0].first;
    share_ = shares[0].second;
    file_ = *file;
    head_ = load_head(file_);
  }

  void assign(const ModeContext& context, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const override {
    const int64_t prompt = causal_ || average_ ? 0 : context.prompt_length;
    const std::vector<float>& gains = known(context, prompt, end);
    if (begin < prompt) {
      for (const int64_t t : highest_share(gains, prompt, share_)) {
        if (t >= begin && t < end) add_token(t, mixer_, spans);
      }
    }
    if (end <= prompt) return;
    if (average_) {
      const double threshold = head_->threshold(share_);
      for (int64_t t = begin; t < end; ++t) {
        if (static_cast<double>(gains[static_cast<size_t>(t)]) > threshold) add_token(t, mixer_, spans);
      }
      return;
    }
    GainBudget budget(*head_, share_);
    for (int64_t t = prompt; t < end; ++t) {
      if (budget.take(gains[static_cast<size_t>(t)]) && t >= begin) add_token(t, mixer_, spans);
    }
  }

  std::vector<std::string> needs() const override { return {"router:" + file_}; }
  std::shared_ptr<const GainHead> gain_head() const override { return head_; }

 private:
  const std::vector<float>& known(const ModeContext& context, int64_t prompt, int64_t end) const {
    static const std::vector<float> none;
    const auto found = context.facts ? context.facts->gains.find("router:" + file_) : decltype(context.facts->gains.find(file_)){};
    const std::vector<float>& gains = context.facts && found != context.facts->gains.end() ? found->second : none;
    const auto count = static_cast<int64_t>(gains.size());
    if (count < prompt || gains.empty()) fail("schedule: 'router' wants the gains that its head predicts of the prompt's tokens, and there are none here");
    if (count < end) {
      fail("schedule: 'router' wants the gain of token {}, behind the prompt, which is known where text is generated one at a time; keep it to the prompt: router(...)@prompt", count);
    }
    return gains;
  }

  int32_t mixer_;
  double share_;
  bool causal_, average_;
  std::string file_;
  std::shared_ptr<const GainHead> head_;
};

std::unique_ptr<ModePolicy> make_router(PolicyArguments& arguments) { return std::make_unique<RouterPolicy>(arguments); }

}  // namespace

ORYX_MODE_POLICY(router, make_router);

}  // namespace oryx
