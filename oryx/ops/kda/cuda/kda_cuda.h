// Kimi Delta Attention (../kda.h) on Hopper: launchers over plain device pointers, no torch.
//
// Chunks of C = 64 tokens. Within one, with G_ij = exp(g_{j+1} + .. + g_i), a vector over the K channels, c_i = exp(g_1 + .. + g_i), e_j = G_Cj, k and q
// L2-normalised, S0 the state before it:
//
//   A_ij = b_i k_i.(G_ij k_j) (j < i)     T = (I + A)^-1 diag(b)     P_ij = scale q_i.(G_ij k_j) (j <= i)
//   U = T (V - (c k) S0^T)     O = scale (c q) S0^T + P U     S1 = S0 diag(c_C) + U^T (e k)
//
// The decay stands inside the products of A and P, and exp(-(g_1 + .. + g_j)) would overflow: a chunk is cut in the middle, its later half meets its
// earlier half across the cut (rows decayed from the cut on, columns up to it: no factor is above 1, however strong the decay), and both halves are cut
// again, down to eight tokens; these leaves are made in float32, channel by channel. Decays are products of a token's own exp(g), 8 tokens, then
// blocks of 8: never exp of a difference of running sums.
//
// `prepare` computes T, P and the decayed keys and queries (c k, e k, scale c q) of every chunk, all chunks at once; `recurrence` walks the chunks of one
// (sequence, head, 64 or 128 rows of S) with S in registers: what it does is the gated delta rule's walk (oryx/ops/gated_delta/cuda), but for the
// state's decay, which is one for each column.
//
// Backward, with dO and the gradient dS1 of the state behind the chunk; W = T^T dU is dV:
//
//   dU = P^T dO + (e k) dS1^T     dS0 = dS1 diag(c_C) + dO^T (scale c q) - W^T (c k)     db_i = W_i.U_i / b_i^2
//   dP = lower(dO U^T)            dA' = -strictly lower(W U^T), the gradient of k_i.(G_ij k_j)
//   d(scale c q) = dO S0          d(c k) = -W S0          d(e k) = U dS1
//
// The forward pass of training saves T, P, U and S0 of every chunk, the last two in bfloat16. `prepare` makes decayed keys and queries again,
// `backward_recurrence` walks in reverse and writes W and dS1 of each chunk, `backward_chunk` makes the gradients of q, k and g, back through the cuts. The
// gradient of an exponent is the decayed factor times that factor's gradient, channel by channel, so that dg is sums over tokens of q dq and k dk. (To divide,
// b is kept off 0 by 1e-12 where a backward pass follows.)
//
// Products take bfloat16 operands (S, U, T, P, keys and queries, normalised and again when decayed, are rounded to it); sums, decays, S, the leaves and the inverse's blocks are
// float32 (the inverse's off-diagonal products tf32). None of it looks at the data: time does not depend on the decay. The same inputs give the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// All pointers are device pointers; tensors are contiguous, their start aligned to 16 bytes, with the shapes and grouped heads of ../kda.h:
// Hs = max(Hk, Hv), Ho = max(Hq, Hs); K = V = D, 64 or 128. Every element of o and final_state is written. With cu_seqlens, B = 1, cu_seqlens[0] = 0 and
// cu_seqlens[N] = T; sequences may be empty. The caller checks arguments; the values of cu_seqlens are checked on the device, where bad ones print a line
// and trap.
struct OryxKda {
  const void* q;               // [B, T, Hq, D] bfloat16
  const void* k;               // [B, T, Hk, D] bfloat16
  const void* v;               // [B, T, Hv, D] bfloat16
  const float* g;              // [B, T, Hs, D] log decay
  const float* beta;           // [B, T, Hs]
  const float* initial_state;  // [N, Hs, D (V), D (K)] or null: zeros
  const int32_t* cu_seqlens;   // [N + 1] or null: N = B
  const uint8_t* wanted;       // [B, T], 0 where the readout is not wanted (o is zero there), or null: everywhere
  void* o;                     // [B, T, Ho, D] bfloat16
  float* final_state;          // [N, Hs, D, D] or null
  void* saved;                 // what backward needs, written by forward (oryx_kda_saved bytes); null: nothing is saved
  int32_t B, T, N, Hq, Hk, Hv, D;
  int32_t rows;  // rows of S a block of the recurrence keeps, 64 or 128 (of D = 64: 64); 0: chosen from the shape
  float scale;   // 0: D^-1/2
  float l2_eps;
};

// Bytes of scratch memory that the forward pass needs (aligned to 128 bytes; contents need no initial value): 33280 (D = 64: 16640) for each chunk and state head, 16384 (8192) for
// each chunk and output head, 4608 more for each where nothing is saved. cu_seqlens is not read here.
size_t oryx_kda_workspace(const struct OryxKda* p);

// Bytes of `saved` (aligned to 128): T, P, the state before each chunk, in bfloat16, and U: 53760 (D = 64: 20992) for each chunk and state head, 4608 for each chunk and output head.
size_t oryx_kda_saved(const struct OryxKda* p);

// Launches the forward pass on `stream`. Needs compute capability 9.0. Returns a cudaError_t.
int oryx_kda_forward(const struct OryxKda* p, void* workspace, cudaStream_t stream);

// All written in full but for the optional d_initial_state. d_o counts as zero where `wanted` is 0.
struct OryxKdaGradients {
  const void* d_o;             // [B, T, Ho, D] bfloat16
  const float* d_final_state;  // [N, Hs, D, D] or null: zeros
  void* d_q;                   // [B, T, Hq, D] bfloat16
  void* d_k;                   // [B, T, Hk, D] bfloat16
  void* d_v;                   // [B, T, Hv, D] bfloat16
  float* d_g;                  // [B, T, Hs, D]
  float* d_beta;               // [B, T, Hs]
  float* d_initial_state;      // [N, Hs, D, D] or null
};

// The backward pass. p: as the forward pass had it, `saved` included; o and final_state are not read.
size_t oryx_kda_backward_workspace(const struct OryxKda* p);
int oryx_kda_backward(const struct OryxKda* p, const struct OryxKdaGradients* d, void* workspace, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
