#include "oryx/train/batch_feed.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>

#include "oryx/model/routed_cost.h"
#include "oryx/ops/cross_entropy/cross_entropy.h"

namespace oryx {

BatchFeed::BatchFeed(BatchSource& source, const ModelSchedule& schedule, const LanguageModel& model, const FeedOptions& options, int64_t ahead)
    : source_(source), schedule_(schedule), model_(model), options_(options), ahead_(ahead >= 0 ? ahead : model.device().is_cpu() ? 0 : 2), position_(source.position()) {
  if (ahead_ > 0) thread_ = std::thread([this] { work(); });
}

BatchFeed::~BatchFeed() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

// On a GPU all batches of a step are drawn before the first is given.
BatchFeed::Drawn BatchFeed::draw_next() {
  if (group_.empty()) {
    const int64_t n = options_.pack || !model_.device().is_cpu() ? options_.accumulate : 1;
    documents_ = 0;
    for (int64_t i = 0; i < n; ++i) {
      TrainBatch batch = source_.next();
      if (batch.cu_seqlens) documents_ = std::max(documents_, document_room(batch.cu_seqlens->numel() - 1));
      group_.push_back({std::move(batch), source_.position()});
    }
  }
  Drawn next = std::move(group_.front());
  group_.pop_front();
  return next;
}

FedBatch BatchFeed::draw() {
  const at::NoGradGuard no_grad;
  const std::lock_guard drawing(drawing_);
  Drawn drawn = draw_next();
  TrainBatch& batch = drawn.batch;
  if (drawn_ % options_.accumulate == 0) sequence_ = 0;
  for (auto& piece : batch.pieces) {
    piece.context.seed = options_.seed;
    piece.context.step = static_cast<uint64_t>(options_.first_step + drawn_ / options_.accumulate);
    if (!batch.weight) piece.context.sequence += sequence_;
  }
  sequence_ += batch.pieces.size();
  ++drawn_;
  FedBatch fed;
  fed.tokens = batch.input_ids.numel();
  fed.input.input_ids = batch.input_ids;
  fed.input.cu_seqlens = batch.cu_seqlens;
  if (batch.cu_seqlens && (options_.pack || !model_.device().is_cpu())) fed.input.cu_seqlens = padded_bounds(*batch.cu_seqlens, documents_);
  fed.input.routing = schedule_.route(batch.pieces, batch.input_ids.size(0), batch.input_ids.size(1));
  fed.attention_share = attention_share(model_.config(), fed.input.routing);
  fed.flops = pieces_flops(model_.config(), fed.input.routing, batch.pieces);
  fed.position = std::move(drawn.position);
  fed.weight = batch.weight;
  fed.targets = batch.targets;  // checked and sent by the loss, without waiting
  if (!options_.pack) {
    model_.prepare(fed.input);
    return fed;
  }
  model_.check_ids(fed.input.input_ids);
  ops::check_targets(fed.targets, model_.config().vocab_size);
  fed.packed = pack_batch(model_, fed.input, fed.targets, spans_, fed.weight);
  spans_ = std::max(spans_, fed.packed.layout->spans);
  return fed;
}

void BatchFeed::work() {
  const c10::DeviceGuard on(model_.device());
  try {
    while (true) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stop_ || static_cast<int64_t>(ready_.size()) < ahead_; });
        if (stop_) return;
      }
      FedBatch batch = draw();
      {
        const std::lock_guard lock(mutex_);
        ready_.push_back(std::move(batch));
      }
      changed_.notify_all();
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    error_ = std::current_exception();
    changed_.notify_all();
  }
}

FedBatch BatchFeed::next() {
  FedBatch batch;
  if (ahead_ == 0) {
    batch = draw();
  } else {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !ready_.empty() || error_; });
    if (ready_.empty()) std::rethrow_exception(error_);
    batch = std::move(ready_.front());
    ready_.pop_front();
    lock.unlock();
    changed_.notify_all();
  }
  position_ = batch.position;
  return batch;
}

}  // namespace oryx
