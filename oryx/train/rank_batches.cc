#include "oryx/train/rank_batches.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "oryx/common/error.h"
#include "oryx/data/packing.h"

namespace oryx {

namespace {

// Rows [begin, end) of a batch of `rows` rows. A packed batch is one row for the model, in which each of its rows begins a sequence.
TrainBatch rows_of(const TrainBatch& whole, int64_t rows, int64_t begin, int64_t end) {
  if (begin == 0 && end == rows) return whole;
  TrainBatch part;
  const bool packed = whole.cu_seqlens.has_value();
  const int64_t width = packed ? whole.input_ids.numel() / rows : whole.input_ids.size(1);
  const int64_t first = packed ? 0 : begin, from = packed ? begin * width : 0, to = packed ? end * width : width;
  const auto cut = [&](const at::Tensor& t) { return (packed ? t.narrow(1, from, to - from) : t.narrow(0, begin, end - begin)).contiguous(); };
  part.input_ids = cut(whole.input_ids);
  part.targets = cut(whole.targets);
  for (ModePiece piece : whole.pieces) {
    const bool inside = packed ? piece.column >= from && piece.column < to : piece.row >= begin && piece.row < end;
    if (!inside) continue;
    TORCH_CHECK(!packed || piece.column + piece.length <= to, "rank batches: a document crosses the rows of a packed batch");
    piece.row -= first, piece.column -= from;
    part.pieces.push_back(piece);
  }
  if (packed) {
    const at::Tensor& cu = *whole.cu_seqlens;
    part.cu_seqlens = cu.masked_select(cu.ge(from).logical_and(cu.le(to))).sub(from);
    TORCH_CHECK(part.cu_seqlens->numel() >= 2 && (*part.cu_seqlens)[0].item<int64_t>() == 0, "rank batches: a row of a packed batch begins no document");
  }
  return part;
}

int64_t kept_targets(const at::Tensor& targets) { return targets.ne(kIgnoreTarget).sum().item<int64_t>(); }

}  // namespace

BatchDivision divide_batches(int64_t accumulate, int64_t batch_size, int64_t size) {
  BatchDivision d{size, accumulate, batch_size, std::gcd(accumulate, size)};
  if (batch_size % (size / d.groups) != 0) {
    fail("a step of accumulate {} x batch_size {} rows cannot be divided over {} processes alike; expected accumulate x batch_size to be a multiple of {}{}", accumulate, batch_size, size, size,
         accumulate * batch_size % size == 0 ? fmt::format(", and batch_size of {}", size / d.groups) : "");
  }
  return d;
}

void RankBatches::draw_step() {
  const int64_t parts = division_.size / division_.groups, group = rank_ / parts, rows = division_.own_rows(), begin = rank_ % parts * rows;
  uint64_t sequences = 0;
  for (int64_t i = 0; i < division_.accumulate; ++i) {
    TrainBatch whole = inner_->next();
    const uint64_t before = sequences;
    sequences += whole.pieces.size();
    if (i % division_.groups != group) continue;
    for (auto& piece : whole.pieces) piece.context.sequence += before;
    TrainBatch own = rows_of(whole, division_.batch_size, begin, begin + rows);
    // The step's loss is the mean over its batches of their means over targets.
    const auto all = static_cast<double>(std::max<int64_t>(kept_targets(whole.targets), 1));
    own.weight = static_cast<double>(kept_targets(own.targets)) / all / static_cast<double>(division_.accumulate);
    own_.push_back(std::move(own));
  }
}

TrainBatch RankBatches::next() {
  if (own_.empty()) draw_step();
  TrainBatch next = std::move(own_.front());
  own_.pop_front();
  return next;
}

void RankBatches::seek(const Json& position) {
  own_.clear();
  inner_->seek(position);
}

}  // namespace oryx
