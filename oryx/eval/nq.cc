// Natural Questions (Kwiatkowski et al. 2019; the open form) as completion: the passage that holds the answer, the question, and one of the short answers in
// what follows. Examples: {"question", "answers", "ctxs": [{"title", "text"}]}, in DATA/nq/nq_open_oracle.
#include "oryx/eval/choice.h"
#include "oryx/eval/completion.h"

namespace oryx {

namespace {

class NaturalQuestions : public CompletionTask {
 public:
  CompletionItem item(const Example& e) const override {
    CompletionItem item;
    for (const Example& passage : e.objects("ctxs")) {
      item.context += (item.context.empty() ? "" : "\n\n") + passage.text("title") + "\n" + stripped(passage.text("text"));
    }
    item.question = "\n\nQuestion: " + stripped(e.text("question")) + "?\nAnswer:";
    item.answers = e.texts("answers");
    return item;
  }

 protected:
  std::string folder() const override { return "nq"; }
  std::string file() const override { return "nq_open_oracle"; }
};

ORYX_EVAL_TASK(nq, "retrieval: a passage's answer to a question (Natural Questions)", NaturalQuestions);

}  // namespace
}  // namespace oryx
