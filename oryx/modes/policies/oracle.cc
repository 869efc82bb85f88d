// oracle(MIXER=SHARE): the share of the prompt's tokens whose predictions attention makes better most, measured by readings in both modes with the next token known: what no
// router can do, and so a bound for those that are learned. Tokens outside, and what is generated, stay with the schedule's earlier entries.
#include "oryx/common/error.h"
#include "oryx/modes/policy.h"

namespace oryx {

namespace {

class OraclePolicy : public ModePolicy {
 public:
  explicit OraclePolicy(PolicyArguments& arguments) {
    const auto shares = arguments.numbers_by_mixer(0, 1);
    arguments.finish();
    if (shares.size() != 1) arguments.refuse("one mixer's share, as in oracle(attention=0.1)");
    mixer_ = shares[0].first;
    share_ = shares[0].second;
  }

  void assign(const ModeContext& context, int64_t begin, int64_t end, std::vector<ModeSpan>& spans) const override {
    const auto found = context.facts ? context.facts->gains.find("oracle") : decltype(context.facts->gains.find("")){};
    if (!context.facts || found == context.facts->gains.end() || static_cast<int64_t>(found->second.size()) < context.prompt_length) {
      fail("schedule: 'oracle' wants what attention gains at each of the prompt's tokens, and that is not known here");
    }
    for (const int64_t t : highest_share(found->second, context.prompt_length, share_)) {
      if (t >= begin && t < end) add_token(t, mixer_, spans);
    }
  }

  std::vector<std::string> needs() const override { return {"oracle"}; }

 private:
  int32_t mixer_;
  double share_;
};

std::unique_ptr<ModePolicy> make_oracle(PolicyArguments& arguments) { return std::make_unique<OraclePolicy>(arguments); }

}  // namespace

ORYX_MODE_POLICY(oracle, make_oracle);

}  // namespace oryx
