// One token of each of N sequences through an Oryx-GDN stack, between the matrix products (decode_batch.cu, decode_mix.cu): the C interface. Every function enqueues one kernel and returns a
// cudaError_t. Tokens, positions and modes are read from device memory: a captured sequence of them stays valid.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Activations (out) lie packed for decode_product.h, in `tiles` tiles of eight sequences.
//
// x = the embedding of tokens, and what the first product reads of it: x * weight and sums of squares (decode_product.h).
typedef struct {
  const void* embed;       // bfloat16 [vocab, D]
  const int32_t* tokens;   // [N]
  const float* weight;     // [D]
  float* x;                // [N, D]
  void* out;               // activations of D columns
  float* squares;          // [8 tiles][D / 32, up to a multiple of 4]
  int64_t N, D;            // D a multiple of 32
  int32_t tiles;
} OryxBatchEmbed;
int oryx_batch_embed(const OryxBatchEmbed* a, void* stream);

// Convolutions, gates, the recurrent state and, for the sequences in linear mode, its readout, head norm and gate; what the state keeps of the token.
typedef struct {
  const void* projected;   // bfloat16 [N, row]: keys, values, gate, query of the linear mixer side by side, each H * 128
  const float* narrow;     // [N, 2 H]: write strengths, then decays, before their functions
  const float *k_conv, *v_conv;  // [H * 128, 4]
  const float *A_log, *dt_bias;  // [H]
  const float* o_norm;     // [128]
  void *k_tail, *v_tail;   // bfloat16 [N, H * 128, 3]
  float* S;                // [N, H, 128, 128]
  void *keys, *values;     // bfloat16 [N, capacity, H, 128] with these strides between sequences, or null: no rows are kept
  float *g_rows, *beta_rows;     // [N, capacity, H], null with keys
  int8_t* mode_rows;       // [N, capacity], may be null
  int64_t key_sequence, value_sequence, g_sequence, beta_sequence, mode_sequence;
  const int32_t* positions;      // [N] tokens before
  const uint8_t* modes;          // [N] 0: linear, 1: attention
  void* out;               // activations of H * 128 columns; those of sequences in attention mode are left alone
  int64_t N, H, row, capacity;
  int32_t tiles;
  float head_norm_eps;
} OryxBatchMix;
int oryx_batch_mix(const OryxBatchMix* a, void* stream);

// Ends the step: the likeliest of the first `below` logits (bfloat16 [N, vocab], the first of equals) to likeliest [N], and with feed_back[0] to tokens [N]; rows of ids;
// positions and lengths one on.
int oryx_batch_finish(const void* logits, int64_t vocab, int64_t below, int32_t* likeliest, int32_t* tokens, const int32_t* feed_back, int32_t* positions,
                      int32_t* lengths, int32_t* id_rows, int64_t id_sequence, int64_t capacity, int64_t N, void* stream);

#ifdef __cplusplus
}
#endif
