// OpenBookQA (Mihaylov et al. 2018, arXiv 1809.02789): elementary science, to be reasoned out. Examples: {"question_stem", "choices", "answerKey"}, in
// DATA/openbookqa. The harness's openbookqa.
#include "oryx/eval/labelled_choices.h"

namespace oryx {

namespace {

class OpenBookQa : public ChoiceTask {
 public:
  ChoiceItem item(const Example& e) const override { return labelled_choices(e, e.text("question_stem")); }

 protected:
  std::string folder() const override { return "openbookqa"; }
  std::string default_split() const override { return "test"; }
};

ORYX_EVAL_TASK(openbookqa, "elementary science, to be reasoned out (OpenBookQA)", OpenBookQa);

}  // namespace
}  // namespace oryx
