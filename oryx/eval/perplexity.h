// Perplexity of a model on token data under a mode schedule.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "oryx/data/loader.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"

namespace oryx {

struct PerplexityOptions {
  // Of a schedule that draws at random. Window i of the reader is sequence i, however the reader packs windows into batches.
  uint64_t seed = 0, step = 0;
  // Gives the bytes that the targets stand for, and so bits per byte. May be null.
  const Tokenizer* tokenizer = nullptr;
  // FLOPs are counted too (some time for long windows under random schedules).
  bool count_flops = true;
  StateOptions state = {};  // what is kept of keys and values; all: windows run without a state, which gives the same
  // Called after each batch with the targets scored so far and their mean loss in nats.
  std::function<void(int64_t targets, double nats)> progress = {};
};

struct PerplexityResult {
  std::string schedule;
  double nll_sum = 0;       // nats, over all targets
  int64_t targets = 0;      // tokens scored
  int64_t windows = 0;      // sequences that they stood in
  int64_t longest = 0;      // tokens of the longest
  int64_t text_bytes = 0;   // that the targets stand for; 0 without a tokenizer
  double attention_share = 0;   // of all (token, layer) pairs, those in mixer `attention`
  double flops_per_token = 0;   // forward; 0 when not counted
  int64_t state_bytes = 0;      // of one sequence as long as the longest window
  double seconds = 0;

  double nats() const { return nll_sum / static_cast<double>(targets); }  // mean loss
  double perplexity() const;
  std::optional<double> bits_per_byte() const;  // nothing when the bytes are not known
};

// Reads `reader` from its beginning to its end; no gradients are kept. Throws Error when a batch's loss is not finite, and
// Interrupted after Ctrl-C.
PerplexityResult evaluate_perplexity(const LanguageModel& model, const ModelSchedule& schedule, EvalReader& reader,
                                     const PerplexityOptions& options = {});

}  // namespace oryx
