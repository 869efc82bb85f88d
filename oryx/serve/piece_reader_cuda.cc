// Captures of a piece's pass on CUDA: all of a reader's stand in one pool of memory, since they run one after another.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <memory>

#include "oryx/ops/cuda/captured_graph.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/serve/piece_reader.h"

namespace oryx::serve {
namespace {

PieceReader::Capture capture_passes_on(at::Device device) {
  return [device, pool = at::cuda::graph_pool_handle(), side = c10::cuda::getStreamFromPool(false, device.index())](const std::function<void()>& pass) -> std::function<void()> {
    const c10::cuda::CUDAGuard guard(device);
    ops::cuda::check("pieces", cudaDeviceSynchronize());
    auto graph = std::make_shared<ops::cuda::CapturedGraph>();
    {
      const c10::cuda::CUDAStreamGuard on(side);
      pass();  // what kernels and libraries prepare when they first run, they prepare outside of a capture
      ops::cuda::check("pieces", cudaDeviceSynchronize());
      graph->capture_begin(pool, cudaStreamCaptureModeThreadLocal);
      try {
        pass();
      } catch (...) {
        graph->abandon();
        throw;
      }
      graph->capture_end();
    }
    return [graph, device] {
      const c10::cuda::CUDAGuard guard(device);
      graph->replay();
    };
  };
}

const bool kPassCaptureRegistered = detail::register_pass_capture(capture_passes_on);

}  // namespace
}  // namespace oryx::serve
