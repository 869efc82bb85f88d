// SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250) as completion: a paragraph, a question, and the answer's span in what follows. Examples: {"context",
// "question", "answers": [{"text"}]}, in DATA/squad/xquad_en (the English part of XQuAD, arXiv 1910.11856).
#include "oryx/eval/choice.h"
#include "oryx/eval/completion.h"

namespace oryx {

namespace {

class Squad : public CompletionTask {
 public:
  CompletionItem item(const Example& e) const override {
    CompletionItem item{stripped(e.text("context")), "\n\nQuestion: " + stripped(e.text("question")) + "\nAnswer:", {}};
    for (const Example& answer : e.objects("answers")) item.answers.push_back(stripped(answer.text("text")));
    return item;
  }

 protected:
  std::string folder() const override { return "squad"; }
  std::string file() const override { return "xquad_en"; }
};

ORYX_EVAL_TASK(squad, "retrieval: a paragraph's answer to a question (SQuAD)", Squad);

}  // namespace
}  // namespace oryx
