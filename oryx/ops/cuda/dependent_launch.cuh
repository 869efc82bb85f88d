// Programmatic dependent launch: a kernel of a chain may start before the one ahead of it in the stream has ended, read what that one does not write (weights), and wait for it
// before it reads the rest or writes anything. Every kernel of the chain must wait, so that each is complete when the second next begins to write.
#pragma once

#include <cuda_runtime.h>

namespace oryx::ops::cuda {

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Blocks are started in clusters of `cluster` neighbours in x: side by side on the chip, for those that read the same.
template <typename... Parameters, typename... Arguments>
int launch_clusters_after(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads, int bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster), attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads)), config.dynamicSmemBytes = static_cast<size_t>(bytes), config.stream = stream;
  config.attrs = attributes, config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
template <typename... Parameters, typename... Arguments>
int launch_after(void (*kernel)(Parameters...), dim3 grid, int threads, int bytes, cudaStream_t stream, const Arguments&... arguments) {
  return launch_clusters_after(1, kernel, grid, threads, bytes, stream, arguments...);
}

}  // namespace oryx::ops::cuda
