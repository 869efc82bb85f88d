// PIQA (Bisk et al. 2020, arXiv 1911.11641): which of two ways reaches a goal. Examples: {"goal", "sol1", "sol2", "label"}, in DATA/piqa. The harness's
// piqa.
#include "oryx/eval/choice.h"

namespace oryx {

namespace {

class Piqa : public ChoiceTask {
 public:
  ChoiceItem item(const Example& e) const override {
    const std::string context = "Question: " + e.text("goal") + "\nAnswer:";
    ChoiceItem item{{}, {e.text("sol1"), e.text("sol2")}, e.integer("label")};
    for (const auto& choice : item.choices) item.requests.emplace_back(context, " " + choice);
    return item;
  }

 protected:
  std::string folder() const override { return "piqa"; }
};

ORYX_EVAL_TASK(piqa, "which of two ways reaches a goal (PIQA)", Piqa);

}  // namespace
}  // namespace oryx
