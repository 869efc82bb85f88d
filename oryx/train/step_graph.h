// Steps as captured CUDA graphs: one launch in place of hundreds. Small models are several times as fast where launching their kernels takes longer than running them, large ones by 1 to 2%.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "oryx/train/batch_feed.h"
#include "oryx/train/train_step.h"

namespace oryx {

class StepGraphs {
 public:
  virtual ~StepGraphs() = default;

  // The whole step of these packed batches (FeedOptions::pack), bit for bit train_step()'s. A kind of step is captured when it comes a second time. False, with nothing done,
  // where the step must run kernel by kernel: the first of its kind, shapes that depend on the modes, more kinds than are kept, or, once and for all and with a line to the log,
  // a capture that failed.
  virtual bool run(const std::vector<FedBatch>& batches, BatchFeed& feed, double lr) = 0;
  virtual int64_t captured() const = 0;  // graphs that are kept
};

enum class CaptureWhere {
  kAnywhere,  // a capture that finds no room is a warning
  kInRoom,    // where the device has half as much memory again as a step takes; elsewhere steps run kernel by kernel, and nothing is said
};

// Null, with the reason in *why when given, where this model's steps have kernels that ask the host. Model and optimiser must outlive it; nobody else fills gradients meanwhile.
std::unique_ptr<StepGraphs> make_step_graphs(LanguageModel& model, Optimizer& optimizer, const StepOptions& options, CaptureWhere where, std::string* why = nullptr);

namespace detail {
using StepGraphsFactory = std::unique_ptr<StepGraphs> (*)(LanguageModel&, Optimizer&, const StepOptions&, CaptureWhere, std::string* why);
bool register_step_graphs(StepGraphsFactory factory);
}  // namespace detail

}  // namespace oryx
