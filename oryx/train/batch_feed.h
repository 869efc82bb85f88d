// Batches of a run, ready for the model: drawn, routed, checked and on the model's device. On a GPU a thread works ahead of the steps, so that the device
// waits neither for data nor for the host.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>

#include "oryx/model/language_model.h"
#include "oryx/model/scheduling.h"
#include "oryx/train/batch_source.h"
#include "oryx/train/packed_batch.h"

namespace oryx {

struct FeedOptions {
  uint64_t seed = 0;       // of random modes
  int64_t first_step = 0;  // random modes are functions of (seed, step, sequence)
  int64_t accumulate = 1;  // batches a step
  bool pack = false;       // for captured steps: FedBatch::packed in place of a prepared input
};

struct FedBatch {
  ModelInput input;
  at::Tensor targets;  // [rows, tokens] int64 on the CPU
  PackedBatch packed;  // the same on the model's device, where it was asked for
  int64_t tokens = 0;
  double attention_share = 0;  // of the tokens
  double flops = 0;            // of the model's forward pass, as docs/training.md counts them
  Json position;               // of the source behind this batch
  std::optional<double> weight;  // TrainBatch::weight
};

class BatchFeed {
 public:
  // `source` and `schedule` outlive the feed, and nobody else draws from the source meanwhile. ahead: batches that a thread keeps ready; 0: none, a batch is
  // drawn when it is asked for; -1: 2 for a model on a GPU, else 0.
  BatchFeed(BatchSource& source, const ModelSchedule& schedule, const LanguageModel& model, const FeedOptions& options, int64_t ahead = -1);
  ~BatchFeed();
  BatchFeed(const BatchFeed&) = delete;
  BatchFeed& operator=(const BatchFeed&) = delete;

  // Throws what drawing it threw.
  FedBatch next();
  // No batch is drawn, and nothing sent to the device, while the lock is held.
  std::unique_lock<std::mutex> pause() { return std::unique_lock(drawing_); }
  // Of the source, behind the last batch that next() gave.
  const Json& position() const { return position_; }

 private:
  struct Drawn {
    TrainBatch batch;
    Json position;  // of the source behind it
  };
  Drawn draw_next();
  FedBatch draw();
  void work();

  BatchSource& source_;
  const ModelSchedule& schedule_;
  const LanguageModel& model_;
  FeedOptions options_;
  int64_t ahead_, drawn_ = 0;
  std::deque<Drawn> group_;     // the rest of a step's batches, where they are filled up alike
  int64_t documents_ = 0;       // to so many
  int64_t spans_ = 0;           // the most room for spans that a batch took: others take it too, which changes nothing but that fewer layouts come up
  uint64_t sequence_ = 0;  // counts through the batches of a step, so that no two sequences share their draws
  Json position_;

  std::mutex mutex_, drawing_;
  std::condition_variable changed_;
  std::deque<FedBatch> ready_;
  std::exception_ptr error_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace oryx
