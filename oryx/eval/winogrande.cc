// WinoGrande (Sakaguchi et al. 2019, arXiv 1907.10641): whom a sentence speaks of. Partial evaluation (Trinh and Le 2018, arXiv 1806.02847): each option is
// put into the blank, and the same rest of the sentence is scored behind both. Examples: {"sentence" with "_", "option1", "option2", "answer": "1"}, in
// DATA/winogrande. The harness's winogrande.
#include "oryx/eval/choice.h"

namespace oryx {

namespace {

class WinoGrande : public ChoiceTask {
 public:
  ChoiceItem item(const Example& e) const override {
    const std::string &sentence = e.text("sentence"), &answer = e.text("answer");
    const size_t blank = sentence.find('_');
    if (blank == std::string::npos) fail("{}: 'sentence' has no blank (_)", e.where());
    if (answer != "1" && answer != "2") e.refuse("answer", answer, "\"1\" or \"2\"");
    const std::string rest = " " + stripped(std::string_view(sentence).substr(blank + 1));
    ChoiceItem item;
    item.gold = answer == "2" ? 1 : 0;
    for (const char* option : {"option1", "option2"}) {
      item.choices.push_back(sentence.substr(0, blank) + e.text(option));
      item.requests.emplace_back(item.choices.back(), rest);
    }
    return item;
  }

 protected:
  std::string folder() const override { return "winogrande"; }
  bool normalised() const override { return false; }
};

ORYX_EVAL_TASK(winogrande, "whom a sentence speaks of (WinoGrande)", WinoGrande);

}  // namespace
}  // namespace oryx
