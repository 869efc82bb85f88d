// What span_attention's Hopper kernels share beside oryx/ops/cuda: accesses to shared memory by address.
#pragma once

#include "oryx/ops/cuda/hopper.cuh"
#include "oryx/ops/cuda/packet.cuh"

namespace oryx::span_attention_cuda {

using namespace oryx::hopper;
using ops::cuda::exp2_fast;

__device__ __forceinline__ void barrier_arrive_named(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ int load_shared_int(uint32_t at) {
  int x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ float2 load_shared2(uint32_t at) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ uint4 load_shared16(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared16(uint32_t at, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_shared4(uint32_t at, uint32_t x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }

// Zeroes rows [from, rows) of `panels` panels of `rows` rows of 128 bytes: 0 times a neighbour's NaN would be NaN.
__device__ __forceinline__ void clear_rows(uint32_t at, int panels, int rows, int from, int thread, int threads) {
  for (int i = thread; i < panels * (rows - from) * 8; i += threads)
    store_shared16(at + (i / ((rows - from) * 8) * rows + from) * 128 + i % ((rows - from) * 8) * 16, make_uint4(0, 0, 0, 0));
}

}  // namespace oryx::span_attention_cuda
