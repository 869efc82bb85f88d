// Matrix products of at most 64 rows of activations, bound by reading the weights once (decode_product.cu): the C interface.
//
// Both operands lie as the tensor cores' fragments. Weights [rows, K] are [rows / 16][K / 16][lane][8 bfloat16]: lane 4 g + t holds rows g, g + 8, g, g + 8 at columns 2 t, 2 t, 2 t + 8,
// 2 t + 8 of a 16 x 16 block, two columns each. Activations [N, K] are [K / 32][tiles][lane][8 bfloat16] with tiles of eight sequences: lane 4 (n % 8) + t holds columns 2 t, 2 t + 8,
// 2 t + 16, 2 t + 24 of sequence n, two columns each.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { kOryxProductRows = 0, kOryxProductParts = 1, kOryxProductSwiglu = 2 };

typedef struct {
  const void* weight;
  const void* x;
  void* out;         // rows: bfloat16 [N, rows].  parts: float32 [splits, N, rows], to be added up.  swiglu: activations of rows / 2 columns, silu(row 2 i) * (row 2 i + 1)
  int64_t N, rows, K;  // N at most 64; rows and K multiples of 32
  int32_t form, splits;  // splits along K, 1 but for parts
  const uint8_t* needed;   // [N] or null: where all are zero, rows from `optional` on (a multiple of 32) are left out
  int64_t optional;
} OryxProduct;

// Tiles of eight sequences that activations of N have: a power of two.
int64_t oryx_product_tiles(int64_t N);
int oryx_product(const OryxProduct* a, void* stream);

#ifdef __cplusplus
}
#endif
