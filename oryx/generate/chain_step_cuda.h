// What a step of a chain of decoding kernels reads and writes beside its weights: memory that others own, so that the step can be captured.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "oryx/generate/cuda/decode_batch.h"
#include "oryx/generate/cuda/decode_verify.h"
#include "oryx/state/state.h"

namespace oryx::fused {

// Rows of a slot, by its name in a layer: [sequences, capacity, ...], or with pages [rows of all pages, ...].
using RowsOf = std::function<at::Tensor(const std::string& slot)>;

// `Slots`: those of a layer, as the chain has them.
template <typename Slots>
struct ChainStep {
  int64_t N = 0;
  int64_t capacity = 0;  // tokens of a sequence at most
  const std::vector<Slots>* slots = nullptr;
  at::Tensor id_rows = {};  // undefined: ids are not kept
  int32_t *tokens = nullptr, *positions = nullptr, *lengths = nullptr, *likeliest = nullptr;
  const int32_t *below = nullptr, *feed_back = nullptr;
  const uint8_t* modes = nullptr;  // as the chain's write_modes() leaves them
  OryxBatchPlaces places = {};
  RowWindow bound = {};            // of a bounded state: what attention sees
  // By layer, or null. Given: the rows are N tokens of one sequence, behind each other, that are to be verified (of DecodeChain alone).
  const std::vector<OryxVerifyLayer>* verify = nullptr;

  bool paged() const { return places.blocks != nullptr; }
  // Elements between the sequences' rows.
  int64_t between_sequences(const at::Tensor& rows) const { return rows.defined() && !paged() && verify == nullptr ? rows.stride(0) : 0; }
};

// The entry of page i of a sequence in the table of places.
inline int64_t page_entry(const OryxBatchPlaces& p, int64_t i) { return p.lasting == 0 || i < p.lasting ? i : p.lasting + (i - p.lasting) % (p.most_blocks - p.lasting); }

// How such a table is laid out for a bounded state (lasting 0: it is none): the first tokens' pages have entries of their own; those of the window, those that a call leaves behind and those
// that come take turns.
inline OryxBatchPlaces pages_of_bound(const State& state) {
  OryxBatchPlaces p = {};
  const RowBound& bound = state.row_bound();
  if (!bound.on()) return p;
  const auto pages = [&](int64_t tokens) { return (tokens + state.options().page_tokens - 1) / state.options().page_tokens; };
  p.page = state.options().page_tokens, p.lasting = std::max<int64_t>(1, pages(bound.first)), p.most_blocks = p.lasting + pages(bound.last) + 3;
  return p;
}

template <typename T = void>
T* pointer(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

}  // namespace oryx::fused
