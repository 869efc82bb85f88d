// BoolQ (Clark et al. 2019, arXiv 1905.10044): yes or no, from a passage. Examples: {"passage", "question", "answer": true}, in DATA/boolq. The harness's
// boolq (version 2).
#include "oryx/eval/choice.h"

namespace oryx {

namespace {

class BoolQ : public ChoiceTask {
 public:
  ChoiceItem item(const Example& e) const override {
    const std::string context = e.text("passage") + "\nQuestion: " + e.text("question") + "?\nAnswer:";
    return {{{context, " no"}, {context, " yes"}}, {"no", "yes"}, e.boolean("answer") ? 1 : 0};
  }

 protected:
  std::string folder() const override { return "boolq"; }
  bool normalised() const override { return false; }
};

ORYX_EVAL_TASK(boolq, "yes or no, from a passage (BoolQ)", BoolQ);

}  // namespace
}  // namespace oryx
