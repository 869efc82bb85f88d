// Where training batches come from. A source is added by deriving from BatchSource; the trainer knows no other.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/data/loader.h"
#include "oryx/data/synthetic.h"
#include "oryx/modes/span_table.h"

namespace oryx {

struct TrainBatch {
  at::Tensor input_ids, targets;         // [rows, tokens] int64, as the model takes them: packed batches are one row
  std::optional<at::Tensor> cu_seqlens;  // [N + 1] int32 when packed
  // The sequences of the batch; context.sequence counts them from 0. The feed fills in seed and step.
  std::vector<ModePiece> pieces;
  // Of a batch that is one process's share of a step (rank_batches.h): the share of the step's targets that it holds, by which its mean loss counts; and its pieces' context.sequence counts
  // through the whole step already. Not set: the batch is whole.
  std::optional<double> weight = {};
};

class BatchSource {
 public:
  virtual ~BatchSource() = default;
  virtual TrainBatch next() = 0;
  // Where the next batch comes from, as part of a checkpoint, and back. seek throws Error on what position() did not give.
  virtual Json position() const = 0;
  virtual void seek(const Json& position) = 0;
};

// Packed rows of a token file, in the loader's shuffled order.
class TextBatches : public BatchSource {
 public:
  TextBatches(std::shared_ptr<const TokenFile> file, const LoaderOptions& options) : loader_(std::move(file), options) {}
  TrainBatch next() override;
  Json position() const override;
  void seek(const Json& position) override;

 private:
  TrainLoader loader_;
};

// Associative recall, an endless stream of fresh examples.
class RecallBatches : public BatchSource {
 public:
  RecallBatches(const RecallOptions& options, int64_t batch_size, uint64_t seed) : options_(options), batch_size_(batch_size), seed_(seed) {
    check(options_);
  }
  TrainBatch next() override;
  Json position() const override { return {{"index", index_}}; }
  void seek(const Json& position) override;

 private:
  RecallOptions options_;
  int64_t batch_size_;
  uint64_t seed_, index_ = 0;
};

}  // namespace oryx
