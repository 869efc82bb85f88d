#include "oryx/train/trainer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/model/device.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/data/dataset.h"
#include "oryx/eval/perplexity.h"
#include "oryx/train/lr_schedule.h"
#include "oryx/train/step_graph.h"
#include "oryx/train/train_step.h"

namespace oryx {

namespace {

constexpr int64_t kMaxSkipped = 10;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Parameters, gradients and two moments in float32, and at least what each layer must keep for its backward pass: a bound from below, so that
// nothing that fits is refused.
void check_memory(const TrainOptions& o) {
  const ModelConfig& model = o.model;
  const double parameters = 16.0 * static_cast<double>(count_parameters(model));
  // The residual stream twice, keys and values before and after their convolution, gate and output, the feed-forward's two.
  int64_t kept = 0;
  for (int64_t i = 0; i < model.num_layers; ++i) {
    const LayerConfig c = model.layer_of(model.mixers_of(i));
    kept += 2 * c.hidden_size;
    if (!o.checkpoint_layers) kept += (c.conv ? 2 : 1) * (c.key_width() + c.value_width()) + (c.gate ? 2 : 1) * c.output_width() + 2 * c.intermediate_size;
  }
  const double bytes = o.precision == Precision::kBfloat16 ? 2 : 4;
  const double activations = bytes * static_cast<double>(o.batch_size * o.seq_len) * static_cast<double>(kept);
  if (o.device != "cpu") return;  // a GPU's memory is its own
  const auto free = static_cast<double>(available_memory());
  if (parameters + activations <= free) return;
  fail("training {} parameters takes {} for parameters, gradients and moments and at least {} for the activations of {} x {} tokens, but only {} of "
       "memory are free; use a smaller batch_size or seq_len with accumulate, checkpoint_layers=true, or a smaller model",
       human_count(static_cast<double>(count_parameters(model))), human_bytes(parameters), human_bytes(activations), o.batch_size, o.seq_len,
       human_bytes(free));
}

LanguageModel new_model(const TrainOptions& o) {
  LanguageModel model(o.model, o.precision == Precision::kBfloat16 ? at::kBFloat16 : at::kFloat);
  model.initialize(static_cast<uint64_t>(o.seed));
  model.to(parse_device(o.device));
  model.requires_grad(true);
  if (!model.device().is_cpu()) model.keep_copies();
  return model;
}

class Run {
 public:
  Run(const TrainOptions& options, TrainTask& task)
      : options_(options),
        task_(task),
        folder_(options.out),
        model_((check_memory(options), folder_.lock(), new_model(options))),  // refused before the folder is made
        optimizer_(model_, {options.lr, options.beta1, options.beta2, options.eps, options.weight_decay}),
        schedule_(options.model, options.training_schedule()) {
    if (options.cuda_graph != CudaGraph::kOff) capture_steps();
    resume();
  }

  TrainSummary loop() {
    ProgressBar bar("train", options_.steps, "steps", step_);
    const double start = now();
    feed_.emplace(*task_.source, schedule_, model_, FeedOptions{static_cast<uint64_t>(options_.seed), step_, options_.accumulate, graphs_ != nullptr});
    begin_ = now();
    while (step_ < options_.steps && !summary_.interrupted) {
      one_step(bar);
      const bool last = step_ == options_.steps;
      summary_.interrupted = interrupted() && !last;
      const bool due = (last || (options_.validate_every > 0 && step_ % options_.validate_every == 0)) && !summary_.interrupted;
      const bool saves = last || summary_.interrupted || step_ % options_.save_every == 0;
      if (!due && !saves) continue;
      stop_clock(bar);
      if (due) {
        bar.update(step_, "validating");
        validate_safely(last);
        bar.update(step_, said_);
      }
      if (saves || summary_.interrupted) save();
      begin_ = now();
    }
    bar.finish();
    summary_.step = step_;
    summary_.seconds = now() - start;
    if (graphs_) summary_.captured = graphs_->captured();
    return summary_;
  }

 private:
  StepOptions step_options() const { return {options_.accumulate, options_.clip, options_.z_loss, options_.checkpoint_layers}; }

  void capture_steps() {
    std::string why;
    const bool on = options_.cuda_graph == CudaGraph::kOn;
    graphs_ = make_step_graphs(model_, optimizer_, step_options(), on ? CaptureWhere::kAnywhere : CaptureWhere::kInRoom, &why);
    if (graphs_ == nullptr && on) fail("cuda_graph is on, but this model's steps cannot be captured: {}; use cuda_graph=auto or off", why);
  }

  void resume() {
    folder_.clean();
    const auto steps = folder_.checkpoints();
    if (!steps.empty()) {
      const Json trainer = folder_.load(steps.back(), model_, optimizer_);
      step_ = trainer["step"].get<int64_t>();
      // Before this key was kept, every step had the options' size.
      all_tokens_ = trainer.value("tokens", step_ * options_.accumulate * options_.batch_size * options_.seq_len);
      if (step_ > options_.steps) fail("{}: the run is at step {}, beyond steps {}", folder_.path().string(), step_, options_.steps);
      task_.source->seek(trainer["data"]);
      log::info("resuming {} at step {}", folder_.path().string(), step_);
    }
    make_folders(folder_.path());
    write_file(folder_.path() / "config.json", dump_options(options_));
    metrics_ = folder_.rewind_metrics(step_);
    folder_.point_to_newest();
    if (step_ == options_.steps) write_report(folder_, options_, metrics_);  // the process may have been killed before it
  }

  void one_step(ProgressBar& bar) {
    const double lr = cosine_with_warmup(step_ + 1, options_.lr, options_.warmup_steps, options_.steps, options_.min_lr_ratio);
    StepResult r = train_step(model_, optimizer_, *feed_, lr, step_options(), graphs_.get());
    ++step_;
    all_tokens_ += options_.accumulate * options_.batch_size * options_.seq_len;
    summary_.tokens += r.tokens;
    pending_.push_back({step_, lr, std::move(r)});
    const bool logs = step_ % options_.log_every == 0 || step_ == options_.steps;
    // What a step did is looked at when it is asked for, or when so many are open that a run gone wrong must be noticed: reading waits for the device.
    if (logs || on_cpu() || static_cast<int64_t>(pending_.size()) >= kMaxSkipped) read_steps(bar, logs);
  }

  // The records of all steps that are open, in one copy.
  void bring_records() {
    std::vector<at::Tensor> records;
    for (const Step& s : pending_) {
      if (s.result.record.defined()) records.push_back(s.result.record);
    }
    if (records.size() < 2) return;
    const at::Tensor host = at::stack(records).cpu();
    int64_t row = 0;
    for (Step& s : pending_) {
      if (s.result.record.defined()) s.result.record = host[row++];
    }
  }

  bool on_cpu() const { return model_.device().is_cpu(); }

  void read_steps(ProgressBar& bar, bool logs) {
    bring_records();
    for (Step& s : pending_) {
      s.result.read();
      tokens_ += s.result.tokens;
      flops_ += s.result.flops;
      if (s.result.skipped) {
        skip(s.step, s.result);
        continue;
      }
      skipped_in_a_row_ = 0;
      summary_.last_loss = s.result.loss;
    }
    const double seconds = seconds_ + now() - begin_, rate = static_cast<double>(tokens_) / seconds;
    const Step last = std::move(pending_.back());
    pending_.clear();
    if (last.result.skipped) return;
    said_ = fmt::format("loss {:.4f} | {} tokens/s", last.result.loss, human_count(rate));
    bar.update(step_, said_);
    if (!logs) return;
    Json line = {{"kind", "train"}, {"step", step_}, {"loss", last.result.loss}, {"lr", last.lr}, {"gradient_norm", last.result.gradient_norm},
                 {"attention_share", last.result.attention_share}, {"tokens", all_tokens_}, {"tokens_per_second", rate},
                 {"flops_per_token", last.result.flops / static_cast<double>(last.result.tokens)}};
    if (!on_cpu()) line["mfu"] = flops_ / seconds / kPeakFlops;
    log(std::move(line));
    begin_ = now();
    seconds_ = flops_ = 0;
    tokens_ = 0;
  }

  // Rates are of the time between two lines, without validations and saves: what the device still has to do counts before they begin.
  void stop_clock(ProgressBar& bar) {
    if (!pending_.empty()) read_steps(bar, false);
    seconds_ += now() - begin_;
  }

  void skip(int64_t step, const StepResult& r) {
    // Written as text: JSON has no word for NaN.
    log({{"kind", "skipped"}, {"step", step}, {"loss", fmt::format("{}", r.loss)}, {"gradient_norm", fmt::format("{}", r.gradient_norm)}});
    log::warn("step {} skipped: loss {}, gradient norm {}", step, r.loss, r.gradient_norm);
    if (++skipped_in_a_row_ >= kMaxSkipped) {
      fail("{}: loss or gradient was not finite at {} steps in a row; lower lr, or look at the data", folder_.path().string(), kMaxSkipped);
    }
  }

  // What was trained is kept whatever becomes of the validation.
  void validate_safely(bool last) {
    try {
      validate();
    } catch (const Interrupted&) {
      summary_.interrupted = !last;
    } catch (const Error&) {
      save();
      throw;
    }
  }

  void validate() {
    if (!task_.validate) return;
    summary_.validation = task_.validate(model_, options_.validation_schedules());
    for (Json row : summary_.validation) {
      row["kind"] = "validation";
      row["step"] = step_;
      log(row);
    }
  }

  void save() {
    folder_.save(step_, model_, optimizer_, {{"step", step_}, {"tokens", all_tokens_}, {"optimizer_steps", optimizer_.steps()}, {"data", feed_->position()}},
                 task_.tokenizer.get(), options_.keep_checkpoints);
    write_report(folder_, options_, metrics_);
  }

  void log(Json line) {
    folder_.log(line);
    metrics_.push_back(std::move(line));
  }

  const TrainOptions& options_;
  TrainTask& task_;
  RunFolder folder_;
  LanguageModel model_;
  Optimizer optimizer_;
  std::unique_ptr<StepGraphs> graphs_;  // null: every step runs kernel by kernel
  ModelSchedule schedule_;
  int64_t step_ = 0, skipped_in_a_row_ = 0, tokens_ = 0, all_tokens_ = 0;
  double seconds_ = 0, begin_ = 0, flops_ = 0;  // of the steps since the last line
  struct Step {
    int64_t step;
    double lr;
    StepResult result;
  };
  std::vector<Step> pending_;  // not looked at yet
  std::optional<BatchFeed> feed_;
  std::vector<Json> metrics_;
  TrainSummary summary_;
  std::string said_;  // beside the progress bar
};

}  // namespace

TrainTask text_task(const TrainOptions& options) {
  const Dataset data = open_dataset(options.data);
  TrainTask task;
  LoaderOptions loader;
  loader.batch_size = options.batch_size;
  loader.seq_len = options.seq_len;
  loader.seed = static_cast<uint64_t>(options.seed);
  task.source = std::make_unique<TextBatches>(data.train, loader);
  task.tokenizer = data.tokenizer;
  if (data.info.valid.tokens < 2) {
    log::warn("{}: holds no held-out text (--valid 0), so nothing is validated", options.data);
    return task;
  }
  EvalOptions eval;
  eval.seq_len = options.seq_len;
  eval.tokens_per_batch = options.batch_size * options.seq_len;
  eval.max_tokens = static_cast<uint64_t>(options.validate_tokens);
  task.validate = [data, eval](const LanguageModel& model, const std::vector<std::string>& schedules) {
    std::vector<Json> rows;
    for (const auto& text : schedules) {
      EvalReader reader(data.valid, eval);
      PerplexityOptions o;
      o.count_flops = false;
      const PerplexityResult r = evaluate_perplexity(model, ModelSchedule(model.config(), text), reader, o);
      rows.push_back({{"schedule", text}, {"loss", r.nats()}, {"perplexity", r.perplexity()}, {"attention_share", r.attention_share}});
    }
    return rows;
  };
  return task;
}

TrainSummary train(const TrainOptions& options, TrainTask& task) {
  options.validate();
  return Run(options, task).loop();
}

}  // namespace oryx
