// Tensor maps of keys and values.
#pragma once

#include "oryx/ops/cuda/hopper.cuh"
#include "oryx/ops/cuda/tensor_map.h"

namespace oryx::span_attention_cuda {

// [B, T, heads, D] with the given strides (elements; of batch row, token, head) as boxes of `rows` tokens of 64 elements of one head, swizzled.
// What lies outside of [0, T) is zero.
inline cudaError_t encode(CUtensorMap* map, const void* data, const int64_t (&stride)[3], int B, int T, int heads, int D, int rows) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(T), static_cast<cuuint64_t>(B)};
  const cuuint64_t strides[3] = {2 * static_cast<cuuint64_t>(stride[2]), 2 * static_cast<cuuint64_t>(stride[1]), 2 * static_cast<cuuint64_t>(stride[0])};
  const cuuint32_t box[4] = {64, 1, static_cast<cuuint32_t>(rows), 1};
  return ops::cuda::encode_tensor_map(map, data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace oryx::span_attention_cuda
