// What a GPU is called.
#include <cuda_runtime_api.h>

#include "oryx/ops/selftest/selftest.h"

namespace oryx::ops {
namespace {

std::string name_of(int index) {
  cudaDeviceProp properties{};
  return cudaGetDeviceProperties(&properties, index) == cudaSuccess ? properties.name : "unknown GPU";
}

const bool registered = (gpu_name_of = name_of, true);

}  // namespace
}  // namespace oryx::ops
