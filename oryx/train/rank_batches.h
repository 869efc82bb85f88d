// A step's batches divided over processes: each draws them all, keeps its share, and knows what of the whole it is.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>

#include "oryx/train/batch_source.h"

namespace oryx {

// How `accumulate` batches of `batch_size` rows are divided over `size` processes: the batches as far as their number allows, then the rows of each batch.
struct BatchDivision {
  int64_t size = 1, accumulate = 1, batch_size = 1;  // of the whole step
  int64_t groups = 1;                                // of processes that take the same batches; group g takes batches g, g + groups ...
  int64_t own_accumulate() const { return accumulate / groups; }
  int64_t own_rows() const { return batch_size * groups / size; }
};
// Throws Error where it does not come out even.
BatchDivision divide_batches(int64_t accumulate, int64_t batch_size, int64_t size);

// The batches of one rank. A step of the inner source is own_accumulate() batches here. Random modes are those of the whole step: pieces keep their numbers in it.
class RankBatches : public BatchSource {
 public:
  RankBatches(std::unique_ptr<BatchSource> inner, const BatchDivision& division, int64_t rank) : inner_(std::move(inner)), division_(division), rank_(rank) {}
  TrainBatch next() override;
  // Of the inner source, behind the step that the last batch belongs to: a checkpoint holds no trace of how many processes there were.
  Json position() const override { return inner_->position(); }
  void seek(const Json& position) override;

 private:
  void draw_step();

  std::unique_ptr<BatchSource> inner_;
  BatchDivision division_;
  int64_t rank_;
  std::deque<TrainBatch> own_;  // of the step that is being given
};

}  // namespace oryx
