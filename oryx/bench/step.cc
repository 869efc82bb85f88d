#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/model/device.h"
#include "oryx/train/options.h"
#include "oryx/train/step_graph.h"
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

namespace {

struct StepShape {
  int64_t rows, tokens;
};

std::vector<StepShape> shapes_of(const StepBenchOptions& o) {
  const size_t n = std::max(o.batch_sizes.size(), o.seq_lens.size());
  const auto at = [&](const std::vector<int64_t>& list, size_t i) { return list.size() == 1 ? list[0] : list[i]; };
  for (const auto* list : {&o.batch_sizes, &o.seq_lens}) {
    if (list->size() != 1 && list->size() != n) {
      fail("{} batch sizes and {} lengths; expected as many of one as of the other, or one of either", o.batch_sizes.size(), o.seq_lens.size());
    }
  }
  std::vector<StepShape> shapes;
  for (size_t i = 0; i < n; ++i) {
    shapes.push_back({at(o.batch_sizes, i), at(o.seq_lens, i)});
    const auto& [rows, tokens] = shapes.back();
    if (rows > INT32_MAX / tokens) fail("a batch of {} x {} is more tokens than a batch can hold (2^31)", rows, tokens);
  }
  return shapes;
}

Json measure_steps(LanguageModel& model, Optimizer& optimizer, const std::string& schedule_text, const StepShape& shape, const StepBenchOptions& o) {
  const ModelSchedule schedule(model.config(), schedule_text);
  const at::Device device = model.device();
  const bool gpu = !device.is_cpu();
  RandomSource source(shape.rows, shape.tokens, model.config().vocab_size);
  StepOptions options;
  options.checkpoint_layers = o.checkpoint_layers;
  const std::unique_ptr<StepGraphs> graphs = o.cuda_graph.value_or(true) ? make_step_graphs(model, optimizer, options, o.cuda_graph ? CaptureWhere::kAnywhere : CaptureWhere::kInRoom) : nullptr;
  BatchFeed feed(source, schedule, model, {.pack = graphs != nullptr});
  if (gpu) reset_peak_device_memory(device);
  std::vector<StepResult> results;
  const auto step = [&] { results.push_back(train_step(model, optimizer, feed, 1e-4, options, graphs.get())); };
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
  const auto tokens = static_cast<double>(shape.rows * shape.tokens);
  return {{"preset", o.model.preset},
          {"schedule", schedule.text()},
          {"batch", shape.rows},
          {"seq_len", shape.tokens},
          {"parameters", count_parameters(model.config())},
          {"step_ms", 1e3 * times.median()},
          {"min_ms", 1e3 * times.min()},
          {"cpu_ms", 1e3 * times.cpu_median()},
          {"tokens_per_second", tokens / times.median()},
          {"gflops", 1e-9 * flops / times.median()},
          {"peak_bytes", gpu ? peak_device_memory(device) : peak_memory()},
          {"mfu", flops / times.median() / kPeakFlops},
          {"attention_share", attention},
          {"captured", graphs != nullptr && graphs->captured() > 0},
          {"flops_per_token", flops / tokens},
          {"first_loss", results.front().loss},
          {"last_loss", results.back().loss},
          {"all_ms", all},
          {"all_cpu_ms", all_cpu}};
}

// The parts of the FLOPs behind MFU differ by row only in numbers.
std::string mfu_note(const std::vector<Json>& rows) {
  std::string note = fmt::format("MFU = FLOPs a token x tokens/s / {:.4g} FLOP/s; FLOPs a token = 3 x forward: 2 a weight that a token of its mode passes through, the recurrences at every token, "
                                 "attention over its own context at tokens in attention:",
                                 kPeakFlops);
  for (const Json& row : rows) note += fmt::format(" {:.4g}", row["flops_per_token"].get<double>());
  return note;
}

}  // namespace

BenchResult bench_step(const StepBenchOptions& o) {
  const ModelConfig config = o.model.config();
  const std::vector<StepShape> shapes = shapes_of(o);
  for (const std::string& text : o.schedules) (void)ModelSchedule(config, text);  // what is wrong is said before the work
  const at::Device device = parse_device(o.device);
  const bool gpu = !device.is_cpu();
  LanguageModel model(config, o.model.compute());
  model.initialize(0);
  model.to(device);
  model.requires_grad(true);
  if (gpu) model.keep_copies();
  Optimizer optimizer(model, {});
  BenchResult result;
  for (const StepShape& shape : shapes) {
    for (const std::string& schedule : o.schedules) result.table.rows.push_back(measure_steps(model, optimizer, schedule, shape, o));
  }
  result.table.columns = {{"preset", "preset", cell_text()},
                          {"batch", "batch", cell_text()},
                          {"seq_len", "tokens", cell_text()},
                          {"schedule", "schedule", cell_text()},
                          {"attention_share", "in attention", cell_percent()},
                          {"step_ms", "step ms", cell_fixed(1)},
                          {"min_ms", "min ms", cell_fixed(1)},
                          {"cpu_ms", "processor ms", cell_fixed(1)},
                          {"tokens_per_second", "tokens/s", cell_fixed(1)},
                          {"gflops", "GFLOP/s", cell_fixed(1)},
                          {"peak_bytes", "peak memory", cell_bytes()}};
  if (gpu) {
    result.table.columns.push_back({"mfu", "MFU", cell_percent()});
    result.table.columns.push_back({"captured", "captured", cell_text()});
    result.note = mfu_note(result.table.rows);
  }
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"schedules", o.schedules}, {"device", o.device}, {"batch", o.batch_sizes},
                    {"seq_len", o.seq_lens},    {"warmup", o.warmup},         {"repeat", o.repeat},       {"checkpoint_layers", o.checkpoint_layers}, {"cuda_graph", o.cuda_graph ? Json(*o.cuda_graph) : Json("auto")}};
  return result;
}

}  // namespace oryx
