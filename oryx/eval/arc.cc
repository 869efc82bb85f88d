// ARC (Clark et al. 2018, arXiv 1803.05457): school science questions, easy and hard. Examples: {"question", "choices", "answerKey"}, in DATA/arc_easy and
// DATA/arc_challenge. The harness's arc_easy and arc_challenge.
#include "oryx/eval/labelled_choices.h"

namespace oryx {

namespace {

class ArcEasy : public ChoiceTask {
 public:
  ChoiceItem item(const Example& e) const override { return labelled_choices(e, "Question: " + e.text("question") + "\nAnswer:"); }

 protected:
  std::string folder() const override { return "arc_easy"; }
  std::string default_split() const override { return "test"; }
};

class ArcChallenge : public ArcEasy {
 protected:
  std::string folder() const override { return "arc_challenge"; }
};

ORYX_EVAL_TASK(arc_easy, "school science questions (ARC, the easy ones)", ArcEasy);
ORYX_EVAL_TASK(arc_challenge, "school science questions (ARC, the hard ones)", ArcChallenge);

}  // namespace
}  // namespace oryx
