#include "oryx/ops/span_attention/span_attention_cpu_decode.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

#include "oryx/ops/span_attention/balanced.h"

namespace oryx::ops {
namespace {

namespace cpu = attention_cpu;

// Keys of one part of a query: a fixed size, so that the parts do not depend on the number of threads.
constexpr int64_t kDecodePart = 512;

struct PartRows {
  std::array<const void*, kDecodePart> keys, values;
  std::array<int32_t, kDecodePart> positions;
};

int64_t keys_seen(const DecodeSequence& s) { return s.head_end - s.head + s.end - s.begin; }

// The i-th keys [from, to) of those that the sequence sees.
void find_rows(const DecodeRows& rows, const DecodeSequence& s, int64_t from, int64_t to, PartRows& out) {
  const int64_t heads = s.head_end - s.head;
  for (int64_t i = from; i < to; ++i) {
    const int64_t token = i < heads ? s.head + i : s.begin + i - heads;
    const auto at = static_cast<size_t>(i - from);
    out.positions[at] = static_cast<int32_t>(s.angles != nullptr ? s.angles[i] : token);
    if (rows.page == 0) {
      out.keys[at] = s.keys + token * rows.key_stride;
      out.values[at] = s.values + token * rows.value_stride;
    } else {
      const int32_t number = s.blocks[token / rows.page];
      out.keys[at] = rows.key_pages[number] + token % rows.page * rows.key_stride;
      out.values[at] = rows.value_pages[number] + token % rows.page * rows.value_stride;
    }
  }
}

}  // namespace

void decode_sequences(cpu::Element element, const cpu::DecodeShape& shape, const DecodeRows& rows,
                      const std::vector<DecodeSequence>& sequences, const at::Tensor& q, const at::Tensor& o,
                      const at::Tensor& lse, double scale) {
  if (sequences.empty()) return;
  const int64_t Hq = shape.query_heads, K = shape.key, V = shape.value;
  std::vector<std::pair<int64_t, int64_t>> parts;  // (sequence, its part)
  std::vector<int64_t> query_rows, first_part;
  for (size_t n = 0; n < sequences.size(); ++n) {
    query_rows.push_back(sequences[n].row);
    first_part.push_back(static_cast<int64_t>(parts.size()));
    const int64_t count = (keys_seen(sequences[n]) + kDecodePart - 1) / kDecodePart;
    for (int64_t p = 0; p < count; ++p) parts.emplace_back(static_cast<int64_t>(n), p);
  }
  const auto count = static_cast<int64_t>(parts.size());
  first_part.push_back(count);
  const at::Tensor index = at::tensor(query_rows, at::kLong);
  const double log2e = 1.4426950408889634;
  const at::Tensor scaled =
      q.view({-1, Hq * K}).index_select(0, index).to(at::kFloat) * (scale * log2e);  // [n, Hq * K]
  at::Tensor max = at::empty({count, Hq}, scaled.options()), sum = at::empty_like(max),
             acc = at::empty({count, Hq, V}, scaled.options());
  const float* queries = scaled.const_data_ptr<float>();
  float *maxes = max.mutable_data_ptr<float>(), *sums = sum.mutable_data_ptr<float>(),
        *accs = acc.mutable_data_ptr<float>();
  run_balanced(count, cpu::decode_scratch(shape), [&](int64_t i, float* scratch) {
    const auto [n, p] = parts[static_cast<size_t>(i)];
    const DecodeSequence& s = sequences[static_cast<size_t>(n)];
    const int64_t from = p * kDecodePart, to = std::min(keys_seen(s), from + kDecodePart);
    PartRows here;
    find_rows(rows, s, from, to, here);
    cpu::decode_part(element, shape, queries + n * Hq * K,
                     {here.keys.data(), here.values.data(), here.positions.data(), to - from}, maxes + i * Hq,
                     sums + i * Hq, accs + i * Hq * V, scratch);
  });
  at::Tensor merged = at::empty({static_cast<int64_t>(sequences.size()), Hq * V}, scaled.options());
  for (size_t n = 0; n < sequences.size(); ++n) {
    const int64_t i = first_part[n];
    cpu::decode_merge(shape, first_part[n + 1] - i, maxes + i * Hq, sums + i * Hq, accs + i * Hq * V,
                      merged.mutable_data_ptr<float>() + static_cast<int64_t>(n) * Hq * V,
                      lse.defined() ? lse.mutable_data_ptr<float>() + sequences[n].row * Hq : nullptr);
  }
  o.view({-1, Hq * V}).index_copy_(0, index, merged.to(o.scalar_type()));
}

}  // namespace oryx::ops
