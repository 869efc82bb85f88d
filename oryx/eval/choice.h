// Language-model tasks scored by likelihood, as the EleutherAI harness scores them: multiple choice, and a last word. A task is one file that derives from
// ChoiceTask and ends in ORYX_EVAL_TASK.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "oryx/eval/json_lines.h"
#include "oryx/eval/likelihood.h"
#include "oryx/eval/task.h"

namespace oryx {

struct ChoiceItem {
  std::vector<std::pair<std::string, std::string>> requests;  // context and continuation, one a choice
  // What acc_norm divides the log-likelihoods by the length of; one a request.
  std::vector<std::string> choices;
  int64_t gold = 0;
};

struct ChoiceScore {
  double acc = 0, acc_norm = 0, acc_bytes = 0;  // 0 or 1
  double log_p = 0;                             // of the right choice
};

// The choice with the largest log-likelihood (of equals the first) is right: acc. acc_norm: divided by the choice's characters, acc_bytes: by its bytes.
// Of a single request acc says whether greedy decoding gives the continuation.
ChoiceScore score_choices(const ChoiceItem& item, const std::vector<Likelihood>& likelihoods);

class ChoiceTask : public EvalTask {
 public:
  void describe(Fields& f) override;
  EvalTable run(const EvalSubject& subject, const std::vector<std::string>& schedules) override;

  // The example as requests, by the harness's templates.
  virtual ChoiceItem item(const Example& example) const = 0;

 protected:
  // Examples stand in DATA/folder()/SPLIT.jsonl(.zst).
  virtual std::string folder() const = 0;
  virtual std::string default_split() const { return "validation"; }
  virtual bool normalised() const { return true; }  // acc_norm and acc_bytes are reported

 private:
  std::vector<EvalColumn> columns() const;
  Json evaluate(const EvalSubject& subject, const ModelSchedule& schedule, const std::vector<ChoiceItem>& items) const;

  std::string data_, split_;
  int64_t limit_ = 0, batch_tokens_ = 4096, seed_ = 0;
};

// Characters of UTF-8 text, as Python's len counts them.
int64_t characters(std::string_view text);
// Without white space at both ends, as Python's str.strip for ASCII's.
std::string stripped(std::string_view text);

}  // namespace oryx
