// What the kernels share: the chunk record that `prepare` writes, the image of a state, and pieces of kernels.
#pragma once

#include "gated_delta_cuda.h"
#include "oryx/ops/cuda/hopper.cuh"

namespace oryx::gated_delta_cuda {

using namespace oryx::hopper;

constexpr int kC = 64;   // tokens of a chunk
constexpr int kD = 128;  // K and V of the kernels
constexpr float kLog2e = 1.4426950408889634f;
// One record: T (64 x 64 bfloat16) as its 36 tiles of 8 x 8 on and under the diagonal, row after row of tiles, 128 bytes each; then four times 64
// floats: exp(G) rk, exp(G_C - G) rk, G log2(e), rk; rk = 1 / |k|.
constexpr int kTile = 128;
__host__ __device__ constexpr int record_tile(int i, int j) { return (i * (i + 1) / 2 + j) * kTile; }
constexpr int kRecordRows = record_tile(8, 0);
constexpr int kRecordBytes = kRecordRows + 1024;
// In shared memory all 64 tiles have their place.
constexpr int kSharedT = 0, kSharedRows = 64 * kTile, kSharedRecord = kSharedRows + 1024;

struct Shape {
  int B, T, N, Hq, Hk, Hv, Hs, Ho;
  int D;         // K and V as they are in memory; beyond, zeros up to kD
  int chunks;    // of a sequence; packed: an upper bound over all sequences together
  int segments;  // of a sequence
  float scale, l2_eps;
  const int32_t* cu_seqlens;
  const int32_t* chunk_offsets;  // [N + 1], packed only
};

__device__ __forceinline__ float power2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

struct Sequence {
  int begin;  // first token, in [0, B T)
  int length;
  int first_chunk;  // in the numbering of the records
};

__device__ __forceinline__ Sequence sequence(const Shape& s, int n) {
  if (s.cu_seqlens == nullptr) return {n * s.T, s.T, n * s.chunks};
  const int begin = s.cu_seqlens[n];
  return {begin, s.cu_seqlens[n + 1] - begin, s.chunk_offsets[n]};
}

// The chunk of a record: its first token and how many it has; count 0 when there is no such chunk (packed sequences: fewer than the bound).
struct Place {
  int token, count;
};
__device__ __forceinline__ Place place(const Shape& s, int chunk) {
  if (s.cu_seqlens == nullptr) {
    const int n = chunk / s.chunks, c = chunk % s.chunks;
    return {n * s.T + c * kC, min(kC, s.T - c * kC)};
  }
  if (chunk >= s.chunk_offsets[s.N]) return {0, 0};
  int lo = 0, hi = s.N;  // the last sequence whose first chunk is at or before this one
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    (s.chunk_offsets[mid] <= chunk ? lo : hi) = mid;
  }
  const int token = s.cu_seqlens[lo] + (chunk - s.chunk_offsets[lo]) * kC;
  return {token, min(kC, s.cu_seqlens[lo + 1] - token)};
}

// A state in bfloat16 as shared memory holds it: two panels of 64 columns (K), each 128 rows (V) of 128 swizzled bytes. With D = 64 only the
// first 64 rows of the first panel are kept in device memory.
constexpr int kStateBytes = 2 * kD * kD;
constexpr int kStatePanel = kD * 128;
__host__ __device__ constexpr int state_bytes(int D) { return 2 * D * D; }

// Of the steps of the backward walk every kSoon-th is taken up by backward_chunk at once, while its inputs are in the L2 cache.
constexpr int kSoon = 2;

constexpr int kPanel = kC * 128;  // 64 tokens of 64 elements

// Where things lie in `saved` and in the workspaces.
struct Plan {
  Shape shape;
  int rows;                                                                         // of S a block of the pass with outputs keeps
  size_t records;                                                                   // in number
  size_t states, maps_transposed, saved;                                            // in `saved`: chunk states, M^T of the segments; its size
  size_t record, own, map, offsets, bytes;                                          // in the forward workspace
  size_t d_states, d_own, d_offsets, d_done, d_order, d_q, d_k, d_v, d_g, d_bytes;  // in the backward workspace
  int d_rows, merged, d_blocks;  // of the backward walk: as `rows`; segments that one walk takes; blocks, which take one walk after another
};
Plan plan(const OryxGatedDelta& p);

// [tokens, heads, D] bfloat16 as boxes of 64 tokens of 64 elements (or 16) of one head, rows of 128 bytes (32), swizzled.
cudaError_t encode(CUtensorMap* map, const void* data, int64_t tokens, int heads, int D, int columns = 64);

cudaError_t launch_offsets(const Shape& s, int32_t* chunk_offsets, cudaStream_t stream);
// floor: the least |beta| that T is made with.
// k: its tensor map.
cudaError_t launch_prepare(const OryxGatedDelta& p, const Shape& s, int records, const CUtensorMap& k, float floor, char* record, cudaStream_t stream);

// `maps`: tensor maps of q, k, v, o. own: the state behind each segment. states: S0 of the chunks, or null.
cudaError_t launch_recurrence(const OryxGatedDelta& p, const Shape& s, int rows, const CUtensorMap* maps, const char* record, const float* own,
                              char* states, cudaStream_t stream);
// N and M of every segment but the last, [N, Hs, segments, V, K] and [.., K, K], and M^T where wanted; `maps` as above.
cudaError_t launch_segments(const Shape& s, const CUtensorMap* maps, const char* record, float* own, float* map, float* map_transposed,
                            cudaStream_t stream);
// own[i] += own[i - 1] map[i], i = 1 .. segments - 2, and with an initial state from i = 0; reverse: own[i] += own[i + 1] map[i], i = segments - 2
// .. 1.
cudaError_t launch_combine(const Shape& s, bool reverse, const float* initial, float* own, const float* map, cudaStream_t stream);

// order: the records' chunks in the order in which the backward walk comes to them, `together` sequences (or their pieces) at a time; zero: done
// [records, Hs] and the counter behind it.
cudaError_t launch_order(const Shape& s, int records, int merged, int together, int32_t* order, uint32_t* done, cudaStream_t stream);
// `maps`: tensor maps of q, k, d_o. Without outputs: the segments' N'.
cudaError_t launch_backward_recurrence(const OryxGatedDelta& p, const OryxGatedDeltaGradients& d, const Shape& s, bool output, int rows, int merged,
                                       int blocks, const CUtensorMap* maps, const char* record, float* own, char* d_states, void* d_v, uint32_t* done,
                                       cudaStream_t stream);
// Runs beside launch_backward_recurrence, launched right before it in the stream: a chunk is taken up when its count in `done` is row_blocks.
// `maps`: tensor maps of q, k, v, d_o, d_v (Hs heads). d_q, d_k: [B, T, Ho, D], d_g [B, T, Ho]: not yet summed over heads.
cudaError_t launch_backward_chunk(const OryxGatedDelta& p, const OryxGatedDeltaGradients& d, const Shape& s, int records, const CUtensorMap* maps,
                                  const char* record, const char* states, const char* d_states, const int32_t* order, uint32_t* done, int row_blocks,
                                  void* d_q, void* d_k, float* d_g, cudaStream_t stream);

}  // namespace oryx::gated_delta_cuda
