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
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b), "r"(accumulate));
}
// The same with a in registers and b stored k x n.
__device__ __forceinline__ void wgmma_64x32_rs_kn(float (&d)[16], const uint32_t* a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
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
// sum + the products of two pairs
__device__ __forceinline__ float dot(uint32_t a, uint32_t b, float sum) { return fmaf(low(a), low(b), fmaf(high(a), high(b), sum)); }

// A tile of 64 rows (tokens) of 128 swizzled bytes by accumulator position: a warp has 16 rows, a matrix load or store moves two of their eight
// 8-column blocks, j and j + 1 (j even), as the words of rows lane / 4 and lane / 4 + 8 of j, then of j + 1.
__device__ __forceinline__ uint32_t tile_rows(int warp, int lane) { return (16 * (warp % 4) + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4); }
// rows: the tile's address + tile_rows
__device__ __forceinline__ void load_tile(uint32_t (&r)[4], uint32_t rows, int j) { load_matrix(r, rows ^ (j << 4)); }
__device__ __forceinline__ void store_tile(uint32_t rows, int j, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrix(rows ^ (j << 4), a, b, c, d);
}
// Sums over the columns of a tile of d times the tile, rows t0 and t0 + 8, to `to` (64 floats).
__device__ __forceinline__ void row_dots(const float (&d)[32], uint32_t rows, int t0, uint32_t to, int lane) {
  float sum[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t r[4];
    load_tile(r, rows, j);
#pragma unroll
    for (int m = 0; m < 4; ++m) sum[m % 2] = fmaf(d[4 * j + 2 * m], low(r[m]), fmaf(d[4 * j + 2 * m + 1], high(r[m]), sum[m % 2]));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    if (lane % 4 == 0) store_float(to + 4 * (t0 + 8 * h), sum[h]);
  }
}

// The low word of a descriptor of rows of 128 bytes in groups of eight (see `descriptor`), which takes sums: bytes / 16 from the tile's start.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address) { return (1u << 16) | (address >> 4); }
__device__ __forceinline__ uint64_t descriptor_of(uint32_t low) { return static_cast<uint64_t>((1u << 30) | (1024 >> 4)) << 32 | low; }
// From k-step kk on: operands stored n x k (m x k) in panels of 64 k of `bytes` each; k x n (k x m).
__device__ __forceinline__ uint64_t tile_nk(uint32_t low, int kk, int bytes) { return descriptor_of(low + (kk / 4 * bytes + kk % 4 * 32) / 16); }
__device__ __forceinline__ uint64_t tile_kn(uint32_t low, int kk) { return descriptor_of(low + kk * 128); }

}  // namespace oryx::gated_delta_cuda
