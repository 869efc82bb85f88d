// Rows of tokens with the bounds of the sequences in them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

namespace oryx {

constexpr int64_t kIgnoreTarget = -100;

// Sequences never cross rows: every row begins one, so does every document. All state starts anew there.
struct Batch {
  at::Tensor input_ids;   // [B, T] int64
  at::Tensor targets;     // [B, T] int64: the next token of the same document; kIgnoreTarget at a document's last token
  at::Tensor cu_seqlens;  // [N + 1] int32: bounds of the sequences in the row [1, B * T] that input_ids flattens to
  std::vector<int32_t> bounds;  // cu_seqlens on the host
  int32_t max_seqlen = 0;       // of the longest sequence, in tokens
  int64_t kept_targets = 0;
};

// Puts sequences into a [rows, columns] batch, from left to right and top to bottom.
class BatchBuilder {
 public:
  BatchBuilder(int64_t rows, int64_t columns);

  int64_t free_in_row() const { return columns_ - filled_ % columns_; }
  bool full() const { return filled_ == rows_ * columns_; }
  // `tokens`: the inputs, and with `continues` one more: the last input's target. At most free_in_row() inputs, at
  // least one.
  void add(std::span<const int64_t> tokens, bool continues);
  // The batch; a single row may be cut to what it holds.
  Batch finish();

 private:
  int64_t rows_, columns_, filled_ = 0;
  Batch batch_;
};

}  // namespace oryx
