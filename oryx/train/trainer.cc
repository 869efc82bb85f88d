#include "oryx/train/trainer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <optional>

#include "oryx/common/error.h"
#include "oryx/model/device.h"
#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/data/dataset.h"
#include "oryx/eval/perplexity.h"
#include "oryx/train/lr_schedule.h"
#include "oryx/train/rank_batches.h"
#include "oryx/train/step_graph.h"
#include "oryx/train/train_step.h"

namespace oryx {

namespace {

constexpr int64_t kMaxSkipped = 10;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Parameters, gradients and two moments in float32, and at least what each layer must keep for its backward pass: a bound from below, so that
// nothing that fits is refused.
// processes: of this host, which share its memory and the batches.
void check_memory(const TrainOptions& o, int64_t processes) {
  const ModelConfig& model = o.model;
  const double parameters = 16.0 * static_cast<double>(count_parameters(model)) * static_cast<double>(processes);
  // The residual stream twice, keys and values before and after their convolution, gate and output, the feed-forward's two.
  int64_t kept = 0;
  for (int64_t i = 0; i < model.num_layers; ++i) {
    const LayerConfig c = model.layer_of(model.mixers_of(i));
    kept += 2 * c.hidden_size;
    if (!o.checkpoint_layers) kept += (c.conv ? 2 : 1) * (c.key_width() + c.value_width()) + (c.gate ? 2 : 1) * c.output_width() + 2 * c.intermediate_size;
  }
  const double bytes = o.precision == Precision::kBfloat16 ? 2 : 4;
  const double activations = bytes * static_cast<double>(processes * divide_batches(o.accumulate, o.batch_size, processes).own_rows() * o.seq_len) * static_cast<double>(kept);
  if (o.device != "cpu") return;  // a GPU's memory is its own
  const auto free = static_cast<double>(available_memory());
  if (parameters + activations <= free) return;
  fail("training {} parameters takes {} for parameters, gradients and moments and at least {} for the activations of {} x {} tokens, but only {} of "
       "memory are free; use a smaller batch_size or seq_len with accumulate, checkpoint_layers=true, or a smaller model",
       human_count(static_cast<double>(count_parameters(model))), human_bytes(parameters), human_bytes(activations), o.batch_size, o.seq_len,
       human_bytes(free));
}

// Rank 0 alone holds the folder; the others learn that it does.
void lock_folder(RunFolder& folder, ProcessGroup* group) {
  if (group == nullptr || group->first()) folder.lock();
  if (group != nullptr) (void)group->any(false);
}

LanguageModel new_model(const TrainOptions& o, at::Device device) {
  LanguageModel model(o.model, o.precision == Precision::kBfloat16 ? at::kBFloat16 : at::kFloat);
  model.initialize(static_cast<uint64_t>(o.seed));
  model.to(device);
  model.requires_grad(true);
  if (!model.device().is_cpu()) model.keep_copies();
  return model;
}

class Run {
 public:
  Run(const TrainOptions& options, TrainTask& task, ProcessGroup* group)
      : options_(options),
        task_(task),
        group_(group),
        division_(divide_batches(options.accumulate, options.batch_size, processes())),
        folder_(options.out),
        model_((group == nullptr ? check_memory(options, 1) : void(), lock_folder(folder_, group), new_model(options, group == nullptr ? parse_device(options.device) : group->device()))),  // refused before the folder is made
        optimizer_(model_, {options.lr, options.beta1, options.beta2, options.eps, options.weight_decay}, group),
        schedule_(options.model, options.training_schedule()) {
    if (group != nullptr) task_.source = std::make_unique<RankBatches>(std::move(task_.source), division_, group->rank());
    if (group != nullptr && first()) log::info("{} processes, {} batches of {} rows a step each, by {}", processes(), division_.own_accumulate(), division_.own_rows(), group->transport());
    if (options.cuda_graph != CudaGraph::kOff) capture_steps();
    resume();
  }

  TrainSummary loop() {
    std::optional<ProgressBar> shown;
    if (first()) shown.emplace("train", options_.steps, "steps", step_);
    bar_ = shown ? &*shown : nullptr;
    const double start = now();
    feed_.emplace(*task_.source, schedule_, model_, FeedOptions{static_cast<uint64_t>(options_.seed), step_, division_.own_accumulate(), graphs_ != nullptr});
    begin_ = now();
    while (step_ < options_.steps && !summary_.interrupted) {
      const bool stop = one_step();
      const bool last = step_ == options_.steps;
      summary_.interrupted = stop && !last;
      const bool due = (last || (options_.validate_every > 0 && step_ % options_.validate_every == 0)) && !summary_.interrupted;
      const bool saves = last || summary_.interrupted || step_ % options_.save_every == 0;
      if (!due && !saves) continue;
      stop_clock();
      if (due) {
        show("validating");
        validate_safely(last);
        show(said_);
      }
      if (saves || summary_.interrupted) save();
      begin_ = now();
    }
    if (shown) shown->finish();
    bar_ = nullptr;
    summary_.step = step_;
    summary_.seconds = now() - start;
    if (graphs_) summary_.captured = graphs_->captured();
    return summary_;
  }

 private:
  int64_t processes() const { return group_ == nullptr ? 1 : group_->size(); }
  bool first() const { return group_ == nullptr || group_->first(); }
  bool anywhere(bool here) { return group_ == nullptr ? here : group_->any(here); }
  void show(const std::string& text) {
    if (bar_ != nullptr) bar_->update(step_, text);
  }

  StepOptions step_options() const { return {division_.own_accumulate(), options_.clip, options_.z_loss, options_.checkpoint_layers}; }

  void capture_steps() {
    std::string why;
    const bool on = options_.cuda_graph == CudaGraph::kOn;
    graphs_ = make_step_graphs(model_, optimizer_, step_options(), on ? CaptureWhere::kAnywhere : CaptureWhere::kInRoom, &why);
    if (graphs_ == nullptr && on) fail("cuda_graph is on, but this model's steps cannot be captured: {}; use cuda_graph=auto or off", why);
  }

  void resume() {
    if (first()) folder_.clean();
    (void)anywhere(false);  // what it cleans and brings back is what the others see
    const auto steps = folder_.checkpoints();
    if (group_ != nullptr) group_->require_same(fmt::format("step {}", steps.empty() ? 0 : steps.back()), fmt::format("newest checkpoint in {}", options_.out));
    if (!steps.empty()) {
      const Json trainer = folder_.load(steps.back(), model_, optimizer_);
      step_ = trainer["step"].get<int64_t>();
      // Before this key was kept, every step had the options' size.
      all_tokens_ = trainer.value("tokens", step_ * options_.accumulate * options_.batch_size * options_.seq_len);
      if (step_ > options_.steps) fail("{}: the run is at step {}, beyond steps {}", folder_.path().string(), step_, options_.steps);
      task_.source->seek(trainer["data"]);
      if (first()) log::info("resuming {} at step {}", folder_.path().string(), step_);
    }
    if (!first()) return;
    make_folders(folder_.path());
    write_file(folder_.path() / "config.json", dump_options(options_));
    metrics_ = folder_.rewind_metrics(step_);
    folder_.point_to_newest();
    if (step_ == options_.steps) write_report(folder_, options_, metrics_);  // the process may have been killed before it
  }

  // True when the run was interrupted, on any rank.
  bool one_step() {
    const double lr = cosine_with_warmup(step_ + 1, options_.lr, options_.warmup_steps, options_.steps, options_.min_lr_ratio);
    StepResult r = train_step(model_, optimizer_, *feed_, lr, step_options(), graphs_.get());
    ++step_;
    const bool stop = share_counts(r);
    all_tokens_ += options_.accumulate * options_.batch_size * options_.seq_len;
    summary_.tokens += r.tokens;
    pending_.push_back({step_, lr, std::move(r)});
    const bool logs = step_ % options_.log_every == 0 || step_ == options_.steps;
    // What a step did is looked at when it is asked for, or when so many are open that a run gone wrong must be noticed: reading waits for the device.
    if (logs || on_cpu() || static_cast<int64_t>(pending_.size()) >= kMaxSkipped) read_steps(logs);
    return stop;
  }

  // Tokens, FLOPs and attention of the step as a whole, and whether any rank was interrupted.
  bool share_counts(StepResult& r) {
    bool stop = interrupted();
    if (group_ == nullptr) return stop;
    struct Counts {
      int64_t tokens, stop;
      double flops, attention;
    } counts{r.tokens, stop ? 1 : 0, r.flops, r.attention_share};
    std::string own(sizeof counts, 0);
    std::memcpy(own.data(), &counts, sizeof counts);
    r.tokens = 0, r.flops = r.attention_share = 0;
    for (const std::string& text : group_->gather(own)) {
      TORCH_CHECK(text.size() == sizeof counts, "train: a rank's counts are ", text.size(), " bytes");
      std::memcpy(&counts, text.data(), sizeof counts);
      r.tokens += counts.tokens, r.flops += counts.flops, r.attention_share += counts.attention / static_cast<double>(processes());
      stop = stop || counts.stop != 0;
    }
    return stop;
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

  void read_steps(bool logs) {
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
    show(said_);
    if (!logs) return;
    Json line = {{"kind", "train"}, {"step", step_}, {"loss", last.result.loss}, {"lr", last.lr}, {"gradient_norm", last.result.gradient_norm},
                 {"attention_share", last.result.attention_share}, {"tokens", all_tokens_}, {"tokens_per_second", rate},
                 {"flops_per_token", last.result.flops / static_cast<double>(last.result.tokens)}};
    if (!on_cpu()) line["mfu"] = flops_ / seconds / kPeakFlops / static_cast<double>(processes());
    log(std::move(line));
    begin_ = now();
    seconds_ = flops_ = 0;
    tokens_ = 0;
  }

  // Rates are of the time between two lines, without validations and saves: what the device still has to do counts before they begin.
  void stop_clock() {
    if (!pending_.empty()) read_steps(false);
    seconds_ += now() - begin_;
  }

  void skip(int64_t step, const StepResult& r) {
    // Written as text: JSON has no word for NaN.
    log({{"kind", "skipped"}, {"step", step}, {"loss", fmt::format("{}", r.loss)}, {"gradient_norm", fmt::format("{}", r.gradient_norm)}});
    if (first()) log::warn("step {} skipped: loss {}, gradient norm {}", step, r.loss, r.gradient_norm);
    if (++skipped_in_a_row_ >= kMaxSkipped) {
      fail("{}: loss or gradient was not finite at {} steps in a row; lower lr, or look at the data", folder_.path().string(), kMaxSkipped);
    }
  }

  // What was trained is kept whatever becomes of the validation.
  void validate_safely(bool last) {
    std::vector<Json> rows;
    std::exception_ptr error;
    bool stopped = false;
    try {
      rows = validate_own();
    } catch (const Interrupted&) {
      stopped = true;
    } catch (const Error&) {
      error = std::current_exception();
    }
    if (anywhere(error != nullptr)) {
      save();
      if (error) std::rethrow_exception(error);
      throw PeerLost("a rank is gone: its validation failed");
    }
    if (anywhere(stopped)) {
      summary_.interrupted = !last;
    } else {
      log_validation(rows);
    }
  }

  // Several processes take turns at the schedules.
  std::vector<Json> validate_own() {
    if (!task_.validate) return {};
    std::vector<std::string> own;
    const auto all = options_.validation_schedules();
    for (size_t i = 0; i < all.size(); ++i) {
      if (group_ == nullptr || static_cast<int64_t>(i) % processes() == group_->rank()) own.push_back(all[i]);
    }
    return own.empty() ? std::vector<Json>() : task_.validate(model_, own);
  }

  void log_validation(const std::vector<Json>& own) {
    summary_.validation = own;
    if (group_ != nullptr) {
      const auto texts = group_->gather(Json(own).dump());
      std::vector<Json> by_rank;
      for (const auto& text : texts) by_rank.push_back(Json::parse(text));
      summary_.validation.clear();
      for (size_t i = 0; i / texts.size() < by_rank[i % texts.size()].size(); ++i) summary_.validation.push_back(by_rank[i % texts.size()][i / texts.size()]);
    }
    for (Json row : summary_.validation) {
      row["kind"] = "validation";
      row["step"] = step_;
      log(row);
    }
  }

  // No rank goes on, or leaves, before rank 0 has written: one that has left would end the others.
  void save() {
    optimizer_.assemble();
    const int64_t steps = optimizer_.steps();
    if (first()) write_checkpoint(steps);
    optimizer_.drop_assembled();
    (void)anywhere(false);
  }

  void write_checkpoint(int64_t steps) {
    folder_.save(step_, model_, optimizer_, {{"step", step_}, {"tokens", all_tokens_}, {"optimizer_steps", steps}, {"data", feed_->position()}},
                 task_.tokenizer.get(), options_.keep_checkpoints);
    write_report(folder_, options_, metrics_);
  }

  void log(Json line) {
    if (!first()) return;
    folder_.log(line);
    metrics_.push_back(std::move(line));
  }

  const TrainOptions& options_;
  TrainTask& task_;
  ProcessGroup* group_;  // null: this process is all
  BatchDivision division_;
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
  ProgressBar* bar_ = nullptr;
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

TrainSummary train(const TrainOptions& options, TrainTask& task, ProcessGroup* group) {
  options.validate();
  return Run(options, task, group).loop();
}

void check_processes(const TrainOptions& options, int64_t processes) {
  options.validate();
  (void)divide_batches(options.accumulate, options.batch_size, processes);
  (void)device_of_process(options.device, processes - 1, processes);
  check_memory(options, processes);
}

std::string device_of_process(const std::string& device, int64_t local_rank, int64_t processes) {
  if (device == "cpu" || processes == 1) return device;
  if (device != "cuda") fail("device is '{}' for {} processes; expected cpu, or cuda: each process takes the GPU of its number", device, processes);
  const auto gpus = static_cast<int64_t>(at::hasCUDA() ? at::getNumGPUs() : 0);
  if (gpus == 0) (void)parse_device(device);  // says what is missing
  if (local_rank < gpus) return fmt::format("cuda:{}", local_rank);
  fail("{} processes on this host, but it has {} GPUs; start no more processes than GPUs", processes, gpus);
}

}  // namespace oryx
