// Programmatic dependent launch: a kernel of a chain may start before the one ahead of it in the stream has ended, read what that one does not write (weights), and wait for it
// before it reads the rest or writes anything. Every kernel of the chain must wait, so that each is complete when the second next begins to write.
#pragma once

#include <cuda_runtime.h>

namespace oryx::ops::cuda {

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <typename... Parameters, typename... Arguments>
int launch_after(void (*kernel)(Parameters...), dim3 grid, int threads, int bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads)), config.dynamicSmemBytes = static_cast<size_t>(bytes), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace oryx::ops::cuda
