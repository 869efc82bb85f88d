// The first half of `oryx demo`: one set of weights, trained with mixed modes on associative recall, then run wholly linear, wholly in
// attention, and with attention on the queries alone.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "oryx/common/options.h"
#include "oryx/data/synthetic.h"
#include "oryx/eval/recall.h"
#include "oryx/model/config.h"

namespace oryx {

struct RecallDemoOptions {
  int64_t seed = 1;
  int64_t steps = 1600, tokens_per_step = 2048, warmup_steps = 50;
  double lr = 6e-3, weight_decay = 0.01;
  // The task: a linear state of head_dim x value_head_dim numbers is truly too small for so many pairs.
  int64_t pairs = 60, queries = 12, symbols = 64;
  int64_t length = 0, filler_symbols = 0;  // tokens of a sequence, filled up with noise; 0: no noise
  int64_t first_pairs = 4;        // pairs in the beginning
  double curriculum = 0.5;        // share of the steps over which they grow
  int64_t hidden_size = 64, heads = 1, head_dim = 16, value_head_dim = 64, layers = 2;
  int64_t chunk = 16;             // of the random modes
  double attention_share = 0.25;
  int64_t examples = 400;         // unseen sequences, for each row of the table
  // What must hold for the demo to succeed: attention correct, mixed below attention and linear below attention.
  double want_attention = 0.95, want_mixed_within = 0.03, want_linear_below = 0.30;

  void describe(Fields& f);
  void validate() const;
  ModelConfig model() const;
  RecallOptions task() const;
};

struct RecallDemoResult {
  RecallResult linear, attention, mixed;
  std::vector<RecallResult> by_last, by_random;  // growing shares of attention tokens
  std::vector<std::pair<double, double>> losses; // (step, loss)
  int64_t train_tokens = 0;
  double seconds = 0;
  std::vector<std::string> missed;  // what was wanted and not reached, in words; empty: success
};

// Trains and evaluates, with a progress bar each; the model is saved in `model_folder`, unless that is empty. Throws Interrupted after Ctrl-C.
RecallDemoResult run_recall_demo(const RecallDemoOptions& options, const std::filesystem::path& model_folder = {});

// The self-contained report.
void write_recall_report(const RecallDemoOptions& options, const RecallDemoResult& result, const std::filesystem::path& path);

}  // namespace oryx
