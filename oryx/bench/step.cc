#include <ATen/ATen.h>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/model/device.h"
#include "oryx/train/options.h"
#include "oryx/train/train_step.h"

namespace oryx {

namespace {

// Rows of independent uniform tokens, fresh ones a step.
class RandomSource : public BatchSource {
 public:
  RandomSource(int64_t rows, int64_t tokens, int64_t vocabulary) : rows_(rows), tokens_(tokens), vocabulary_(vocabulary) {}

  TrainBatch next() override {
    CounterRng rng(1, static_cast<uint64_t>(step_++));
    const at::Tensor ids = at::empty({rows_, tokens_ + 1}, at::kLong);
    auto* p = ids.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < ids.numel(); ++i) p[i] = static_cast<int64_t>(rng.below(static_cast<uint64_t>(vocabulary_)));
    ModeContext context;
    context.prompt_length = tokens_;
    return {ids.narrow(1, 0, tokens_).contiguous(), ids.narrow(1, 1, tokens_).contiguous(), {}, row_pieces(rows_, tokens_, context)};
  }
  Json position() const override { return {{"step", step_}}; }
  void seek(const Json& position) override { step_ = position.at("step").get<int64_t>(); }

 private:
  int64_t rows_, tokens_, vocabulary_, step_ = 0;
};

}  // namespace

ModelConfig BenchModel::config() const { return preset.ends_with(".json") ? load_train_options(preset, {}).model : oryx::preset(preset); }

BenchResult bench_step(const StepBenchOptions& o) {
  const ModelConfig config = o.model.config();
  const ModelSchedule schedule(config, o.schedule);
  const at::Device device = parse_device(o.device);
  const bool gpu = !device.is_cpu();
  LanguageModel model(config, o.model.compute());
  model.initialize(0);
  model.to(device);
  model.requires_grad(true);
  if (gpu) model.keep_copies();
  Optimizer optimizer(model, {});
  RandomSource source(o.batch_size, o.seq_len, config.vocab_size);
  BatchFeed feed(source, schedule, model, {});
  StepOptions options;
  options.checkpoint_layers = o.checkpoint_layers;
  std::vector<StepResult> results;
  const auto step = [&] { results.push_back(train_step(model, optimizer, feed, 1e-4, options)); };
  const Times times = gpu ? time_repeated_on(device, o.warmup, o.repeat, step) : time_repeated(o.warmup, o.repeat, step);
  double flops = 0, attention = 0;
  for (StepResult& r : results) {
    r.read();
    if (r.skipped) fail("the loss or gradient of a step is not finite ({}, {})", r.loss, r.gradient_norm);
    flops += r.flops / static_cast<double>(results.size());
    attention += r.attention_share / static_cast<double>(results.size());
  }
  std::vector<double> all, all_cpu;
  for (const double s : times.seconds) all.push_back(1e3 * s);
  for (const double s : times.cpu_seconds) all_cpu.push_back(1e3 * s);
  const auto tokens = static_cast<double>(o.batch_size * o.seq_len);
  BenchResult result;
  result.table.columns = {{"preset", "preset", cell_text()},           {"schedule", "schedule", cell_text()},
                          {"step_ms", "step ms", cell_fixed(1)},       {"min_ms", "min ms", cell_fixed(1)},
                          {"cpu_ms", "processor ms", cell_fixed(1)},
                          {"tokens_per_second", "tokens/s", cell_fixed(1)}, {"gflops", "GFLOP/s", cell_fixed(1)},
                          {"peak_bytes", "peak memory", cell_bytes()}};
  if (gpu) result.table.columns.push_back({"mfu", "MFU", cell_percent()});
  if (gpu) {
    result.note = fmt::format(
        "MFU = tokens x {:.4g} FLOPs / step time / {:.4g} FLOP/s; FLOPs a token = 3 x forward: 2 a weight that a token of its mode passes through, the recurrences at "
        "every token, attention over its own context at the {:.1f}% of tokens in attention",
        flops / static_cast<double>(o.batch_size * o.seq_len), kPeakFlops, 100 * attention);
  }
  result.table.rows.push_back({{"preset", o.model.preset},
                               {"schedule", schedule.text()},
                               {"parameters", count_parameters(config)},
                               {"step_ms", 1e3 * times.median()},
                               {"min_ms", 1e3 * times.min()},
                               {"cpu_ms", 1e3 * times.cpu_median()},
                               {"tokens_per_second", tokens / times.median()},
                               {"gflops", 1e-9 * flops / times.median()},
                               {"peak_bytes", gpu ? peak_device_memory(device) : peak_memory()},
                               {"mfu", flops / times.median() / kPeakFlops},
                               {"attention_share", attention},
                               {"flops_per_token", flops / tokens},
                               {"first_loss", results.front().loss},
                               {"last_loss", results.back().loss},
                               {"all_ms", all},
                               {"all_cpu_ms", all_cpu}});
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"schedule", o.schedule}, {"device", o.device}, {"batch", o.batch_size},
                    {"seq_len", o.seq_len},     {"warmup", o.warmup},         {"repeat", o.repeat}};
  return result;
}

}  // namespace oryx
