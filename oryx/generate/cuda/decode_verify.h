// A few tokens of ONE sequence through an Oryx-GDN stack in one pass, between the matrix products (decode_verify.cu): what verifies a draft. The C interface, beside decode_batch.h, whose
// other kernels take the tokens as rows of a batch. The recurrent state and the tails stay as they were before the pass: which tokens are kept is known only behind it, and
// oryx_verify_keep() then brings them over these. Every function enqueues one kernel and returns a cudaError_t.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { kOryxVerifyMost = 8 };  // tokens of a pass

// What a pass leaves of a layer for oryx_verify_keep().
typedef struct {
  float* S;                // [H, 128, 128]
  void *k_tail, *v_tail;   // bfloat16 [H * 128, 3]
  void *k, *v;             // bfloat16 [tokens, H * 128]: behind convolution and activation
  void* inputs;            // bfloat16 [tokens, 2, H * 128]: of the convolutions, keys and values
  float *g, *beta;         // [tokens, H]: log decays, write strengths
} OryxVerifyLayer;

// As OryxBatchMix, of T tokens behind each other.
typedef struct {
  OryxVerifyLayer layer;
  const void* projected;   // bfloat16 [T, row]: keys, values, gate, query of the linear mixer side by side, each H * 128
  const float* narrow;     // [T, 2 H]: write strengths, then decays, before their functions
  const float *k_conv, *v_conv;  // [H * 128, 4]
  const float *A_log, *dt_bias;  // [H]
  const float* o_norm;     // [128]
  void *keys, *values;     // bfloat16 [capacity, H * 128], or null: no rows are kept
  float *g_rows, *beta_rows;     // [capacity, H], null with keys
  int8_t* mode_rows;       // [capacity], may be null
  const int32_t* positions;      // [T]
  const uint8_t* modes;          // [T] 0: linear, 1: attention
  void* out;               // activations of H * 128 columns; those of tokens in attention mode are left alone
  int64_t T, H, row, capacity;   // T at most kOryxVerifyMost
  int32_t tiles;
  float head_norm_eps;
} OryxVerifyMix;
int oryx_verify_mix(const OryxVerifyMix* a, void* stream);

// The first `count` tokens of the last pass are the sequence's: its recurrent states and tails go over them. `layers` [num_layers] in device memory.
int oryx_verify_keep(const OryxVerifyLayer* layers, int64_t num_layers, int64_t H, int64_t count, void* stream);

#ifdef __cplusplus
}
#endif
