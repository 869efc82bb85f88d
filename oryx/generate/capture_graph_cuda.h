// A CUDA graph of what a function launches.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <memory>

#include "oryx/ops/cuda/captured_graph.h"

namespace oryx::fused {

// Waits for the device. `launch` allocates nothing; what it throws is thrown on, and the process goes on as if nothing had been captured.
template <typename Launch>
std::unique_ptr<ops::cuda::CapturedGraph> capture_graph(at::Device device, Launch launch) {
  // A capture has a stream of its own.
  const c10::cuda::CUDAStream side = c10::cuda::getStreamFromPool(false, device.index());
  cudaDeviceSynchronize();
  const c10::cuda::CUDAStreamGuard on(side);
  auto graph = std::make_unique<ops::cuda::CapturedGraph>();
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
