// Matrix products of at most 64 rows of activations, bound by reading the weights once (decode_product.cu): the C interface.
//
// Both operands lie as the tensor cores' fragments. Weights [rows, K] are [rows / 16][K / 16][lane][8 bfloat16]: lane 4 g + t holds rows g, g + 8, g, g + 8 at columns 2 t, 2 t, 2 t + 8,
// 2 t + 8 of a 16 x 16 block, two columns each. Activations [N, K] are [K / 32][tiles][lane][8 bfloat16] with tiles of eight sequences: lane 4 (n % 8) + t holds columns 2 t, 2 t + 8,
// 2 t + 16, 2 t + 24 of sequence n, two columns each.
//
// RMSNorm has no kernel of its own: RMSNorm(x) * weight = (x * weight) * 1 / sqrt(mean of squares + eps), and the last factor, one a sequence, is as well applied to a product's result.
// What makes x writes x * weight and, for every 32 columns, their sum of squares; the product that reads them adds those up.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { kOryxProductRows = 0, kOryxProductResidual = 1, kOryxProductSwiglu = 2 };

typedef struct {
  const void* weight;
  const void* x;           // activations of K columns
  const float* squares;    // [8 tiles][K / 32, up to a multiple of 4] sums of squares of the vector whose norm x is, but for its factor, the rest zero; or null: x is used as it is
  void* out;               // rows: bfloat16 [N, rows].  swiglu: activations of rows / 2 columns, silu(row 2 i) * (row 2 i + 1).  residual: activations of `rows` columns, sum * norm_weight
  int64_t N, rows, K;      // N at most 64; rows and K multiples of 32
  int32_t form;
  float eps;
  const uint8_t* needed;   // [N] or null: where all are zero, rows from `optional` on (a multiple of 32) are left out
  int64_t optional;
  const void* narrow_weight;  // form rows: a second weight of narrow_rows (a multiple of 32), bfloat16 parts of `narrow` float32 rows: rows 2 i and 2 i + 1 add up to row i; or null
  float* narrow_out;          // [N, narrow]
  int64_t narrow_rows, narrow;
  float* sum;                 // form residual: [N, rows], += the product
  const float* norm_weight;   // [rows] or null: out is the sum
  float* sum_squares;         // [8 tiles][rows / 32, up to a multiple of 4]; what lies behind rows / 32 is left alone
} OryxProduct;

// Tiles of eight sequences that activations of N have: a power of two.
int64_t oryx_product_tiles(int64_t N);
int oryx_product(const OryxProduct* a, void* stream);

#ifdef __cplusplus
}
#endif
