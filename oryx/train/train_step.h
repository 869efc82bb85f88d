// One optimiser step: forward and backward over one or more batches, clipping, AdamW.
#pragma once

#include <cstdint>

#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"
#include "oryx/train/batch_source.h"
#include "oryx/train/optimizer.h"

namespace oryx {

struct StepOptions {
  int64_t accumulate = 1;         // batches whose gradients are averaged
  double clip = 1.0;              // largest global norm of the gradient; 0: no clipping
  double z_loss = 0;              // weight of lse^2
  bool checkpoint_layers = false; // recompute activations
};

struct StepResult {
  double loss = 0;           // mean over the batches
  double gradient_norm = 0;  // before clipping
  int64_t tokens = 0;
  double attention_share = 0;  // of the tokens, over all batches
  bool skipped = false;        // loss or gradient not finite: the parameters are as before
};

// Draws `options.accumulate` batches from `source` and steps. Random modes are functions of (seed, step, sequence).
StepResult train_step(LanguageModel& model, Optimizer& optimizer, BatchSource& source, const ModelSchedule& schedule, double lr, uint64_t seed,
                      int64_t step, const StepOptions& options);

}  // namespace oryx
