// One token of each of N sequences through an Oryx-GDN stack, between the matrix products (decode_batch.cu, decode_mix.cu): the C interface. Every function enqueues one kernel and returns a
// cudaError_t. Tokens, positions and modes are read from device memory: a captured sequence of them stays valid.
//
// The N rows of a step are the sequences of a state, or some of them that change from step to step (OryxBatchPlaces): then a row's recurrent state stands in the place that it names,
// what is kept of its tokens in pages, and only the first rows count. What a row gets does not depend on how many there are, nor on which of them it is.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Which sequences the rows are, and where what is kept of their tokens stands. All null or 0: row n is sequence n, all N count, and the tokens of a sequence are kept side by side.
typedef struct {
  const int32_t* active;   // [1] rows that count
  const int32_t* places;   // [N] of each row: where its recurrent state, its tails and its likeliest token stand
  const int32_t* blocks;   // [N, most_blocks] pages of each row's tokens: token t is kept at row blocks[n][entry] * page + t % page
  int64_t page, most_blocks;
  int64_t lasting;         // entry: i = t / page, or, for i from `lasting` on, lasting + (i - lasting) % (most_blocks - lasting); 0: i
} OryxBatchPlaces;

// Activations (out) lie packed for decode_product.h, in `tiles` tiles of eight sequences.
//
// x = the embedding of tokens, and what the first product reads of it: x * weight and sums of squares (decode_product.h).
typedef struct {
  const void* embed;       // bfloat16 [vocab, D]
  const int32_t* tokens;   // [N]; with places a token below 0 stands for the likeliest one behind the place's last step
  const float* weight;     // [D], or null: x is read as it is
  float* x;                // [N, D]
  void* out;               // activations of D columns
  float* squares;          // [8 tiles][D / 32, up to a multiple of 4]
  int64_t N, D;            // D a multiple of 32
  int32_t tiles;
  const int32_t* likeliest;  // by place
  OryxBatchPlaces places;
} OryxBatchEmbed;
int oryx_batch_embed(const OryxBatchEmbed* a, void* stream);

// x += RMSNorm(y) * norm, of a part whose norm stands behind it, and what the next product reads of x.
typedef struct {
  const void* y;           // bfloat16 [N, D]
  const float* norm;       // [D]
  const float* weight;     // [D] or null, as above
  float* x;                // [N, D]
  void* out;               // activations of D columns
  float* squares;          // as above
  int64_t N, D;            // D a multiple of 32
  float eps;
  int32_t tiles;
  OryxBatchPlaces places;
} OryxBatchAddNorm;
int oryx_batch_add_norm(const OryxBatchAddNorm* a, void* stream);

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
  int64_t N, H, row, capacity;   // N at most 64
  int32_t tiles;
  float head_norm_eps;
  OryxBatchPlaces places;
} OryxBatchMix;
int oryx_batch_mix(const OryxBatchMix* a, void* stream);

// Ends the step: the likeliest logit of each row, the first of equals; what is kept of the token's id; positions and lengths one on.
typedef struct {
  const void* logits;      // bfloat16 [N, vocab]
  const int32_t* below;    // [N] so many of a row's logits are looked at
  int32_t* likeliest;      // by place; -1 where a logit is NaN or +inf, or none is finite
  int32_t* tokens;         // [N]: the ids of this step; with feed_back[0] the likeliest ones then (0 for -1)
  const int32_t* feed_back;  // [1] or null
  int32_t *positions, *lengths;  // [N]
  int32_t* id_rows;        // as key rows, of one id a token; or null
  int64_t vocab, id_sequence, capacity, N;
  OryxBatchPlaces places;
} OryxBatchFinish;
int oryx_batch_finish(const OryxBatchFinish* a, void* stream);

#ifdef __cplusplus
}
#endif
