// The gated delta rule (../gated_delta.h) on Hopper: launchers over plain device pointers, no torch.
//
// Chunks of C = 64 tokens. With G the running sum of the log decay g within a chunk, k and q L2-normalised, S0 the state before it:
//
//   A_tj = b_t exp(G_t - G_j) k_t.k_j (j < t)      T = (I + A)^-1 diag(b)      P_tj = scale exp(G_t - G_j) q_t.k_j (j <= t)
//   U = T (V - exp(G) K S0^T)      O = scale exp(G) Q S0^T + P U      S1 = exp(G_C) S0 + U^T diag(exp(G_C - G)) K
//
// `prepare` computes T and the row factors of every chunk, all chunks at once; `recurrence` walks the chunks of one (sequence, head, 64 or
// 128 rows of S) with S in registers and P made beside it. Rows of S are independent. Where there are too few of them to fill the chip, a
// sequence is cut into segments: S1 is affine in S0 (S1 = S0 M + N), so `segments` finds M and N of all of them at once, each in one walk from a
// segment's last chunk to its first, `combine` chains them, and every segment's walk starts from its own state. None of it looks at the data:
// time does not depend on the decay. The same inputs give the same bits.
//
// Backward, with dO and the gradient dS1 of the state after the chunk; W = T^T dU is dV:
//
//   dU = P^T dO + diag(exp(G_C - G)) K dS1^T      dS0 = exp(G_C) dS1 + dO^T diag(scale exp(G)) Q - W^T diag(exp(G)) K
//   E = lower(scale exp(G_t - G_j) dO_t.U_j)      F = -strictly lower(exp(G_t - G_j) W_t.U_j)      db_t = W_t.U_t / b_t^2
//   dQ = scale diag(exp(G)) dO S0 + E K           dK = e + w,  e = F K - diag(exp(G)) W S0,  w = E^T Q + F^T K + diag(exp(G_C - G)) U dS1
//   dG_t = q_t.dQ_t + k_t.e_t - k_t.w_t           dg_l = sum over t >= l of dG_t, + exp(G_C) <S0, dS1> + sum of the last term of w times k
//
// (db: (I + A)^-T dU = W / b and the unwritten residual is U / b; to divide, b is kept off 0 by 1e-12 where a backward pass follows.) The
// forward pass saves T, the row factors and S0 of every chunk, the latter in bfloat16. `backward_recurrence` walks the chunks in reverse as
// `recurrence` does, writes dV and keeps dS1 of every chunk in bfloat16; with segments, dS0 = dS1 M^T + N' with the forward's M.
// `backward_chunk` makes the rest, chunk by chunk as the walk comes to them: it runs beside the walk, which has half of the chip. A log decay
// under -99.9 has gradient 0.
//
// Products take bfloat16 operands (S, V - exp(G) K S^T, U, T and P are rounded to it); sums, S, G and the inverse's blocks are float32 (the
// inverse's off-diagonal products tf32). A log decay under -100 counts as -100: exp of it is 0 in float32 either way.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// All pointers are device pointers; tensors are contiguous, their start aligned to 16 bytes, with the shapes and grouped heads of
// ../gated_delta.h: Hs = max(Hk, Hv), Ho = max(Hq, Hs); K = V = D, 64 or 128 (64 runs as 128 with zeros that are not in memory). Every element
// of o and final_state is written.
// With cu_seqlens, B = 1, cu_seqlens[0] = 0 and cu_seqlens[N] = T; sequences may be empty. The caller checks arguments; the values of cu_seqlens
// and spans are checked on the device, where bad ones print a line and trap.
struct OryxGatedDelta {
  const void* q;               // [B, T, Hq, D] bfloat16
  const void* k;               // [B, T, Hk, D] bfloat16
  const void* v;               // [B, T, Hv, D] bfloat16
  const float* g;              // [B, T, Hs] log decay
  const float* beta;           // [B, T, Hs]
  const float* initial_state;  // [N, Hs, D (V), D (K)] or null: zeros
  const int32_t* cu_seqlens;   // [N + 1] or null: N = B
  const uint8_t* wanted;       // [B, T], 0 where the readout is not wanted (o is zero there), or null: everywhere
  void* o;                     // [B, T, Ho, D] bfloat16
  float* final_state;          // [N, Hs, D, D] or null
  void* saved;                 // what backward needs, written by forward (oryx_gated_delta_saved bytes); null: nothing is saved
  int32_t B, T, N, Hq, Hk, Hv, D;
  int32_t segments;  // pieces a sequence is cut into; 0: chosen from the shape
  int32_t rows;      // rows of S a block of the recurrence keeps, 64 or 128; 0: chosen from the shape
  float scale;       // 0: D^-1/2
  float l2_eps;
};

// wanted [B, T] from spans [n, 3] int32 (row, begin, end): 1 within them, else 0.
int oryx_gated_delta_wanted(const int32_t* spans, int32_t n, int32_t B, int32_t T, uint8_t* wanted, cudaStream_t stream);

// Bytes of scratch memory that the forward pass needs (aligned to 128 bytes; contents need no initial value): 5632 for each chunk and state
// head, and with segments 2 * 64 KiB for each segment, sequence and state head. cu_seqlens is not read here.
size_t oryx_gated_delta_workspace(const struct OryxGatedDelta* p);

// Bytes of `saved` (aligned to 128): 38400 (D = 64: 13824) for each chunk and state head, and with segments 64 KiB for each segment, sequence
// and state head.
size_t oryx_gated_delta_saved(const struct OryxGatedDelta* p);

// Launches the forward pass on `stream`. Needs compute capability 9.0. Returns a cudaError_t.
int oryx_gated_delta_forward(const struct OryxGatedDelta* p, void* workspace, cudaStream_t stream);

// All written in full but for the optional d_initial_state. d_o counts as zero where `wanted` is 0.
struct OryxGatedDeltaGradients {
  const void* d_o;             // [B, T, Ho, D] bfloat16
  const float* d_final_state;  // [N, Hs, D, D] or null: zeros
  void* d_q;                   // [B, T, Hq, D] bfloat16
  void* d_k;                   // [B, T, Hk, D] bfloat16
  void* d_v;                   // [B, T, Hv, D] bfloat16
  float* d_g;                  // [B, T, Hs]
  float* d_beta;               // [B, T, Hs]
  float* d_initial_state;      // [N, Hs, D, D] or null
};

// The backward pass. p: as the forward pass had it, `saved` included; o and final_state are not read.
size_t oryx_gated_delta_backward_workspace(const struct OryxGatedDelta* p);
int oryx_gated_delta_backward(const struct OryxGatedDelta* p, const struct OryxGatedDeltaGradients* d, void* workspace, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
