// What captured decoding (oryx/generate/captured_decoder.h) does of a layer between the matrix products, the recurrences' steps and decode attention: the C interface. Every function
// enqueues one kernel and returns a cudaError_t. Positions and modes are read from device memory: a captured sequence of them stays valid.
#pragma once

#include <stdint.h>

#include "oryx/generate/cuda/decode_batch.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { kOryxCapturedMixers = 4, kOryxCapturedChannels = 3 * kOryxCapturedMixers, kOryxCapturedScalars = 2 * kOryxCapturedMixers };

// Neighbouring columns of what was projected: keys, values or the query of a linear mixer. Channels are even; rows are dense but for the distance of sequences.
typedef struct {
  int64_t column, channels;
  const float* filter;  // [channels, taps], the oldest first; null: no convolution
  const float* bias;    // [channels] or null
  void* tail;           // bfloat16 [N, channels, taps - 1], the oldest first: made those after the token
  void* out;            // bfloat16 [N, channels]; null: not wanted
  void* rows;           // bfloat16 [N, capacity, channels], `sequence` elements between sequences; null: none are kept
  int64_t sequence;
  int32_t taps, silu;
} OryxCapturedChannels;

enum { kOryxCapturedCopy = 0, kOryxCapturedWrite = 1, kOryxCapturedDecay = 2 };

// Neighbouring columns of the narrow projections: as they are, strength * sigmoid(x), or -exp(A_log) * softplus(x + dt_bias).
typedef struct {
  int64_t column, heads;
  const float *A_log, *dt_bias;  // [heads], of a decay
  float* out;                    // [N, heads]; null: not wanted
  float* rows;                   // [N, capacity, heads] as above
  int64_t sequence;
  int32_t kind;
  float strength;
} OryxCapturedScalars;

typedef struct {
  const void* projected;  // bfloat16 [N, row]
  const float* narrow;    // [N, narrow_row]
  int64_t row, narrow_row, N, capacity;
  OryxCapturedChannels channels[kOryxCapturedChannels];
  OryxCapturedScalars scalars[kOryxCapturedScalars];
  int32_t num_channels, num_scalars;
  const int32_t* positions;  // [N] tokens before
  const uint8_t* modes;      // [N] each sequence's mixer, by its place in the layer
  int8_t* mode_rows;         // [N, capacity], or null
  int64_t mode_sequence;
  OryxBatchPlaces places;    // which sequences these are; with pages the distances between sequences are 0
} OryxCapturedPrepare;
int oryx_captured_prepare(const OryxCapturedPrepare* a, void* stream);

// Log decays of Kimi Delta Attention's key channels: -exp(A_log) * softplus(up f + dt_bias).
typedef struct {
  const float *f, *up, *dt_bias, *A_log;  // [N, V], [H K, V], [H K], [H]
  float* g;                               // [N, H, K]
  int64_t N, H, K, V;
} OryxCapturedChannelDecays;
int oryx_captured_channel_decays(const OryxCapturedChannelDecays* a, void* stream);

// Of each sequence the output of its mixer (of all, averaged behind their norms: `mean`), head norm and gate, as the activations of a product (decode_product.h).
typedef struct {
  const void* o[kOryxCapturedMixers];  // bfloat16 [N, width] by place; null: the activations of its sequences are there already
  const uint8_t* modes;                // [N]
  const void* gate;                    // bfloat16, gate_row elements between sequences; null: no gate
  int64_t gate_row;
  const float* norm;                   // [norm_length], repeated over the width; null: no norm
  int64_t norm_length, slice;          // values under one norm, an even number
  int64_t N, width;
  void* out;
  int32_t tiles, mixers, mean, gate_first, sigmoid;
  float eps;
} OryxCapturedReadout;
int oryx_captured_readout(const OryxCapturedReadout* a, void* stream);

// All of that and the recurrence's step between them, of a layer whose one recurrence has as many keys and values as heads, K = V = 64 or 128: prepare's channels are keys, values and
// query, its scalars those of the recurrence; readout's o is not looked at, and norms are by head. Sequences in another mixer's mode are not read out.
typedef struct {
  OryxCapturedPrepare prepare;
  OryxCapturedReadout readout;
  float* S;                          // [N, H, V, K]
  const float *A_log, *dt_bias, *D;  // [H], of SSD
  int64_t H, K;
  int32_t delta;                     // 1: the gated delta rule, 0: SSD
  int32_t place;                     // the recurrence's, among the layer's mixers
  float scale, l2_eps;               // of the gated delta rule
} OryxCapturedMix;
int oryx_captured_mix_supports(const OryxCapturedMix* a);
int oryx_captured_mix(const OryxCapturedMix* a, void* stream);

#ifdef __cplusplus
}
#endif
