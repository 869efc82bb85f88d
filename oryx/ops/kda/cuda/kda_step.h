// C interface of the one-token step of Kimi Delta Attention (../kda.h) on CUDA: pointers, sizes, a stream; returns a cudaError_t.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// q [N, Hq, K], k [N, Hk, K], v [N, Hv, V] dense, dtype 0 float32 or 1 bfloat16; g [N, Hs, K] and beta [N, Hs] float32; state float32, [V, K] of each head dense, with
// strides in elements; o [N, Ho, V] in dtype. `chained`: in a chain of kernels, of which the one before must not write the state (oryx/ops/cuda/dependent_launch.cuh). places, active: as in gated_delta_step.h, or null.
int oryx_kda_step(const void* q, const void* k, const void* v, const float* g, const float* beta, float* state, void* o, int dtype, int64_t N, int64_t Hq, int64_t Hk,
                  int64_t Hv, int64_t K, int64_t V, int64_t state_sequence, int64_t state_head, float scale, float l2_eps, int chained, const int32_t* places,
                  const int32_t* active, void* stream);

#ifdef __cplusplus
}
#endif
