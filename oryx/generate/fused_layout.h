// Weights as the fused decoder's kernels read them: the tensor cores' fragments, in the order of the stream. The layouts stand in cuda/decode_product.h and cuda/decode_step.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace oryx::fused {

// A weight [R, C] for cuda/decode_product.h; R and C multiples of 16. -> [R / 16, C / 16, 8, 4, 2, 2, 2]
at::Tensor product_fragments(const at::Tensor& w);

// Row pieces of cuda/decode_step.h; R a multiple of 4, C of 64. -> [R / 4, C / 64, 2, 4, 4, 2, 2, 2]
at::Tensor row_pieces(const at::Tensor& w);

// Column pieces of it, shared out to `clusters`; R = 2,048, C a multiple of 16. -> [R C]
at::Tensor column_pieces(const at::Tensor& w, int64_t clusters);

}  // namespace oryx::fused
