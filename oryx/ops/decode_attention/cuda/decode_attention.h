// C interface of the decode attention kernels (decode_attention.cu, decode_attention_general.cu): pointers, sizes in elements, a stream; each returns a cudaError_t.
//
// The query of a sequence of n tokens stands at p = n - 1 and sees the keys s <= p with s > p - window or s < first, of these none with s <= p - reach.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const void* q;        // [N, Hq, K], q_row elements between sequences
  const void* keys;     // before RoPE; strides below
  const void* values;
  void* o;              // [N, Hq, V]
  const int32_t* lengths;  // [N]
  const int32_t* blocks;   // [N, most_blocks] or null
  const uint8_t* wanted;   // [N] or null
  const float* rope;       // [capacity, 2, rotated / 2] cosines and sines of each position; null: no rotation
  int64_t N, Hq, Hk, K, V;
  int64_t capacity;        // tokens of a sequence at most
  int64_t page, most_blocks;  // tokens of a page; unused without blocks
  int64_t lasting;         // of blocks: page i of a sequence has entry i, or, from `lasting` on, lasting + (i - lasting) % (most_blocks - lasting); 0: all have entry i
  int64_t key_row, key_token, key_head;  // strides of keys: between sequences (pages), tokens, heads
  int64_t value_row, value_token, value_head;
  int64_t window;          // 0: unlimited, and `first` says nothing
  int64_t first;           // tokens that are seen beside the window
  int64_t reach;           // 0: unlimited
  int64_t rotated;         // values of a head that are rotated
  int64_t q_row;
  float scale;
  // With o_tiles o becomes RMSNorm(o) * head_norm * silu(gate) by head, in activations of Hq * V columns (oryx/ops/cuda/fragments.cuh), and what
  // is not wanted is left as it is.
  const void* gate;        // [N, Hq, V], gate_row elements between sequences; null: no gate
  const float* head_norm;  // [V]; null: no norm
  int64_t gate_row;
  float head_norm_eps;
  int32_t o_tiles;         // of those activations; 0: o is dense, without norm and gate
  // Of the general kernel alone: queries and keys pass through an RMSNorm before they are rotated, by head with one weight [K], or (norm_together) over all heads with weights
  // [Hq, K] and [Hk, K]. Null: they do not.
  const float *q_norm, *k_norm;
  float norm_eps;
  int32_t norm_together;
  // Of the split kernel alone, several tokens of one sequence (N = 1, 2 to 8 of them, o_tiles, no window): Hq = Hk * steps; the query of token r and head h stands at q + r * q_row + h * K, the
  // gate likewise, its output in row r of o. Token r sees the keys up to its own, the last one `lengths[0]` of them. wanted is null, step_wanted says which rows of o are written.
  int64_t steps;               // 0: one token a sequence
  const uint8_t* step_wanted;  // [steps] or null
  // Of the general kernel alone: the key [N, Hk, K] and value [N, Hk, V] of each query's own token, q_row elements between sequences, which it puts in their places; null: they are there.
  const void *new_keys, *new_values;
} OryxDecodeAttention;

// bfloat16, K = V of 64 or 128, all of a head rotated or nothing, 1 to 8 query heads a key head, heads dense, no norm: split along the keys.
int oryx_decode_attention_supports(const OryxDecodeAttention* a);
int64_t oryx_decode_attention_workspace(const OryxDecodeAttention* a);
int oryx_decode_attention(const OryxDecodeAttention* a, void* workspace, void* stream);

// Any shape with K and V up to 1024, float32 (dtype 0) or bfloat16 (1). Where keys and values are few (is_small) it is the faster one, too.
int oryx_decode_attention_is_small(const OryxDecodeAttention* a);
int64_t oryx_decode_attention_general_workspace(const OryxDecodeAttention* a);
int oryx_decode_attention_general(const OryxDecodeAttention* a, int dtype, void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
