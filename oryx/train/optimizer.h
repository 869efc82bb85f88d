// AdamW over a model's parameters, with decay groups and clipping by the global norm.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "oryx/io/safetensors.h"
#include "oryx/model/language_model.h"
#include "oryx/ops/adamw/adamw.h"

namespace oryx {

class Optimizer {
 public:
  // The model outlives the optimiser, and stays on its device. No decay on what the parameter's declaration exempts (norms, decays, filters). The moments are zero.
  Optimizer(const LanguageModel& model, ops::AdamwOptions options);

  // The global norm of the gradients that lie in the parameters' .grad.
  double gradient_norm() const;
  // One step from .grad times `grad_scale`; a parameter without a gradient counts as one with a zero gradient.
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

  // Adds the gradients to sums in float32, which the next step takes instead, and clears them: for steps over several batches. Does nothing where the
  // gradients are float32, which add up by themselves.
  void collect_gradients();

  int64_t steps() const;  // taken; on a GPU this waits for it
  NamedTensors state() const;  // "m.<parameter>", "v.<parameter>"
  // Restores what state() gave. Throws Error naming the tensor that is missing or of another shape.
  void load(const SafetensorsReader& file, int64_t steps);

 private:
  void step_group(bool decays, const ops::AdamwOptions& options, double grad_scale);
  at::Tensor gradient(size_t i) const;
  void set_steps(int64_t steps);

  const LanguageModel& model_;
  std::vector<ParameterSpec> specs_;
  std::vector<at::Tensor> parameters_, m_, v_;
  std::vector<at::Tensor> sums_;  // of collect_gradients()
  at::Tensor control_;            // ops::adamw_update; undefined on the CPU
  ops::AdamwOptions options_;
  int64_t steps_ = 0;
};

}  // namespace oryx
