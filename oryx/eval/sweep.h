// Which tokens deserve attention, and which keys and values are worth keeping: one task (oryx/eval/task.h) under many schedules, or under many policies of kept rows, over
// several models (seeds), as curves of what it measures against the share of attention tokens or the bytes of keys and values.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "oryx/eval/task.h"

namespace oryx {

// One setting: a point of a curve.
struct SweepPoint {
  std::string set;                 // "share", "kv" or "switches"
  std::string curve, label;        // "last tokens", "10%"
  std::string schedule, kv = "keep";
};

struct SweepOptions {
  std::vector<double> shares{0.02, 0.05, 0.1, 0.25, 0.5, 0.75};  // of tokens in attention, in (0, 1)
  int64_t chunk = 1;                                             // of the random schedule in "share"
  std::vector<int64_t> rows{16, 32, 64, 128};                    // kept by a state, beside its first ones
  int64_t first = 4, window = 8;                                 // of rows that are always kept
  std::vector<int64_t> chunks{1, 4, 16, 64, 256};                // of switches
  int64_t draws = 4;                                             // random schedules of each chunk
  bool parts = true;  // the task names its prompts' parts, question and needle
  std::vector<std::string> routers;  // share: routers' files, {model} standing for the model's folder
  bool average = false;              // share: routers also by threshold alone, the share on average over texts
  std::vector<std::string> without;  // curves that are left out
  bool oracle = false;               // share: the tokens at which attention gains most, as measured

  void describe(Fields& f);
  void validate() const;
};

// "key=value" with the brackets that a list of these options wants and that a user may leave out.
std::string bracketed(const Fields& fields, const std::string& assignment);

// "share": what a rule that picks the tokens in attention makes of a share of them, all rows kept: the prompt's last tokens, tokens at random, the question, the needle (an
// oracle), the most surprising ones, and the last two with the question.
// "kv": what is left of the answers when fewer rows are kept, the question in attention: a window, the most surprising rows, those that change the recurrent state most, rows at random; all; none, wholly linear.
// "switches": switch points that nobody chose for the model's good: random chunks of all sizes, a switch at every token, the question in the other mode than the rest.
// Throws Error for a set of another name.
std::vector<SweepPoint> sweep_points(const std::string& set, const SweepOptions& options);

struct SweepRow {
  SweepPoint point;
  std::vector<double> values;  // by model: the task's measure, a mean over its rows
  double attention_share = 0, kv_bytes = 0, flops_per_token = 0;  // means over models and rows; bytes beyond recurrent states and tails

  double mean() const;
  double least() const;
  double most() const;
};

struct SweepResult {
  std::string task, measure;  // "recall", "accuracy"
  std::vector<std::string> models;
  std::vector<SweepRow> rows;

  Json json() const;
  EvalTable table(const std::string& set) const;
};

// Runs `task` with `overrides` (key=value of its options) at each point, for one more model. Throws Error for a task that measures nothing that a sweep knows, or that has no
// option `kv` where a point wants one.
void run_sweep(SweepResult& result, const EvalSubject& subject, const std::string& task, const std::vector<std::string>& overrides, const std::vector<SweepPoint>& points,
               const std::function<void(const SweepRow& row)>& progress = {});

// report.html with tables and pictures, sweep.json, and share.svg and kv.svg where their sets are there, in `folder`, which must exist.
void write_sweep(const SweepResult& result, const std::string& command, const std::filesystem::path& folder);

}  // namespace oryx
