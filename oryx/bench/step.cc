#include <ATen/ATen.h>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/model/routed_cost.h"
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

// Forward FLOPs of a batch under the schedule, averaged over some draws of it.
double forward_flops(const ModelConfig& config, const ModelSchedule& schedule, RandomSource source) {
  constexpr int kDraws = 8;
  double flops = 0;
  for (int i = 0; i < kDraws; ++i) {
    TrainBatch batch = source.next();
    for (auto& piece : batch.pieces) piece.context.step = static_cast<uint64_t>(i);
    flops += routed_flops(config, schedule.route(batch.pieces, batch.input_ids.size(0), batch.input_ids.size(1))) / kDraws;
  }
  return flops;
}

}  // namespace

BenchResult bench_step(const StepBenchOptions& o) {
  const ModelConfig config = o.model.config();
  const ModelSchedule schedule(config, o.schedule);
  LanguageModel model(config, o.model.compute());
  model.initialize(0);
  model.requires_grad(true);
  Optimizer optimizer(model, {});
  RandomSource source(o.batch_size, o.seq_len, config.vocab_size);
  const double flops = 3 * forward_flops(config, schedule, source);
  int64_t step = 0;
  const Times times = time_repeated(o.warmup, o.repeat, [&] {
    if (train_step(model, optimizer, source, schedule, 1e-4, 0, ++step, {}).skipped) fail("the gradient of step {} is not finite", step);
  });
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
  result.table.rows.push_back({{"preset", o.model.preset},
                               {"schedule", schedule.text()},
                               {"parameters", count_parameters(config)},
                               {"step_ms", 1e3 * times.median()},
                               {"min_ms", 1e3 * times.min()},
                               {"cpu_ms", 1e3 * times.cpu_median()},
                               {"tokens_per_second", tokens / times.median()},
                               {"gflops", 1e-9 * flops / times.median()},
                               {"peak_bytes", peak_memory()},
                               {"all_ms", all},
                               {"all_cpu_ms", all_cpu}});
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"schedule", o.schedule}, {"batch", o.batch_size},
                    {"seq_len", o.seq_len},     {"warmup", o.warmup},         {"repeat", o.repeat}};
  return result;
}

}  // namespace oryx
