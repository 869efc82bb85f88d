// Tensor maps of keys and values.
#pragma once

#include "oryx/ops/cuda/hopper.cuh"

namespace oryx::span_attention_cuda {

// [B, T, heads, D] with the given strides (elements; of batch row, token, head) as boxes of `rows` tokens of 64 elements of one head, swizzled.
// What lies outside of [0, T) is zero.
inline cudaError_t encode(CUtensorMap* map, const void* data, const int64_t (&stride)[3], int B, int T, int heads, int D, int rows) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode_tiled = nullptr;
  if (encode_tiled == nullptr) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess) return status;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode_tiled = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(T), static_cast<cuuint64_t>(B)};
  const cuuint64_t strides[3] = {2 * static_cast<cuuint64_t>(stride[2]), 2 * static_cast<cuuint64_t>(stride[1]), 2 * static_cast<cuuint64_t>(stride[0])};
  const cuuint32_t box[4] = {64, 1, static_cast<cuuint32_t>(rows), 1}, steps[4] = {1, 1, 1, 1};
  const CUresult status = encode_tiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace oryx::span_attention_cuda
