// Pieces of gated_delta_backward_chunk.cu: products 32 columns wide, and access to tiles of bfloat16 in shared memory by accumulator position.
#pragma once

#include "gated_delta_walk.cuh"

namespace oryx::gated_delta_cuda {

// d (64 x 32) = a (64 x 16) b + (accumulate ? d : 0), both from shared memory, m x k and n x k.
__device__ __forceinline__ void wgmma_64x32_ss(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, %16, %17, p, 1, 1, 0, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b), "r"(accumulate));
}
// The same with a in registers and b stored k x n.
__device__ __forceinline__ void wgmma_64x32_rs_kn(float (&d)[16], const uint32_t* a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ uint32_t load_word(uint32_t at) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(at) : "memory");
  return r;
}
__device__ __forceinline__ void store_word(uint32_t at, uint32_t x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
__device__ __forceinline__ void store_float(uint32_t at, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory"); }
__device__ __forceinline__ uint4 load_unit(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ void store_unit(uint32_t at, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ float dot(uint32_t a, uint32_t b) { return low(a) * low(b) + high(a) * high(b); }

// Where this thread's pair of columns 8 j + 2 (lane % 4) of row t lies in a panel.
__device__ __forceinline__ uint32_t pair_at(uint32_t panel, int t, int j, int lane) {
  return panel + t * 128 + ((j ^ (t & 7)) << 4) + lane % 4 * 4;
}
// Sums over the columns of a panel of d times the panel, rows t0 and t0 + 8, to `to` (64 floats).
__device__ __forceinline__ void row_dots(const float (&d)[32], uint32_t panel, int t0, uint32_t to, int lane) {
  float sum[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t x = load_word(pair_at(panel, t0 + 8 * h, j, lane));
      sum[h] += d[4 * j + 2 * h] * low(x) + d[4 * j + 2 * h + 1] * high(x);
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    if (lane % 4 == 0) store_float(to + 4 * (t0 + 8 * h), sum[h]);
  }
}

}  // namespace oryx::gated_delta_cuda
