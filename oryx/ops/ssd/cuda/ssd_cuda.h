// The SSD recurrence (../ssd.h) on Hopper: launchers over plain device pointers, no torch.
//
// Chunks of C = 64 tokens. With G the running sum of dt A within a chunk, S0 the state before it (V x K):
//
//   P_tj = exp(G_t - G_j) dt_j q_t.k_j (j <= t)      O = exp(G) Q S0^T + P V + D V
//   S1 = exp(G_C) S0 + (diag(exp(G_C - G) dt) V)^T K
//
// Forward: a block walks the chunks of one sequence, output head and 64 rows of S, which stay in registers; rows of S
// are independent. Where there are too few of them to fill the chip, a sequence is cut into segments: a pass without
// outputs finds what each segment adds to the state and its decay, and the pass with outputs starts every segment from
// the sum. Nothing looks at the data: time does not depend on the decay. The same inputs give the same bits.
//
// Products take bfloat16 operands (S, P and the scaled V are rounded to it); sums, S, dt and G are float32. dt A under
// -100 counts as about -100: exp of it is 0 in float32 either way.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// All pointers are device pointers; tensors are contiguous, their start aligned to 16 bytes, with the shapes and
// grouped heads of ../ssd.h: Hs = max(Hk, Hv), Ho = max(Hq, Hs); K and V are 64 or 128. Every element of o and
// final_state is written. With cu_seqlens, B = 1, cu_seqlens[0] = 0 and cu_seqlens[N] = T; sequences may be empty. The
// caller checks arguments; bounds are device data: kernels clamp them to [0, T] and never write outside of the tensors.
struct OryxSsd {
  const void* q;               // [B, T, Hq, K] bfloat16
  const void* k;               // [B, T, Hk, K] bfloat16
  const void* v;               // [B, T, Hv, V] bfloat16
  const float* dt_raw;         // [B, T, Hs]
  const float* dt_bias;        // [Hs]
  const float* A_log;          // [Hs]
  const float* D;              // [Hs]
  const float* initial_state;  // [N, Hs, V, K] or null: zeros
  const int32_t* cu_seqlens;   // [N + 1] or null: N = B
  const uint8_t* wanted;       // [B, T], 0 where the readout is not wanted (o is zero there), or null: everywhere
  void* o;                     // [B, T, Ho, V] bfloat16
  float* final_state;          // [N, Hs, V, K] or null
  int32_t B, T, N, Hq, Hk, Hv, K, V;
  int32_t segments;  // pieces a sequence is cut into; 0: chosen from the shape
};

// Bytes of scratch memory that the forward pass needs (aligned to 128 bytes; contents need no initial value).
// cu_seqlens is not read here.
size_t oryx_ssd_workspace(const struct OryxSsd* p);

// Launches the forward pass on `stream`. Needs compute capability 9.0. Returns a cudaError_t.
int oryx_ssd_forward(const struct OryxSsd* p, void* workspace, cudaStream_t stream);

// Gradients; shapes and dtypes as what they are gradients of. Every element is written.
struct OryxSsdGradients {
  const void* d_o;             // [B, T, Ho, V] bfloat16; read where the readout is wanted alone
  const float* d_final_state;  // [N, Hs, V, K] or null: zero
  void* d_q;
  void* d_k;
  void* d_v;
  float* d_dt_raw;
  float* d_dt_bias;
  float* d_A_log;
  float* d_D;
  float* d_initial_state;  // or null
};

// Scratch and launch of the backward pass (o and final_state of `p` are not read). With dO the gradient of o, S0 and dS
// the state before a chunk and the gradient of the state after it, per chunk and output head:
//
//   W_tj = exp(G_t - G_j) dt_j (dO_t.v_j)    dQ = W K + exp(G) dO S0    dK = W^T Q + exp(G_C - G) dt V dS
//   dU = P'^T dO + exp(G_C - G) K dS^T       dV = dt dU + D dO          (P' is P without dt)
//
// A walk in each direction leaves S0 and dS of every chunk in bfloat16; then one block takes a chunk and the heads that
// share its key and query head, so that W is summed over them before it meets K and Q. Sums over blocks are made by a
// second kernel in a fixed order.
size_t oryx_ssd_backward_workspace(const struct OryxSsd* p);
int oryx_ssd_backward(const struct OryxSsd* p, const struct OryxSsdGradients* g, void* workspace, cudaStream_t stream);

// wanted [B, T] = 1 in the n spans (row, begin, end), which are clamped to [B, T], 0 elsewhere.
int oryx_ssd_wanted(const int32_t* spans, int32_t n, int32_t B, int32_t T, uint8_t* wanted, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
