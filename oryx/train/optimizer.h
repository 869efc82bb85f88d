// AdamW over a model's parameters, with decay groups and clipping by the global norm.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "oryx/io/safetensors.h"
#include "oryx/model/language_model.h"
#include "oryx/ops/adamw/adamw.h"
#include "oryx/train/shards.h"

namespace oryx {

class Optimizer {
 public:
  // The model outlives the optimiser, and stays on its device. No decay on what the parameter's declaration exempts (norms, decays, filters). The moments are zero.
  // group: processes of which each has a share of every batch, and steps a part of the parameters (shards.h); every rank then calls the same functions in the same order, from begin() on. Null: one process.
  Optimizer(const LanguageModel& model, ops::AdamwOptions options, ProcessGroup* group = nullptr);

  // A step's gradients: begin, for each of `passes` batches a backward pass and next_pass, then end with the step's loss (of several processes: the own share of it). Without these, the gradients of
  // backward passes since clear_gradients() lie in the leaves' .grad.
  void begin(int64_t passes);
  // Adds the gradients to sums in float32, which the next step takes instead, and clears them: for steps over several batches. Does nothing where the
  // gradients are float32, which add up by themselves.
  void next_pass();
  void end(const at::Tensor& loss);
  // Of several processes: gradients are summed while the backward pass is still at work (on), or only in front of the step.
  void sum_early(bool on) { early_ = on; }

  // The loss and gradients of all processes, where there are several: of what end() laid down, or a captured begin() to end(). Returns the step's loss, which is `loss` of one process.
  at::Tensor sum_over_processes(const at::Tensor& loss);

  // The global norm of the gradients.
  double gradient_norm() const;
  // One step from the gradients times `grad_scale`; a parameter without a gradient counts as one with a zero gradient.
  void step(double lr, double grad_scale);
  // Drops every .grad: the next backward pass's gradients become .grad as they are, later ones accumulate. Filling with zeros
  // instead would cost two passes over as much memory as the parameters take.
  void clear_gradients();

  // On a GPU: gradient norm, clipping and step in one, decided on the device, so that nothing waits for it; no step where norm or loss are not finite.
  // loss: float32, one value. lr: kRateOnDevice takes what set_rate() laid down there last, also where the update was captured before.
  static constexpr double kRateOnDevice = -1;
  void update(const at::Tensor& loss, double lr, double clip);
  void set_rate(double lr);
  // Of the last update(): float64 [4] on the device: loss, norm, 1 where the step was taken else 0, steps taken so far.
  at::Tensor record() const;
  bool on_device() const { return control_.defined(); }
  bool divided() const { return shards_ != nullptr; }  // over several processes

  int64_t steps() const;  // taken; on a GPU this waits for it
  // Brings together on rank 0 what state() gives, and the model's parameters. Every rank calls both around a checkpoint; nothing to do for one process.
  void assemble();
  void drop_assembled();
  NamedTensors state() const;  // "m.<parameter>", "v.<parameter>"
  // In front of writing the model's parameters: of several processes each keeps but a part of them, and takes that when load() comes.
  void prepare_load();
  // Restores what state() gave, by however many processes. Throws Error naming the tensor that is missing or of another shape.
  void load(const SafetensorsReader& file, int64_t steps);

 private:
  void step_group(bool decays, const ops::AdamwOptions& options, double grad_scale);
  at::Tensor gradient(size_t i) const;
  at::Tensor weight(size_t i) const;
  std::vector<at::Tensor> gradients() const;
  void set_steps(int64_t steps);
  ops::AdamwUpdate lists_of(size_t begin, size_t end) const;

  const LanguageModel& model_;
  std::vector<ParameterSpec> specs_;
  std::unique_ptr<Shards> shards_;  // null: one process
  // What this process steps: the parameters, or its pieces of them.
  std::vector<at::Tensor> parameters_, m_, v_;
  std::vector<bool> decays_;
  std::vector<at::Tensor> weights_, part_m_, part_v_;  // of the shards: the pieces' copies; by bucket the moments of its pieces, one behind the other
  std::vector<at::Tensor> sums_;  // of next_pass()
  at::Tensor control_;            // ops::adamw_update; undefined on the CPU
  ops::AdamwOptions options_;
  int64_t steps_ = 0;
  bool early_ = true;
  NamedTensors assembled_;
};

}  // namespace oryx
