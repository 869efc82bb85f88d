// What the kernels share: the records that `prepare` writes, where things lie in the workspaces, a warp's sums.
#pragma once

#include "kda_cuda.h"
#include "oryx/ops/gated_delta/cuda/gated_delta_walk.cuh"

namespace oryx::kda_cuda {

using namespace oryx::hopper;
using gated_delta_cuda::kC, gated_delta_cuda::kPanel, gated_delta_cuda::kTile, gated_delta_cuda::record_tile;
using gated_delta_cuda::Place, gated_delta_cuda::place, gated_delta_cuda::Sequence, gated_delta_cuda::sequence, gated_delta_cuda::Shape;
using gated_delta_cuda::power2, gated_delta_cuda::kLog2e;

// T of each chunk and state head, P of each chunk and output head: the 36 tiles of 8 x 8 on and under the diagonal (see gated_delta_cuda_internal.cuh).
constexpr int kTriangle = record_tile(8, 0);
// Keys of each chunk and state head: c_C (D floats), then c k and e k as shared memory holds them, panels of 64 channels, each 64 tokens of 128 swizzled bytes.
// Queries of each chunk and output head: scale c q likewise.
__host__ __device__ constexpr int image_bytes(int D) { return kC * D * 2; }
__host__ __device__ constexpr int keys_bytes(int D) { return 4 * D + 2 * image_bytes(D); }
__host__ __device__ constexpr int keys_start(int D) { return 4 * D; }
__host__ __device__ constexpr int keys_end(int D) { return 4 * D + image_bytes(D); }
__host__ __device__ constexpr int state_bytes(int D) { return 2 * D * D; }  // of a state in bfloat16: panels of 64 columns (K), each D rows (V) of 128 swizzled bytes
struct Records {
  char *T, *P, *keys, *queries;
};

constexpr int kProcessors = 132;    // of the H100 and H200: only the choice of rows reads it
constexpr float kFloor = 1e-12f;  // the least |beta| that T is made with where a backward pass follows

// Where things lie in `saved` and in the workspaces.
struct Plan {
  Shape shape;
  int rows, d_rows;  // of S a block of the walk keeps, forward and backward
  size_t records;    // chunks in number (packed: an upper bound)
  size_t P, triangles;                          // T, then P; bytes of both: in `saved`, or last in the forward workspace
  size_t states, u, saved;                      // in `saved`, behind them: the state before each chunk, U [B, T, Hs, D]; its size
  size_t queries, offsets, T, bytes;            // in the workspaces, where keys come first; the size of the forward one
  size_t d_states, d_w, d_q, d_k, d_g, d_bytes;  // in the backward one
};
Plan plan(const OryxKda& p);

// triangles: whether T and P are made, too. floor: the least |beta| that T is made with.
cudaError_t launch_prepare(const OryxKda& p, const Shape& s, int records, bool triangles, float floor, const Records& to, cudaStream_t stream);
// states, u: S0 of the chunks and U [B, T, Hs, D], or null.
cudaError_t launch_recurrence(const OryxKda& p, const Shape& s, int rows, const CUtensorMap& v_map, const Records& from, char* states, void* u, cudaStream_t stream);
// o_map: tensor map of d_o. Writes dS1 of the chunks, W [B, T, Hs, D] and d_initial_state.
cudaError_t launch_backward_recurrence(const OryxKda& p, const OryxKdaGradients& d, const Shape& s, int rows, const CUtensorMap& o_map, const Records& from,
                                       char* d_states, void* w, cudaStream_t stream);
// d_q, d_k [B, T, Ho, D] and d_g [B, T, Ho, D]: not yet summed over heads.
cudaError_t launch_backward_chunk(const OryxKda& p, const OryxKdaGradients& d, const Shape& s, int records, const char* states, const char* d_states, const void* u,
                                  const void* w, void* d_q, void* d_k, float* d_g, cudaStream_t stream);

// The lanes' sums of 16 values at once: lane l returns the sum over the warp of v[l / 2]. By template, not by a loop: an index that the compiler does not know would
// move v to memory.
template <int M>
__device__ __forceinline__ void halve_sums(float (&v)[16], int lane) {
  const bool upper = (lane & (2 * M)) != 0;
#pragma unroll
  for (int n = 0; n < M; ++n) {
    const float x = v[n], y = v[n + M], sent = upper ? x : y;
    v[n] = (upper ? y : x) + __shfl_xor_sync(~0u, sent, 2 * M);
  }
}
__device__ __forceinline__ float warp_sums(float (&v)[16], int lane) {
  halve_sums<8>(v, lane);
  halve_sums<4>(v, lane);
  halve_sums<2>(v, lane);
  halve_sums<1>(v, lane);
  return v[0] + __shfl_xor_sync(~0u, v[0], 1);
}

// N (2 or 4) floats, or bfloat16s, at once; two bfloat16s a word.
template <int N>
__device__ __forceinline__ void load_floats(float (&x)[N], const float* from) {
  if constexpr (N == 4) {
    const float4 y = *reinterpret_cast<const float4*>(from);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  } else {
    const float2 y = *reinterpret_cast<const float2*>(from);
    x[0] = y.x, x[1] = y.y;
  }
}
template <int N>
__device__ __forceinline__ void load_words(uint32_t (&x)[N], const void* from) {
  if constexpr (N == 2) {
    const uint2 y = *reinterpret_cast<const uint2*>(from);
    x[0] = y.x, x[1] = y.y;
  } else {
    x[0] = *static_cast<const uint32_t*>(from);
  }
}
template <int N>
__device__ __forceinline__ void store_floats(float* to, const float (&x)[N]) {
  if constexpr (N == 4) *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  else *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
}
// x in bfloat16.
template <int N>
__device__ __forceinline__ void store_rounded(void* to, const float (&x)[N]) {
  if constexpr (N == 4) *static_cast<uint2*>(to) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
  else *static_cast<uint32_t*>(to) = pack(x[0], x[1]);
}
template <int N>
__device__ __forceinline__ void unpack(float (&x)[N], const uint32_t (&w)[N / 2]) {
#pragma unroll
  for (int n = 0; n < N / 2; ++n) x[2 * n] = low(w[n]), x[2 * n + 1] = high(w[n]);
}

// A lane's N = D / 32 channels, N * lane and on: where they lie in a row of 2 D bytes whose 16-byte units are swizzled by the row.
template <int D>
__device__ __forceinline__ int row_place(int row, int lane) {
  constexpr int kBytes = D / 16;  // of a lane
  const int at = lane * kBytes;
  return row * 2 * D + (((at >> 4) ^ (row & 7)) << 4) + (at & 15);
}
// Rows of decayed keys and queries at the three levels of cuts (2, 1, 0: in the middle of 64, 32 and 16 tokens), as products read them. A key is at each level
// either row, behind the cut, or column, before it; queries are rows alone, packed.
template <int D>
struct Operands {
  static constexpr int kRow = 2 * D;
  static constexpr int kKeys = 0, kQueries = 3 * kC * kRow, kBytes = kQueries + 3 * kC / 2 * kRow;
  static __host__ __device__ constexpr int keys(int level) { return kKeys + level * kC * kRow; }
  static __host__ __device__ constexpr int queries(int level) { return kQueries + level * kC / 2 * kRow; }
  // Of a block of eight tokens that is behind its cut at this level: its first row among the queries.
  static __device__ __forceinline__ int query_row(int level, int block) {
    return 8 * (level == 0 ? block / 2 : level == 1 ? block / 4 * 2 + block % 2 : block - 4);
  }
  static __device__ __forceinline__ bool behind(int level, int block) { return (block >> level & 1) != 0; }
};

// Decays over blocks of eight tokens as seen from block `b`, of a lane's channels; table: [8][D] floats.
template <int N>
struct BlockDecays {
  float before[N], after[N];  // over all blocks before it, after it
  float middle[N], quarter[N];  // between it and the cut at levels 2 and 1

  __device__ __forceinline__ BlockDecays(const float* table, int D, int b) {
    const auto over = [&](float (&x)[N], int from, int to) {
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] = 1.f;
#pragma unroll 1
      for (int i = from; i < to; ++i) {
        float y[N];
        load_floats(y, table + i * D);
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] *= y[n];
      }
    };
    over(before, 0, b);
    over(after, b + 1, 8);
    over(middle, b < 4 ? b + 1 : 4, b < 4 ? 4 : b);
    over(quarter, b % 4 == 0 ? b + 1 : b % 4 == 3 ? b - 1 : b, b % 4 == 0 ? b + 2 : b);
  }
};

}  // namespace oryx::kda_cuda
