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
  // No decay on what the parameter's declaration exempts (norms, decays, filters). The moments are zero.
  Optimizer(const LanguageModel& model, ops::AdamwOptions options);

  // The global norm of the gradients that lie in the parameters' .grad.
  double gradient_norm() const;
  // One step from .grad times `grad_scale`; a parameter without a gradient counts as one with a zero gradient.
  void step(double lr, double grad_scale);
  // Drops every .grad: the next backward pass's gradients become .grad as they are, later ones accumulate. Filling with zeros
  // instead would cost two passes over as much memory as the parameters take.
  void clear_gradients();

  int64_t steps() const { return steps_; }
  NamedTensors state() const;  // "m.<parameter>", "v.<parameter>"
  // Restores what state() gave. Throws Error naming the tensor that is missing or of another shape.
  void load(const SafetensorsReader& file, int64_t steps);

 private:
  void step_group(bool decays, const ops::AdamwOptions& options, double grad_scale);

  std::vector<ParameterSpec> specs_;
  std::vector<at::Tensor> parameters_, m_, v_;
  ops::AdamwOptions options_;
  int64_t steps_ = 0;
};

}  // namespace oryx
