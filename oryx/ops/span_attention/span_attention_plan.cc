#include "oryx/ops/span_attention/span_attention_plan.h"

#include <ATen/ATen.h>

#include <cmath>

#include "oryx/common/error.h"

namespace oryx::ops {
namespace {

void check_tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const std::string shapes = c10::str("q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes());
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4) {
    fail("span_attention: {}: expected q [B, Tq, Hq, K], k [B, Tk, Hk, K], v [B, Tk, Hk, V]", shapes);
  }
  if (k.size(0) != q.size(0) || v.size(0) != q.size(0)) fail("span_attention: {}: the batch sizes differ", shapes);
  if (k.size(1) != v.size(1) || k.size(2) != v.size(2))
    fail("span_attention: {}: keys and values differ in length or heads", shapes);
  if (k.size(3) != q.size(3) || q.size(3) == 0)
    fail("span_attention: {}: queries and keys differ in width, or have none", shapes);
  if (k.size(2) == 0 || q.size(2) % k.size(2) != 0) {
    fail("span_attention: {} query heads do not divide into groups for {} key heads", q.size(2), k.size(2));
  }
  const auto dtype = q.scalar_type();
  if (k.scalar_type() != dtype || v.scalar_type() != dtype) {
    fail("span_attention: q is {}, k is {}, v is {}: expected one dtype", c10::toString(dtype),
         c10::toString(k.scalar_type()), c10::toString(v.scalar_type()));
  }
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kDouble) {
    fail("span_attention: q is {}, expected float32, bfloat16 or float64", c10::toString(dtype));
  }
}

std::vector<int64_t> read_ints(const at::Tensor& t, const char* name, int64_t dims) {
  if (t.scalar_type() != at::kInt || t.dim() != dims) {
    fail("span_attention: {} is {} of {} dimensions, expected Int of {}", name, c10::toString(t.scalar_type()), t.dim(),
         dims);
  }
  const at::Tensor c = t.cpu().contiguous();
  const int32_t* p = c.const_data_ptr<int32_t>();
  return {p, p + c.numel()};
}

// Bounds of packed sequences: from 0, never falling, up to at most `tokens`.
std::vector<int64_t> read_bounds(const at::Tensor& t, const char* name, int64_t tokens, bool whole) {
  std::vector<int64_t> bounds = read_ints(t, name, 1);
  if (bounds.empty() || bounds.front() != 0) fail("span_attention: {} does not start with 0", name);
  for (size_t i = 1; i < bounds.size(); ++i) {
    if (bounds[i] < bounds[i - 1])
      fail("span_attention: {}[{}] = {} is below {} before it", name, i, bounds[i], bounds[i - 1]);
  }
  if (bounds.back() > tokens || (whole && bounds.back() != tokens)) {
    fail("span_attention: {} ends at {}, expected {}{}", name, bounds.back(), whole ? "" : "at most ", tokens);
  }
  return bounds;
}

std::vector<AttentionSequence> packed_sequences(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cu_q,
                                                const std::optional<at::Tensor>& cu_k) {
  if (q.size(0) != 1) fail("span_attention: cu_seqlens with {} rows, expected packed sequences in one row", q.size(0));
  const std::vector<int64_t> bq = read_bounds(cu_q, "cu_seqlens", q.size(1), true);
  const std::vector<int64_t> bk = cu_k ? read_bounds(*cu_k, "cu_seqlens_k", k.size(1), false) : bq;
  if (!cu_k && k.size(1) != q.size(1)) {
    fail("span_attention: {} queries and {} keys under one cu_seqlens, expected cu_seqlens_k for the keys", q.size(1),
         k.size(1));
  }
  if (bk.size() != bq.size()) fail("span_attention: cu_seqlens has {} bounds, cu_seqlens_k {}", bq.size(), bk.size());
  std::vector<AttentionSequence> sequences;
  for (size_t n = 0; n + 1 < bq.size(); ++n) {
    sequences.push_back({0, bq[n], bq[n + 1] - bq[n], bk[n], bk[n + 1] - bk[n]});
    if (sequences.back().keys < sequences.back().queries) {
      fail("span_attention: sequence {} has {} queries and {} keys, expected at least as many keys", n,
           sequences.back().queries, sequences.back().keys);
    }
  }
  return sequences;
}

std::vector<AttentionSequence> row_sequences(const at::Tensor& q, const at::Tensor& k,
                                             const std::optional<at::Tensor>& key_lengths) {
  const int64_t B = q.size(0), Tq = q.size(1), Tk = k.size(1);
  std::vector<int64_t> lengths(static_cast<size_t>(B), Tk);
  if (key_lengths) lengths = read_ints(*key_lengths, "key_lengths", 1);
  if (static_cast<int64_t>(lengths.size()) != B)
    fail("span_attention: key_lengths has {} entries for {} rows", lengths.size(), B);
  std::vector<AttentionSequence> sequences;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t keys = lengths[static_cast<size_t>(b)];
    if (keys > Tk) fail("span_attention: key_lengths[{}] = {} exceeds the {} keys given", b, keys, Tk);
    if (keys < Tq)
      fail("span_attention: row {} has {} queries and {} keys, expected at least as many keys", b, Tq, keys);
    sequences.push_back({b, 0, Tq, 0, keys});
  }
  return sequences;
}

std::vector<uint8_t> mark_spans(const at::Tensor& spans, int64_t B, int64_t Tq) {
  if (spans.dim() != 2 || spans.size(1) != 3)
    fail("span_attention: spans has shape {}, expected [n, 3]", c10::str(spans.sizes()));
  const std::vector<int64_t> values = read_ints(spans, "spans", 2);
  std::vector<uint8_t> marks(static_cast<size_t>(B * Tq), 0);
  for (size_t s = 0; s + 2 < values.size(); s += 3) {
    const int64_t row = values[s], begin = values[s + 1], end = values[s + 2];
    if (row < 0 || row >= B || begin < 0 || end < begin || end > Tq) {
      fail("span_attention: span {} is (row {}, {}, {}), expected a row below {} and 0 <= begin <= end <= {}", s / 3,
           row, begin, end, B, Tq);
    }
    std::fill(marks.begin() + row * Tq + begin, marks.begin() + row * Tq + end, uint8_t{1});
  }
  return marks;
}

}  // namespace

std::vector<int64_t> AttentionPlan::computed_queries(const AttentionSequence& s) const {
  std::vector<int64_t> queries;
  for (int64_t i = 0; i < s.queries; ++i) {
    if (computes(s.row, s.q_begin + i)) queries.push_back(i);
  }
  return queries;
}

void check_attention_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k,
                               const std::optional<at::Tensor>& key_lengths, int64_t window, std::optional<double> scale) {
  check_tensors(q, k, v);
  if (window < 0) fail("span_attention: window is {}, expected 0 (unlimited) or more", window);
  if (scale && !std::isfinite(*scale)) fail("span_attention: scale is {}, expected a finite number", *scale);
  if (cu_seqlens && key_lengths)
    fail("span_attention: key_lengths and cu_seqlens exclude each other; give cu_seqlens_k");
  if (cu_seqlens_k && !cu_seqlens) fail("span_attention: cu_seqlens_k without cu_seqlens");
}

void check_attention_shapes(const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& spans,
                            const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& cu_seqlens_k,
                            const std::optional<at::Tensor>& key_lengths) {
  const int64_t B = q.size(0), Tq = q.size(1), Tk = k.size(1);
  if (spans && (spans->dim() != 2 || spans->size(1) != 3)) {
    fail("span_attention: spans has shape {}, expected [n, 3]", c10::str(spans->sizes()));
  }
  for (const auto& [name, bounds] : {std::pair("cu_seqlens", cu_seqlens), std::pair("cu_seqlens_k", cu_seqlens_k)}) {
    if (bounds && (bounds->dim() != 1 || bounds->size(0) == 0)) {
      fail("span_attention: {} has shape {}, expected [sequences + 1]", name, c10::str(bounds->sizes()));
    }
  }
  if (key_lengths && (key_lengths->dim() != 1 || key_lengths->size(0) != B)) {
    fail("span_attention: key_lengths has shape {}, expected [{}], one of each row", c10::str(key_lengths->sizes()), B);
  }
  if (cu_seqlens && B != 1) fail("span_attention: cu_seqlens with {} rows, expected packed sequences in one row", B);
  if (cu_seqlens && cu_seqlens_k && cu_seqlens->size(0) != cu_seqlens_k->size(0)) {
    fail("span_attention: cu_seqlens has {} bounds, cu_seqlens_k {}", cu_seqlens->size(0), cu_seqlens_k->size(0));
  }
  if (cu_seqlens && !cu_seqlens_k && Tk != Tq) {
    fail("span_attention: {} queries and {} keys under one cu_seqlens, expected cu_seqlens_k for the keys", Tq, Tk);
  }
  if (!cu_seqlens && Tk < Tq) fail("span_attention: {} queries and {} keys, expected at least as many keys", Tq, Tk);
}

AttentionPlan make_attention_plan(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const std::optional<at::Tensor>& spans, const std::optional<at::Tensor>& cu_seqlens,
                                  const std::optional<at::Tensor>& cu_seqlens_k,
                                  const std::optional<at::Tensor>& key_lengths, int64_t window,
                                  std::optional<double> scale) {
  check_attention_arguments(q, k, v, cu_seqlens, cu_seqlens_k, key_lengths, window, scale);
  AttentionPlan plan;
  plan.queries_per_row = q.size(1);
  plan.window = window;
  plan.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3))));
  plan.sequences = cu_seqlens ? packed_sequences(q, k, *cu_seqlens, cu_seqlens_k) : row_sequences(q, k, key_lengths);
  if (spans) plan.in_span = mark_spans(*spans, q.size(0), q.size(1));
  return plan;
}

}  // namespace oryx::ops
