// Retrieval as completion: a text, a question about it, and what the model writes next must contain the answer (as the EleutherAI harness's
// squad_completion). A task is one file that derives from CompletionTask and ends in ORYX_EVAL_TASK.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "oryx/eval/json_lines.h"
#include "oryx/eval/likelihood.h"
#include "oryx/eval/task.h"
#include "oryx/generate/facts.h"
#include "oryx/generate/session.h"

namespace oryx {

struct CompletionItem {
  std::string context, question;     // the prompt is both; a schedule may treat the question otherwise
  std::vector<std::string> answers;  // one of which the completion must contain
};

// Whether `completion` contains one of `answers`: letters of ASCII are compared without case (the harness's contains_score, which folds all letters).
bool contains_answer(std::string_view completion, const std::vector<std::string>& answers);

// The schedule's name for "question and completion in attention, the text before them in the model's first mixer".
inline constexpr const char* kQuestionSchedule = "question";
// Throws Error for a schedule that the model does not know; `question` wants a model with attention.
void check_question_schedule(const ModelConfig& config, const std::string& schedule);
// The schedule for a prompt whose last `question_tokens` tokens are the question.
ModelSchedule question_schedule(const ModelConfig& config, const std::string& schedule, int64_t question_tokens);
// `question` where the model has a choice, and each mode alone.
std::vector<std::string> question_schedules(const ModelConfig& config);

class CompletionTask : public EvalTask {
 public:
  void describe(Fields& f) override;
  void validate() const override;
  EvalTable run(const EvalSubject& subject, const std::vector<std::string>& schedules) override;

  virtual CompletionItem item(const Example& example) const = 0;

 protected:
  virtual std::string folder() const = 0;     // below --data
  virtual std::string file() const = 0;       // its name without .jsonl
  virtual void describe_more(Fields&) {}      // options of the task's own

  int64_t max_new_tokens_ = 48;

 private:
  struct Prompt {
    std::vector<int32_t> ids;
    int64_t question_tokens;
  };
  // The texts that follow prompts [first, last), which run side by side; a single one piece by piece.
  std::vector<std::string> complete(const EvalSubject& subject, const std::string& schedule, const std::vector<Prompt>& prompts, size_t first, size_t last,
                                    EvalCost& cost) const;
  std::string complete_alone(const EvalSubject& subject, const std::string& schedule, const Prompt& prompt, EvalCost& cost) const;
  void count(const EvalSubject& subject, const ModelSchedule& schedule, const Prompt& prompt, const std::shared_ptr<const TokenFacts>& facts, size_t sequence,
             int64_t tokens, EvalCost& cost) const;
  Json evaluate(const EvalSubject& subject, const std::string& schedule, const std::vector<CompletionItem>& items, const std::vector<Prompt>& prompts) const;
  StateOptions state() const;

  std::string data_, kv_ = "keep";
  int64_t limit_ = 0, max_prompt_tokens_ = 0, batch_tokens_ = 4096, piece_ = 1024, seed_ = 0;
};

}  // namespace oryx
