// A training run from options to checkpoints: resumable at any step, bit for bit on the same machine and thread count.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"
#include "oryx/parallel/process_group.h"
#include "oryx/train/batch_source.h"
#include "oryx/train/options.h"
#include "oryx/train/run_folder.h"

namespace oryx {

// What a run trains on and is judged by.
struct TrainTask {
  std::unique_ptr<BatchSource> source;
  std::shared_ptr<const Tokenizer> tokenizer;  // saved with the checkpoints; may be null
  // Results on held-out data, one object a schedule with at least "schedule" and "loss". May be empty: nothing is validated.
  std::function<std::vector<Json>(const LanguageModel&, const std::vector<std::string>& schedules)> validate;
};

// The task of a data set folder (`oryx data build`).
TrainTask text_task(const TrainOptions& options);

struct TrainSummary {
  int64_t step = 0;        // reached
  bool interrupted = false;
  double seconds = 0;
  int64_t tokens = 0;      // of this call, of all processes
  double last_loss = 0;
  int64_t captured = 0;          // kinds of steps that were captured (cuda_graph)
  std::vector<Json> validation;  // the last one's results
};

// Trains from the newest whole checkpoint in options.out, or from the start, to options.steps. Ctrl-C saves and returns with
// `interrupted`. A step whose loss or gradient is not finite is skipped and logged; ten in a row throw Error.
// group: processes that share each step's batches; every rank calls it alike, on options.device of its own, and rank 0 alone writes options.out, which all must be able to read. Null: one process.
TrainSummary train(const TrainOptions& options, TrainTask& task, ProcessGroup* group = nullptr);

// What of the options can be known to fail with so many processes of this host, before any is started. Throws Error.
void check_processes(const TrainOptions& options, int64_t processes);
// The device of the process with this number on its host: the GPU of that number for "cuda". Throws Error.
std::string device_of_process(const std::string& device, int64_t local_rank, int64_t processes);

// RUN/report.html from the metrics' lines.
void write_report(const RunFolder& run, const TrainOptions& options, const std::vector<Json>& metrics);

}  // namespace oryx
