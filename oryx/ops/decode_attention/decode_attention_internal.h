// What the implementations of decode_attention share.
#pragma once

#include "oryx/ops/decode_attention/decode_attention.h"

namespace oryx::ops {

// Shapes and dtypes against the contract, without looking at the values of lengths, blocks and wanted. Throws oryx::Error, one line.
void check_decode_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                            const std::optional<at::Tensor>& blocks, const std::optional<at::Tensor>& wanted, DecodeRope rope, int64_t window,
                            std::optional<double> scale);

// Rows of a paged tensor [pages, page, H, d] side by side: [N, most * page, H, d].
at::Tensor gather_pages(const at::Tensor& rows, const at::Tensor& blocks);

// [n, 3] int32 spans (row, 0, 1) of the rows that are wanted, as span_attention takes them; nothing when all are.
std::optional<at::Tensor> wanted_spans(const std::optional<at::Tensor>& wanted);

}  // namespace oryx::ops
