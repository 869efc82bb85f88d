// The arguments of span_attention, checked and brought to one form for every implementation.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace oryx::ops {

// A sequence of the batch: `queries` queries from q_begin and `keys` keys from k_begin, both of row `row`.
struct AttentionSequence {
  int64_t row, q_begin, queries, k_begin, keys;
};

// Keys [begin, end) of its sequence that a query sees.
struct VisibleKeys {
  int64_t begin, end;
};

struct AttentionPlan {
  std::vector<AttentionSequence> sequences;
  std::vector<uint8_t> in_span;  // [B * Tq]; empty: every query is computed
  int64_t queries_per_row = 0;   // Tq
  int64_t window = 0;
  double scale = 1;

  bool computes(int64_t row, int64_t query) const {
    return in_span.empty() || in_span[static_cast<size_t>(row * queries_per_row + query)] != 0;
  }
  // For query `i` of the sequence, counted from its own first query.
  VisibleKeys visible(const AttentionSequence& s, int64_t i) const {
    const int64_t end = i + s.keys - s.queries + 1;
    return {window > 0 && end > window ? end - window : 0, end};
  }
  // The queries of the sequence that are computed, counted from its own first query, rising.
  std::vector<int64_t> computed_queries(const AttentionSequence& s) const;
};

// Of the checks of make_attention_plan, those that read no tensor's values.
void check_attention_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k,
                               const std::optional<at::Tensor>& key_lengths, int64_t window, std::optional<double> scale);

// And of those on spans, bounds and lengths, for code that leaves their values on the device.
void check_attention_shapes(const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& spans,
                            const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k,
                            const std::optional<at::Tensor>& key_lengths);

// Throws oryx::Error, one line, on arguments that do not fit the contract in span_attention.h.
AttentionPlan make_attention_plan(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>& cu_seqlens,
                                  const std::optional<at::Tensor>& cu_seqlens_k,
                                  const std::optional<at::Tensor>& key_lengths, int64_t window,
                                  std::optional<double> scale);

}  // namespace oryx::ops
