// Pieces of the kernels that walk the chunks, forward and backward; the rest is the gated delta rule's.
#pragma once

#include "kda_cuda_internal.cuh"

namespace oryx::kda_cuda {

using gated_delta_cuda::clear_rows, gated_delta_cuda::descriptor_nk, gated_delta_cuda::descriptor_kn, gated_delta_cuda::descriptor_T, gated_delta_cuda::descriptor_T_transposed,
    gated_delta_cuda::kEvictNormal, gated_delta_cuda::load_shared2, gated_delta_cuda::store_out, gated_delta_cuda::wgmma_ss;

// T (or P) in shared memory: all 64 tiles have their place; those above the diagonal are made zero once for every stage, the rest is copied in.
constexpr int kSharedTriangle = 64 * kTile;
__device__ __forceinline__ void clear_triangle(uint32_t at, int thread, int threads) { gated_delta_cuda::clear_T(at, thread, threads); }
__device__ __forceinline__ void load_triangle(uint32_t to, const char* from, uint32_t bar) {
#pragma unroll
  for (int i = 0; i < 8; ++i) bulk_load(to + 8 * kTile * i, from + record_tile(i, 0), (i + 1) * kTile, bar);
}

// A thread's part of 64 rows of a state [.., kColumns * 2]: rows `row` and 8 further on, columns `column` and the next of every eight.
template <int kNumbers>
__device__ __forceinline__ void load_state(float (&S)[kNumbers], const float* from, int row, int column) {
  constexpr int D = 2 * kNumbers;
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 x = from == nullptr ? make_float2(0.f, 0.f) : *reinterpret_cast<const float2*>(from + (row + 8 * h) * D + 8 * j + column);
      S[4 * j + 2 * h] = x.x;
      S[4 * j + 2 * h + 1] = x.y;
    }
}
template <int kNumbers>
__device__ __forceinline__ void write_state(const float (&S)[kNumbers], float* to, int row, int column) {
  constexpr int D = 2 * kNumbers;
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) *reinterpret_cast<float2*>(to + (row + 8 * h) * D + 8 * j + column) = make_float2(S[4 * j + 2 * h], S[4 * j + 2 * h + 1]);
}
// S diag(c), c: D floats in shared memory.
template <int kNumbers>
__device__ __forceinline__ void decay_columns(float (&S)[kNumbers], uint32_t c, int column) {
#pragma unroll
  for (int j = 0; j < kNumbers / 4; ++j) {
    const float2 f = load_shared2(c + 4 * (8 * j + column));
    S[4 * j] *= f.x, S[4 * j + 1] *= f.y, S[4 * j + 2] *= f.x, S[4 * j + 3] *= f.y;
  }
}

// A warp's 16 rows of a state (fragments of 16 x 16) to its image in device memory, whose first of these rows is at `to`; `staging`: 32 D bytes of shared
// memory of the warp's own. Returns before the bytes have left: bulk_wait at the end.
template <int D>
__device__ __forceinline__ void store_state_rows(const uint32_t (&sb)[D / 4], uint32_t staging, char* to, int lane) {
  if (lane == 0) bulk_wait_read();
  __syncwarp();
  const int r = lane % 16;
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk)
    store_matrix(staging + kk / 4 * 2048 + r * 128 + (((kk % 4 * 2 + lane / 16) ^ (r & 7)) << 4), sb[4 * kk], sb[4 * kk + 1], sb[4 * kk + 2], sb[4 * kk + 3]);
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int p = 0; p < D / 64; ++p) bulk_store(to + p * D * 128, staging + p * 2048, 2048);
    bulk_commit();
  }
}

}  // namespace oryx::kda_cuda
