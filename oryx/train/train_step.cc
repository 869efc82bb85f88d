#include "oryx/train/train_step.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "oryx/train/step_graph.h"

namespace oryx {

void StepResult::read() {
  if (!record.defined()) return;
  const at::Tensor host = record.cpu();
  const double* r = host.const_data_ptr<double>();
  loss = r[0], gradient_norm = r[1], skipped = r[2] == 0;
  record.reset();
}

at::Tensor add_gradients(LanguageModel& model, Optimizer& optimizer, const StepOptions& options, const std::function<StepBatch(int64_t)>& batch) {
  optimizer.begin(options.accumulate);
  const double weight = 1.0 / static_cast<double>(options.accumulate);
  at::Tensor total;
  bool shares = false;
  for (int64_t i = 0; i < options.accumulate; ++i) {
    StepBatch b = batch(i);
    b.input.checkpoint_layers = options.checkpoint_layers;
    const at::Tensor loss = model.loss(model.hidden(b.input), b.targets, options.z_loss).loss;
    torch::autograd::backward({loss}, {b.weight.defined() ? b.weight : at::full({}, weight, loss.options())});
    if (options.accumulate > 1) optimizer.next_pass();
    shares = b.weight.defined();
    const at::Tensor part = shares ? loss.detach() * b.weight : loss.detach();
    total = total.defined() ? total + part : part;
  }
  if (options.accumulate > 1 && !shares) total = total * weight;
  optimizer.end(total);
  return total;
}

StepResult train_step(LanguageModel& model, Optimizer& optimizer, BatchFeed& feed, double lr, const StepOptions& options, StepGraphs* graphs) {
  StepResult result;
  const auto take = [&] {
    FedBatch batch = feed.next();
    result.tokens += batch.tokens;
    result.attention_share += batch.attention_share / static_cast<double>(options.accumulate);
    result.flops += 3 * batch.flops;
    return batch;
  };
  std::vector<FedBatch> batches;
  if (graphs != nullptr) {
    for (int64_t i = 0; i < options.accumulate; ++i) batches.push_back(take());
    if (graphs->run(batches, feed, lr)) {
      result.record = optimizer.record();
      return result;
    }
  }
  const at::Tensor total = add_gradients(model, optimizer, options, [&](int64_t i) {
    FedBatch b = batches.empty() ? take() : std::move(batches[static_cast<size_t>(i)]);
    return StepBatch{std::move(b.input), std::move(b.targets), b.weight ? at::full({}, *b.weight, at::TensorOptions(model.device()).dtype(at::kFloat)) : at::Tensor()};
  });
  const at::Tensor loss = optimizer.sum_over_processes(total);
  if (optimizer.on_device()) {
    optimizer.update(loss, lr, options.clip);
    result.record = optimizer.record();
    return result;
  }
  result.loss = loss.item<double>();
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
