// Evaluation tasks: what `oryx eval` offers. A task is added as one file in oryx/eval/ that derives from EvalTask and ends in
// ORYX_EVAL_TASK; its options, their help and their checks come from describe() (oryx/common/options.h).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/common/options.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/language_model.h"

namespace oryx {

// How a value of a column is shown.
using CellFormat = std::function<std::string(const Json&)>;
CellFormat cell_text();
CellFormat cell_fixed(int digits);
CellFormat cell_percent();  // of a share in [0, 1]
CellFormat cell_count();    // "1.2k"
CellFormat cell_bytes();    // "1.5 MiB"

struct EvalColumn {
  std::string key;    // in the rows and the JSON
  std::string title;  // in the table
  CellFormat format;
};

struct EvalTable {
  std::vector<EvalColumn> columns;
  std::vector<Json> rows;  // objects; they may hold keys that are no column
};

// Aligned text: a line of titles and one a row. null shows as "-".
std::string format_table(const EvalTable& table);
// Its cells as text, the titles first.
std::vector<std::vector<std::string>> table_cells(const EvalTable& table);
// Throws Error when a number in the rows is not finite (JSON has no way to say it).
void check_finite(const EvalTable& table);

struct EvalSubject {
  const LanguageModel& model;
  const Tokenizer* tokenizer = nullptr;  // null: the model has none
  std::string name;                      // for messages: the model's folder
};

class EvalTask {
 public:
  virtual ~EvalTask() = default;
  virtual void describe(Fields& f) = 0;
  virtual void validate() const {}
  // Evaluates under each of `schedules` (empty: the task's own list), with a progress bar on standard error.
  virtual EvalTable run(const EvalSubject& subject, const std::vector<std::string>& schedules) = 0;
};

struct EvalTaskKind {
  std::string name, summary;
  std::unique_ptr<EvalTask> (*make)();
};
std::vector<EvalTaskKind> eval_tasks();  // sorted by name

struct EvalTaskRegistration {
  EvalTaskRegistration(const char* name, const char* summary, std::unique_ptr<EvalTask> (*make)());
};

// The mixers that all tokens can be put into, in the model's order; {"linear"} where there is nothing to choose (each layer has one
// mixer, or combines all of its own).
std::vector<std::string> single_modes(const ModelConfig& config);
// True when some layer can take attention for some tokens and something else, its first mixer, for others.
bool has_attention_choice(const ModelConfig& config);

}  // namespace oryx

// `name` is an identifier, `type` the class.
#define ORYX_EVAL_TASK(name, summary, type)                                  \
  static const ::oryx::EvalTaskRegistration oryx_eval_task_##name(#name, summary, \
                                                                  []() -> std::unique_ptr<::oryx::EvalTask> { return std::make_unique<type>(); })
