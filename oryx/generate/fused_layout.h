// Weights as the fused decoder's kernels read them: the tensor cores' fragments, in the order of the stream. The layouts stand in cuda/decode_product.h and cuda/decode_step.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace oryx::fused {

// All take a weight [R, C] and return its values in another order, one dimension.
//
// For cuda/decode_product.h; R and C multiples of 16.
at::Tensor product_fragments(const at::Tensor& w);

// Row pieces of cuda/decode_step.h, R a multiple of 4, C of 64: as the rows are (the head); shared out by heads (w_in, R a multiple of 128 heads); by groups (w_gate_up, R a multiple of 32).
at::Tensor row_pieces(const at::Tensor& w);
at::Tensor row_pieces_by_head(const at::Tensor& w, int64_t heads);
at::Tensor row_pieces_by_group(const at::Tensor& w, int64_t groups);

// Column pieces of it, shared out to `groups`; R = 2,048, C a multiple of 16.
at::Tensor column_pieces(const at::Tensor& w, int64_t groups);

}  // namespace oryx::fused
