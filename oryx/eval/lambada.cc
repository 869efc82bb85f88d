// LAMBADA (Paperno et al. 2016, arXiv 1606.06031; the form that OpenAI released): the last word of a passage. Examples: {"text": ...}, in
// DATA/lambada_openai. The harness's lambada_openai.
#include "oryx/eval/choice.h"

namespace oryx {

namespace {

class Lambada : public ChoiceTask {
 public:
  ChoiceItem item(const Example& e) const override {
    const std::string& text = e.text("text");
    const size_t space = text.rfind(' ');
    if (space == std::string::npos || space + 1 == text.size()) fail("{}: 'text' has no last word behind a space", e.where());
    return {{{text.substr(0, space), text.substr(space)}}, {}, 0};
  }

 protected:
  std::string folder() const override { return "lambada_openai"; }
  std::string default_split() const override { return "test"; }
  bool normalised() const override { return false; }
};

ORYX_EVAL_TASK(lambada, "the last word of a passage (LAMBADA)", Lambada);

}  // namespace
}  // namespace oryx
