// What a step of a chain of decoding kernels reads and writes beside its weights: memory that others own, so that the step can be captured.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
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
  const int32_t* stretches = nullptr;  // of a bounded state whose rows are found without pages: stretches_of()
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

// Where rows of a bounded state of one sequence stand whose pages lie in two stretches at most, those of its first tokens and the rest: the row of token t is t + (t < [0] ? [1] : [2]).
// Its region keeps them so, but behind some trims and forks.
inline std::optional<std::array<int32_t, 3>> stretches_of(const State& state) {
  constexpr int32_t kAll = std::numeric_limits<int32_t>::max();
  const int64_t page = state.options().page_tokens, first = (state.row_bound().first + page - 1) / page;
  std::array<int32_t, 3> s = {kAll, 0, 0};
  int64_t before = -1;
  for (const RowStore::NumberedPage& p : state.numbered_pages(0)) {
    const auto offset = static_cast<int32_t>((p.number - p.index) * page);
    if (before < 0) {
      s[1] = offset;
    } else if (s[0] == kAll && offset != s[1]) {
      // Kernels read rows in pieces, which must not reach from one stretch into the other: only where tokens are missing between them.
      if (before != first - 1 || p.index == before + 1) return std::nullopt;
      s[0] = static_cast<int32_t>(p.index * page), s[2] = offset;
    } else if (s[0] != kAll && offset != s[2]) {
      return std::nullopt;
    }
    before = p.index;
  }
  return s;
}

template <typename T = void>
T* pointer(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

}  // namespace oryx::fused
