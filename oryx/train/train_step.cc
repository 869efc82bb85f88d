#include "oryx/train/train_step.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "oryx/model/routed_cost.h"

namespace oryx {

StepResult train_step(LanguageModel& model, Optimizer& optimizer, BatchSource& source, const ModelSchedule& schedule, double lr, uint64_t seed,
                      int64_t step, const StepOptions& options) {
  StepResult result;
  optimizer.clear_gradients();
  uint64_t sequence = 0;  // counts through the batches of the step, so that no two sequences share their draws
  for (int64_t i = 0; i < options.accumulate; ++i) {
    TrainBatch batch = source.next();
    for (auto& piece : batch.pieces) {
      piece.context.seed = seed;
      piece.context.step = static_cast<uint64_t>(step);
      piece.context.sequence += sequence;
    }
    sequence += batch.pieces.size();
    ModelInput in;
    in.input_ids = batch.input_ids;
    in.cu_seqlens = batch.cu_seqlens;
    in.routing = schedule.route(batch.pieces, batch.input_ids.size(0), batch.input_ids.size(1));
    in.checkpoint_layers = options.checkpoint_layers;
    const at::Tensor loss = model.loss(model.hidden(in), batch.targets, options.z_loss).loss;
    const double weight = 1.0 / static_cast<double>(options.accumulate);
    torch::autograd::backward({loss}, {at::full({}, weight, loss.options())});
    result.loss += weight * loss.item<double>();
    result.tokens += batch.input_ids.numel();
    result.attention_share += weight * attention_share(model.config(), in.routing);
  }
  result.gradient_norm = optimizer.gradient_norm();
  result.skipped = !std::isfinite(result.loss) || !std::isfinite(result.gradient_norm);
  if (result.skipped) return result;
  const bool clips = options.clip > 0 && result.gradient_norm > options.clip;
  optimizer.step(lr, clips ? options.clip / result.gradient_norm : 1.0);
  return result;
}

}  // namespace oryx
