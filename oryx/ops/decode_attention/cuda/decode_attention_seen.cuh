// Which keys a query sees, and where they lie.
#pragma once

#include <cuda_runtime.h>

#include "oryx/ops/decode_attention/cuda/decode_attention.h"

namespace oryx::decode_attention_cuda {
namespace {

// Tokens [first_begin, first_end), then [begin, end).
struct Range {
  int first_begin, first_end, begin, end;
  __device__ __forceinline__ int count() const { return first_end - first_begin + end - begin; }
  // Cut to pieces of so many tokens, each of the two by itself.
  __device__ __forceinline__ int first_pieces(int piece) const { return (first_end - first_begin + piece - 1) / piece; }
  __device__ __forceinline__ int pieces(int piece) const { return first_pieces(piece) + (end - begin + piece - 1) / piece; }
  __device__ __forceinline__ int first_of(int i, int piece) const {
    const int before = first_pieces(piece);
    return i < before ? first_begin + i * piece : begin + (i - before) * piece;
  }
  __device__ __forceinline__ int end_of(int i, int piece) const { return i < first_pieces(piece) ? first_end : end; }
};

__device__ __forceinline__ Range visible(const OryxDecodeAttention& a, int n) {
  if (a.wanted != nullptr && a.wanted[n] == 0) return {0, 0, 0, 0};
  const int end = min(max(__ldg(a.lengths + n), 0), static_cast<int>(a.capacity));
  const auto from = [&](int64_t length) { return length > 0 && end > length ? end - static_cast<int>(length) : 0; };
  const int low = from(a.reach), begin = max(low, from(a.window));
  return {low, a.window > 0 ? max(low, min(begin, static_cast<int>(a.first))) : low, begin, end};
}

// The entry of page i in a row of blocks.
__device__ __forceinline__ int block_entry(int i, int64_t lasting, int64_t most) {
  const int first = static_cast<int>(lasting);
  return first == 0 || i < first ? i : first + (i - first) % (static_cast<int>(most) - first);
}

// Of a token of sequence n, in elements.
__device__ __forceinline__ int64_t place(const OryxDecodeAttention& a, int n, int token, int64_t row, int64_t step) {
  if (a.blocks == nullptr) return n * row + token * step;
  const int page = static_cast<int>(a.page);
  return __ldg(a.blocks + n * a.most_blocks + block_entry(token / page, a.lasting, a.most_blocks)) * row + (token % page) * step;
}

}  // namespace
}  // namespace oryx::decode_attention_cuda
