// One query a sequence on the CPU, over keys and values that are read where they stand: in a tensor, or in pages.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "oryx/ops/span_attention/span_attention_kernels.h"

namespace oryx::ops {

// Where rows stand: token t of a sequence `t` rows behind its first, or in row t % page of its page t / page.
struct DecodeRows {
  int64_t key_stride, value_stride;  // bytes between tokens
  int64_t page;                      // tokens of a page; 0: no pages
  const char* const* key_pages;      // the first row of each page, by its number
  const char* const* value_pages;
};

struct DecodeSequence {
  int64_t row;                     // of q [rows, Hq, K] and o [rows, Hq, V]
  int64_t head, head_end;          // it sees keys [head, head_end)
  int64_t begin, end;              // and [begin, end) behind them, one at least
  const char *keys, *values;       // of its token 0; null with pages
  const int32_t* blocks;           // the numbers of its pages
  const int64_t* angles = nullptr;  // rows of cosine and sine of the keys that it sees, in order; null: each token's own
};

// q [..., Hq, K] and o [..., Hq, V] contiguous, of `element`; q rotated already where keys are rotated as they are read;
// lse [..., Hq] float32 (log2), or undefined. What a sequence gets is a function of its own keys alone, to the last bit,
// wherever they stand and on any number of threads. Neighbours with the same `blocks` that begin at the same keys (the
// tokens of one sequence, each seeing one more) read them once.
void decode_sequences(attention_cpu::Element element, const attention_cpu::DecodeShape& shape, const DecodeRows& rows,
                      const std::vector<DecodeSequence>& sequences, const at::Tensor& q, const at::Tensor& o,
                      const at::Tensor& lse, double scale);

}  // namespace oryx::ops
