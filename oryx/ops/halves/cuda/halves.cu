// Both halves in bfloat16 of the rows of up to four float32 matrices: a thread for each element.
#include "oryx/ops/halves/cuda/halves_launch.h"

#include <cuda_bf16.h>

namespace oryx::ops::cuda {
namespace {

constexpr int kThreads = 256;

struct Parts {
  const float* data[kOryxHalvesParts];
  int64_t ends[kOryxHalvesParts];  // elements up to the end of each
};

__global__ __launch_bounds__(kThreads) void halves(Parts parts, int64_t all, __nv_bfloat16* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= all) return;
  int64_t before = 0;
  const float* data = parts.data[0];
#pragma unroll
  for (int p = 1; p < kOryxHalvesParts; ++p) {
    if (i >= parts.ends[p - 1] && parts.data[p] != nullptr) before = parts.ends[p - 1], data = parts.data[p];
  }
  const float w = data[i - before];
  const __nv_bfloat16 high = __float2bfloat16_rn(w);
  out[i] = high;
  out[all + i] = __float2bfloat16_rn(w - __bfloat162float(high));
}

}  // namespace
}  // namespace oryx::ops::cuda

extern "C" int oryx_bfloat16_halves(const float* const* parts, const int64_t* rows, int count, int64_t in, void* out, cudaStream_t stream) {
  using namespace oryx::ops::cuda;
  if (count < 1 || count > kOryxHalvesParts) return cudaErrorInvalidValue;
  Parts p{};
  int64_t all = 0;
  for (int i = 0; i < count; ++i) p.data[i] = parts[i], p.ends[i] = all += rows[i] * in;
  if (all == 0) return cudaSuccess;
  halves<<<static_cast<unsigned>((all + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p, all, static_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}
