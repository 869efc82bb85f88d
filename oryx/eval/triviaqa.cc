// TriviaQA (Joshi et al. 2017, arXiv 1705.03551) as completion, without a text to read: what the model knows by itself, which tells retrieval from memory.
// Examples: {"context": "Question: ...\nAnswer:", "answer", "aliases"}, in DATA/triviaqa/sm_sub.
#include "oryx/eval/completion.h"

namespace oryx {

namespace {

class TriviaQa : public CompletionTask {
 public:
  CompletionItem item(const Example& e) const override {
    CompletionItem item{"", e.text("context"), e.texts("aliases")};
    item.answers.push_back(e.text("answer"));
    return item;
  }

 protected:
  std::string folder() const override { return "triviaqa"; }
  std::string file() const override { return "sm_sub"; }
};

ORYX_EVAL_TASK(triviaqa, "questions without a text to read (TriviaQA): knowledge, beside retrieval", TriviaQa);

}  // namespace
}  // namespace oryx
