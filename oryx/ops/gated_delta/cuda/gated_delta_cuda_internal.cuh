// What the kernels of the forward pass share: the chunk record that `prepare` writes and `recurrence` reads.
#pragma once

#include "gated_delta_cuda.h"
#include "oryx/ops/cuda/hopper.cuh"

namespace oryx::gated_delta_cuda {

using namespace oryx::hopper;

constexpr int kC = 64;    // tokens of a chunk
constexpr int kD = 128;   // K and V
constexpr float kLog2e = 1.4426950408889634f;
// One record: T (64 x 64 bfloat16, 128-byte swizzle), then four times 64 floats: exp(G) rk, exp(G_C - G) rk, G log2(e), rk; rk = 1 / |k|.
constexpr int kRecordT = 0;
constexpr int kRecordRows = 8192;
constexpr int kRecordBytes = 9216;

struct Shape {
  int B, T, N, Hq, Hk, Hv, Hs, Ho;
  int chunks;       // of a sequence; packed: an upper bound over all sequences together
  int segments;     // of a sequence
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
  int begin;        // first token, in [0, B T)
  int length;
  int first_chunk;  // in the numbering of the records
};

__device__ __forceinline__ Sequence sequence(const Shape& s, int n) {
  if (s.cu_seqlens == nullptr) return {n * s.T, s.T, n * s.chunks};
  const int begin = s.cu_seqlens[n];
  return {begin, s.cu_seqlens[n + 1] - begin, s.chunk_offsets[n]};
}

cudaError_t launch_prepare(const OryxGatedDelta& p, const Shape& s, int records, char* record, int32_t* chunk_offsets, cudaStream_t stream);

// mode 0: with outputs; 1: segments' N and M, without outputs. `maps`: tensor maps of q, k, v.
cudaError_t launch_recurrence(const OryxGatedDelta& p, const Shape& s, int mode, int rows, const CUtensorMap* maps, const char* record,
                              float* own, float* map, cudaStream_t stream);
cudaError_t launch_combine(const Shape& s, float* own, const float* map, cudaStream_t stream);

}  // namespace oryx::gated_delta_cuda
