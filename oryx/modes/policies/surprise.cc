// surprise(MIXER=SHARE): of the prompt's tokens the share whose values the recurrent state predicts worst is the named mixer's; of equals the earlier ones. A first
// linear pass over the prompt gives the scores (oryx/model/surprise.h). Other tokens stay with the schedule's earlier entries.
#include "oryx/common/error.h"
#include "oryx/modes/policy.h"

namespace oryx {

namespace {

class SurprisePolicy : public ModePolicy {
 public:
  explicit SurprisePolicy(PolicyArguments& arguments) {
    const auto shares = arguments.numbers_by_mixer(0, 1);
    arguments.finish();
    if (shares.size() != 1) arguments.refuse("one mixer's share, as in surprise(attention=0.1)");
    mixer_ = shares[0].first;
    share_ = shares[0].second;
  }

  void assign(const ModeContext& context, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const override {
    if (!context.facts || static_cast<int64_t>(context.facts->surprise.size()) < context.prompt_length) {
      fail("schedule: 'surprise' wants the scores of a first pass over the prompt, and there are none here");
    }
    for (const int64_t t : highest_share(context.facts->surprise, context.prompt_length, share_)) {
      if (t >= begin && t < end) add_token(t, mixer_, spans);
    }
  }

  std::vector<std::string> needs() const override { return {"surprise"}; }

 private:
  int32_t mixer_;
  double share_;
};

std::unique_ptr<ModePolicy> make_surprise(PolicyArguments& arguments) { return std::make_unique<SurprisePolicy>(arguments); }

}  // namespace

ORYX_MODE_POLICY(surprise, make_surprise);

}  // namespace oryx
