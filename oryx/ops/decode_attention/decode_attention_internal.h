// What the implementations of decode_attention share.
#pragma once

#include <algorithm>

#include "oryx/ops/decode_attention/decode_attention.h"

namespace oryx::ops {

// Shapes and dtypes against the contract, without looking at the values of lengths, blocks and wanted. Throws oryx::Error, one line.
void check_decode_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                            const std::optional<at::Tensor>& blocks, const std::optional<at::Tensor>& wanted, DecodeRope rope, int64_t window,
                            std::optional<double> scale);

void check_decode_attention(const PagedDecode& a);
// Of the values too: of each sequence that is wanted, 1 to `capacity` keys, those that it sees in pages that there are. On the CPU.
void check_lengths(const at::Tensor& lengths, const std::optional<at::Tensor>& wanted, int64_t capacity);
void check_blocks(const PagedDecode& a);

// Whether sequence n's output is wanted; on the CPU.
inline bool is_wanted(const std::optional<at::Tensor>& wanted, int64_t n) { return !wanted || (*wanted)[n].item<bool>(); }

// Keys that a query behind `length` keys, its own included, sees: [head, head_end) of the first ones and [begin, end).
struct VisibleRange {
  int64_t head, head_end, begin, end;
};
inline VisibleRange visible_keys(int64_t length, int64_t window, int64_t first, int64_t reach) {
  const int64_t low = reach > 0 ? std::max<int64_t>(0, length - reach) : 0;
  const int64_t begin = std::max(low, window > 0 ? length - window : 0);
  if (begin <= first) return {0, 0, low, length};
  return {std::min(low, first), first, begin, length};
}

// Rows of a paged tensor [pages, page, H, d] side by side: [N, most * page, H, d].
at::Tensor gather_pages(const at::Tensor& rows, const at::Tensor& blocks);

// [n, 3] int32 spans (row, 0, 1) of the rows that are wanted, as span_attention takes them; nothing when all are.
std::optional<at::Tensor> wanted_spans(const std::optional<at::Tensor>& wanted);

}  // namespace oryx::ops
