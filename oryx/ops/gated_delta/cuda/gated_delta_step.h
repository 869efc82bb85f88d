// C interface of the one-token step of the gated delta rule (../gated_delta.h) on CUDA: pointers, sizes, a stream; returns a cudaError_t.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// q [N, Hq, K], k [N, Hk, K], v [N, Hv, V] dense, dtype 0 float32 or 1 bfloat16; g, beta [N, Hs] float32; state float32, [V, K] of each head dense, with
// strides in elements; o [N, Ho, V] in dtype.
int oryx_gated_delta_step(const void* q, const void* k, const void* v, const float* g, const float* beta, float* state, void* o, int dtype, int64_t N,
                          int64_t Hq, int64_t Hk, int64_t Hv, int64_t K, int64_t V, int64_t state_sequence, int64_t state_head, float scale, float l2_eps,
                          void* stream);
// The same in a chain of kernels, of which the one before must not write the state (oryx/ops/cuda/dependent_launch.cuh), of sequences whose states stand in `places` [N], of which
// active[0] count; null: as above.
int oryx_gated_delta_step_chained(const void* q, const void* k, const void* v, const float* g, const float* beta, float* state, void* o, int dtype, int64_t N,
                                  int64_t Hq, int64_t Hk, int64_t Hv, int64_t K, int64_t V, int64_t state_sequence, int64_t state_head, float scale,
                                  float l2_eps, const int32_t* places, const int32_t* active, void* stream);

#ifdef __cplusplus
}
#endif
