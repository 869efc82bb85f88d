// One optimiser step: forward and backward over one or more batches, clipping, AdamW.
#pragma once

#include <cstdint>
#include <functional>

#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"
#include "oryx/train/batch_feed.h"
#include "oryx/train/optimizer.h"

namespace oryx {

struct StepOptions {
  int64_t accumulate = 1;         // batches whose gradients are averaged
  double clip = 1.0;              // largest global norm of the gradient; 0: no clipping
  double z_loss = 0;              // weight of lse^2
  bool checkpoint_layers = false; // recompute activations
};

struct StepResult {
  int64_t tokens = 0;
  double attention_share = 0;  // of the tokens, over all batches
  double flops = 0;            // of the model: three times the forward pass's

  // Known at once on the CPU, on a GPU after read(), which waits for the device.
  double loss = 0;           // mean over the batches
  double gradient_norm = 0;  // before clipping
  bool skipped = false;      // loss or gradient not finite: the parameters are as before
  void read();

  at::Tensor record;  // on the device, until it is read: Optimizer::update
};

class StepGraphs;

// Takes `options.accumulate` batches from the feed and steps. graphs: of this model and these options, for a feed that packs; steps that it has captured are replayed.
StepResult train_step(LanguageModel& model, Optimizer& optimizer, BatchFeed& feed, double lr, const StepOptions& options, StepGraphs* graphs = nullptr);

// The same with batches drawn from `source`, and the result read. Random modes are functions of (seed, step, sequence).
StepResult train_step(LanguageModel& model, Optimizer& optimizer, BatchSource& source, const ModelSchedule& schedule, double lr, uint64_t seed,
                      int64_t step, const StepOptions& options);

struct StepBatch {
  ModelInput input;
  at::Tensor targets;
  at::Tensor weight = {};  // float32, one value on the model's device: by which its loss counts in the step's. Undefined: as the others, and together 1
};
// The first half of a step: fills the gradients of the mean loss over the options' batches, and returns that loss; of several processes the own share of both.
at::Tensor add_gradients(LanguageModel& model, Optimizer& optimizer, const StepOptions& options, const std::function<StepBatch(int64_t)>& batch);

}  // namespace oryx
