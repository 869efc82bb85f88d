// A CUDA graph whose capture may fail.
#pragma once

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <cuda_runtime_api.h>

namespace oryx::ops::cuda {

class CapturedGraph : public at::cuda::CUDAGraph {
 public:
  // What capture_end() leaves undone where the capture has failed, so that the process may go on without the graph: else nothing could be allocated any more.
  void abandon() {
    cudaGraph_t broken = nullptr;
    if (cudaStreamEndCapture(capture_stream_.stream(), &broken) == cudaSuccess && broken != nullptr) (void)cudaGraphDestroy(broken);
    (void)cudaGetLastError();
    c10::cuda::CUDACachingAllocator::endAllocateToPool(capture_dev_, mempool_id_);
    c10::cuda::CUDACachingAllocator::releasePool(capture_dev_, mempool_id_);
  }
};

}  // namespace oryx::ops::cuda
