// One token of one sequence through a whole Oryx-GDN stack in a single persistent kernel (decode_step.cu): the C interface.
//
// A group of eight multiprocessors has one head. Every multiprocessor streams its share of all weights, of the recurrent states and, in attention mode, of the cached keys and
// values through one ring in shared memory. What it will need next depends on no activation, so that the stream runs on while the multiprocessors wait for each other. Token,
// position and modes are read from device memory: a captured launch stays valid for every token, context length and mode.
//
// Weights lie as the tensor cores' fragments, in the order in which they are read by all multiprocessors side by side: the first piece of each, the second of each, and so on.
//   In row pieces [R, C]: 16 KB a piece of 4 rows x 2,048 columns, [R / 4][C / 64][lane 4 (4 a + r) + t][b][c][2]: row r at columns 32 c + 16 a + 8 b + 2 t and one more, of 64.
//   In column pieces [D, C]: the columns' tiles of 16 are shared out to the groups, tiles [T i / H, T (i + 1) / H) to group i, and the rows to its eight multiprocessors and their eight
//   warps, 32 each. [pair of tiles][multiprocessor][warp][rows 16 c..][tile of the pair][lane 4 g + t][b][a][2]: row 8 a + g at columns 8 b + 2 t and one more. Behind the pairs that all
//   groups have, each group's rest: [group][multiprocessor], a pair and an odd tile, which stands alone.
// Row pieces of w_in: [keys, values, gate, query..][4][multiprocessor]; multiprocessor 8 head + rank has rows 16 rank.. of the head. Of w_gate_up: the group's 2 x 16 T / H rows or so
// are shared out to its multiprocessors; [piece][multiprocessor], the last piece of those that have one more behind. Of the head: as the rows are.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Device pointers of one layer. D = hidden size, H heads of K = V = 128 with D = H K, F = intermediate size. Weights bfloat16 [out, in], the rest float32 where not said otherwise.
typedef struct {
  const void* w_in;        // [4 D (+ D), D] in row pieces: keys, values, gate, query of the linear mixer (, query of attention)
  const float* w_beta_decay;  // [2 H, D]: b_proj, then a_proj
  const void* w_out;       // [D, D] in column pieces
  const void* w_gate_up;   // [2 F, D] in row pieces: rows of gate_proj and up_proj in turn
  const void* w_down;      // [D, F] in column pieces
  const float *norm1, *norm2;     // [D]
  const float *k_conv, *v_conv;   // [D, 4]
  const float *A_log, *dt_bias;   // [H]
  const float* o_norm;            // [128]
  void *k_tail, *v_tail;   // bfloat16 [D, 3]: inputs of the convolutions, oldest first
  float* S;                // [H, 128, 128]: value rows, key columns
  void *keys, *values;     // bfloat16 [capacity, H, 128], keys before RoPE; null: no rows are kept, and attention is not to be asked for
  float *g_rows, *beta_rows;      // [capacity, H], null with keys
  int8_t* mode_rows;       // [capacity], may be null
} OryxDecodeLayer;

typedef struct {
  const OryxDecodeLayer* layers;  // [num_layers] on the device
  const void* maps;               // oryx_decode_maps() of them on the device, 64-byte aligned; unused without keys
  int32_t num_layers, vocab_size;
  int64_t capacity;               // tokens at most
  const void* embed;              // bfloat16 [vocab_size, D]
  const void* head;               // bfloat16 [vocab_size, D] in row pieces
  const float* final_norm;        // [D]
  const float* rope;              // [capacity, 2, 64]: cosines and sines of position p; unused without keys
  int32_t* token;                 // [1] the token to run
  int32_t* position;              // [1] tokens before it; one more afterwards
  const uint8_t* modes;           // [num_layers] 0: linear, 1: attention
  const int32_t* feed_back;       // [1] non-zero: the likeliest token becomes the next to run
  int32_t* id_rows;               // [capacity] may be null
  const int32_t* stretches;       // [3] rows stand in two stretches: that of token t at t + (t < [0] ? [1] : [2]); null: at t
  int64_t first, window;          // window above 0: of the tokens before only the first `first` and the last window - 1 are seen
  const int32_t* below;           // [1] so many of the logits are looked at
  int32_t* likeliest;             // [1] of these, the first of equals
  float* logits;                  // [vocab_size]
  void* workspace;                // oryx_decode_workspace() bytes, zeroed once before the first launch
  float norm_eps, head_norm_eps, attention_scale;
} OryxDecodeStep;

int64_t oryx_decode_workspace(int32_t hidden_size, int32_t num_layers);
// 1 when there is a kernel for this shape on the current device.
int oryx_decode_supports(int32_t hidden_size, int32_t num_heads, int32_t intermediate_size);
// What the copy engine must know of the `rows` rows of keys and values: 2 num_layers kOryxDecodeMapBytes bytes to `to`; layers and `to` on the host. Returns a cudaError_t.
enum { kOryxDecodeMapBytes = 128 };
int oryx_decode_maps(const OryxDecodeLayer* layers, int32_t num_layers, int32_t hidden_size, int64_t rows, void* to);
// Enqueues the step; returns a cudaError_t.
int oryx_decode_step(const OryxDecodeStep* step, int32_t hidden_size, int32_t intermediate_size, void* stream);

#ifdef __cplusplus
}
#endif
