// What the parts of the backward pass share.
#pragma once

#include "oryx/ops/ssd/cuda/ssd_cuda_internal.cuh"

namespace oryx::ssd_cuda {

struct GradientArguments {
  const float* dt_raw;
  const float* dt_bias;
  const float* A_log;
  const float* D;
  const uint8_t* wanted;
  const __nv_bfloat16* states[2];  // S0 and dS of every chunk: [records, Hs, V / 64, 64, K], panels as in shared memory
  const int32_t* chunk_offsets;    // [N + 1], packed only
  int records;                     // number of chunks, or an upper bound
  int heads;                       // output heads a block goes through; they share a key head and a query head
  __nv_bfloat16* d_q;
  __nv_bfloat16* d_k;
  __nv_bfloat16* d_v;
  // Where several blocks or heads add to one row, float32 shares take its place: [B T, Ho / heads, K] (q and k), [B T,
  // Ho, V].
  float* dq_part;
  float* dk_part;
  float* dv_part;
  float* d_step;     // [B T, Ho]
  float* head_part;  // [3, Ho, records]: of dt_bias, A_log and D
};

cudaError_t launch_gradients(const Shape& s, const GradientArguments& a, const CUtensorMap* maps, cudaStream_t stream);

}  // namespace oryx::ssd_cuda
