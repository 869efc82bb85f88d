// Tensor maps of bfloat16 arrays for the bulk tensor copies. The driver's function is looked up at run time, so that a program that loads the library
// needs no libcuda where there is no GPU.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

namespace oryx::ops::cuda {

// sizes and box in elements, innermost first; strides in bytes, of every dimension but the innermost. What a box reads outside of the array is zero.
template <int kRank>
cudaError_t encode_tensor_map(CUtensorMap* map, const void* data, const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                              const cuuint32_t (&box)[kRank], CUtensorMapSwizzle swizzle) {
  struct Driver {
    PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
    cudaError_t status;
    Driver() {
      void* found = nullptr;
      cudaDriverEntryPointQueryResult result;
      status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
      if (status == cudaSuccess && result != cudaDriverEntryPointSuccess) status = cudaErrorNotSupported;
      if (status == cudaSuccess) encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
    }
  };
  static const Driver driver;
  if (driver.status != cudaSuccess) return driver.status;
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  const auto encode = [&] {
    return driver.encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode();
  if (status != CUDA_SUCCESS) {  // the driver wants a current context, which a thread in which nothing has run yet (autograd's, at its first operator) has not
    int device = 0;
    cudaError_t set = cudaGetDevice(&device);
    if (set == cudaSuccess) set = cudaSetDevice(device);
    if (set != cudaSuccess) return set;
    status = encode();
  }
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace oryx::ops::cuda
