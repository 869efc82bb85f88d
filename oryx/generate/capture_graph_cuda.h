// A CUDA graph of what a function launches.
#pragma once

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <memory>

namespace oryx::fused {

class DecodeGraph : public at::cuda::CUDAGraph {
 public:
  // What capture_end() leaves undone where the capture has failed: else nothing could be allocated any more.
  void abandon() {
    cudaGraph_t broken = nullptr;
    if (cudaStreamEndCapture(capture_stream_.stream(), &broken) == cudaSuccess && broken != nullptr) (void)cudaGraphDestroy(broken);
    (void)cudaGetLastError();
    c10::cuda::CUDACachingAllocator::endAllocateToPool(capture_dev_, mempool_id_);
    c10::cuda::CUDACachingAllocator::releasePool(capture_dev_, mempool_id_);
  }
};

// Waits for the device. `launch` allocates nothing; what it throws is thrown on, and the process goes on as if nothing had been captured.
template <typename Launch>
std::unique_ptr<DecodeGraph> capture_graph(at::Device device, Launch launch) {
  // A capture has a stream of its own.
  const c10::cuda::CUDAStream side = c10::cuda::getStreamFromPool(false, device.index());
  cudaDeviceSynchronize();
  const c10::cuda::CUDAStreamGuard on(side);
  auto graph = std::make_unique<DecodeGraph>();
  graph->capture_begin();
  try {
    launch();
  } catch (...) {
    graph->abandon();
    throw;
  }
  graph->capture_end();
  return graph;
}

}  // namespace oryx::fused
