// The spans of a batch in token coordinates of its [rows, tokens] tensor, by mixer: what the model and the kernels
// take.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "oryx/modes/schedule.h"

namespace oryx {

// A document, or a piece of one, in a batch: tokens [start, start + length) of the document stand at columns [column,
// column + length) of row `row`.
struct ModePiece {
  int64_t row = 0, column = 0, length = 0, start = 0;
  ModeContext context;
};

// One document in each row, each wholly prompt. Row b is sequence context.sequence + b.
std::vector<ModePiece> row_pieces(int64_t rows, int64_t tokens, ModeContext context);
// Packed documents with bounds `cu_seqlens` (int32 or int64 [N + 1], CPU) in the single row, each wholly prompt.
// Document i is sequence context.sequence + i.
std::vector<ModePiece> packed_pieces(const at::Tensor& cu_seqlens, ModeContext context);

class SpanTable {
 public:
  // Every piece's spans. Pieces must lie within [rows, tokens] and not overlap.
  static SpanTable build(const Schedule& schedule, const std::vector<ModePiece>& pieces, int64_t rows, int64_t tokens);

  // int32 [n, 3] on the CPU: (row, begin, end), sorted; no span crosses a document's bounds. n may be 0.
  const at::Tensor& of(int64_t mixer) const { return spans_.at(static_cast<size_t>(mixer)); }
  // int32 [rows, tokens] on the CPU: the mixer of each token, -1 where no piece stands.
  const at::Tensor& modes() const { return modes_; }

  int64_t count(int64_t mixer) const { return counts_.at(static_cast<size_t>(mixer)); }  // tokens
  int64_t total() const { return total_; }                                               // tokens of all pieces
  double share(int64_t mixer) const {
    return total_ == 0 ? 0 : static_cast<double>(count(mixer)) / static_cast<double>(total_);
  }

 private:
  std::vector<at::Tensor> spans_;  // by mixer
  std::vector<int64_t> counts_;
  at::Tensor modes_;
  int64_t total_ = 0;
};

}  // namespace oryx
