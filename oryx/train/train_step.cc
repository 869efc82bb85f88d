#include "oryx/train/train_step.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

namespace oryx {

void StepResult::read() {
  if (!record.defined()) return;
  const at::Tensor host = record.cpu();
  const double* r = host.const_data_ptr<double>();
  loss = r[0], gradient_norm = r[1], skipped = r[2] == 0;
  record.reset();
}

StepResult train_step(LanguageModel& model, Optimizer& optimizer, BatchFeed& feed, double lr, const StepOptions& options) {
  StepResult result;
  optimizer.clear_gradients();
  const double weight = 1.0 / static_cast<double>(options.accumulate);
  at::Tensor total;
  for (int64_t i = 0; i < options.accumulate; ++i) {
    FedBatch batch = feed.next();
    batch.input.checkpoint_layers = options.checkpoint_layers;
    const at::Tensor loss = model.loss(model.hidden(batch.input), batch.targets, options.z_loss).loss;
    torch::autograd::backward({loss}, {at::full({}, weight, loss.options())});
    if (options.accumulate > 1) optimizer.collect_gradients();
    const at::Tensor part = loss.detach();
    total = total.defined() ? total + part : part;
    result.tokens += batch.tokens;
    result.attention_share += weight * batch.attention_share;
    result.flops += 3 * batch.flops;
  }
  if (options.accumulate > 1) total = total * weight;
  if (optimizer.on_device()) {
    result.record = optimizer.update(total, lr, options.clip);
    return result;
  }
  result.loss = total.item<double>();
  result.gradient_norm = optimizer.gradient_norm();
  result.skipped = !std::isfinite(result.loss) || !std::isfinite(result.gradient_norm);
  if (result.skipped) return result;
  const bool clips = options.clip > 0 && result.gradient_norm > options.clip;
  optimizer.step(lr, clips ? options.clip / result.gradient_norm : 1.0);
  return result;
}

StepResult train_step(LanguageModel& model, Optimizer& optimizer, BatchSource& source, const ModelSchedule& schedule, double lr, uint64_t seed,
                      int64_t step, const StepOptions& options) {
  BatchFeed feed(source, schedule, model, {seed, step, options.accumulate}, 0);
  StepResult result = train_step(model, optimizer, feed, lr, options);
  result.read();
  return result;
}

}  // namespace oryx
