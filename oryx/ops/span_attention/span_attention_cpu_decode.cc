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

// Queries that read keys together at most: a call of few rows (few_rows.h).
constexpr int64_t kDecodeTogether = 16;

int64_t keys_seen(const DecodeSequence& s) { return s.head_end - s.head + s.end - s.begin; }

// Whether `after` sees, of the same sequence, what `s` sees and maybe more behind it.
bool read_together(const DecodeSequence& s, const DecodeSequence& after) {
  return s.blocks != nullptr && s.blocks == after.blocks && s.head == after.head && s.head_end == after.head_end && s.begin == after.begin && s.end <= after.end && s.angles == nullptr &&
         after.angles == nullptr;
}

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
  const auto N = static_cast<int64_t>(sequences.size());
  // What one thread does: a part of the keys for `count` neighbours that read the same rows.
  struct Task {
    int64_t first, count, part;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> query_rows, first_part;
  int64_t parts = 0, most = 1;
  const auto parts_of = [](const DecodeSequence& s) { return (keys_seen(s) + kDecodePart - 1) / kDecodePart; };
  for (int64_t n = 0, count = 0; n < N; n += count) {
    count = 1;
    while (n + count < N && count < kDecodeTogether && read_together(sequences[static_cast<size_t>(n + count - 1)], sequences[static_cast<size_t>(n + count)])) ++count;
    most = std::max(most, count);
    for (int64_t i = n; i < n + count; ++i) {
      const DecodeSequence& s = sequences[static_cast<size_t>(i)];
      query_rows.push_back(s.row);
      first_part.push_back(parts);
      parts += parts_of(s);
    }
    // Later ones see more: of the last parts they may be alone.
    const int64_t all = parts_of(sequences[static_cast<size_t>(n + count - 1)]);
    for (int64_t p = 0, first = n; p < all; ++p) {
      while (parts_of(sequences[static_cast<size_t>(first)]) <= p) ++first;
      tasks.push_back({first, n + count - first, p});
    }
  }
  first_part.push_back(parts);
  const at::Tensor index = at::tensor(query_rows, at::kLong);
  const double log2e = 1.4426950408889634;
  const at::Tensor scaled =
      q.view({-1, Hq * K}).index_select(0, index).to(at::kFloat) * (scale * log2e);  // [n, Hq * K]
  at::Tensor max = at::empty({parts, Hq}, scaled.options()), sum = at::empty_like(max),
             acc = at::empty({parts, Hq, V}, scaled.options());
  const float* queries = scaled.const_data_ptr<float>();
  float *maxes = max.mutable_data_ptr<float>(), *sums = sum.mutable_data_ptr<float>(),
        *accs = acc.mutable_data_ptr<float>();
  run_balanced(static_cast<int64_t>(tasks.size()), cpu::decode_scratch(shape, most), [&](int64_t i, float* scratch) {
    const auto [first, count, p] = tasks[static_cast<size_t>(i)];
    std::array<cpu::DecodeQuery, kDecodeTogether> those;
    const int64_t from = p * kDecodePart;
    int64_t seen = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t n = first + k, part = first_part[static_cast<size_t>(n)] + p;
      seen = std::min(keys_seen(sequences[static_cast<size_t>(n)]) - from, kDecodePart);
      those[static_cast<size_t>(k)] = {queries + n * Hq * K, maxes + part * Hq, sums + part * Hq, accs + part * Hq * V, seen};
    }
    PartRows here;
    find_rows(rows, sequences[static_cast<size_t>(first + count - 1)], from, from + seen, here);
    cpu::decode_part(element, shape, those.data(), count, {here.keys.data(), here.values.data(), here.positions.data(), seen}, scratch);
  });
  at::Tensor merged = at::empty({N, Hq * V}, scaled.options());
  for (int64_t n = 0; n < N; ++n) {
    const int64_t i = first_part[static_cast<size_t>(n)];
    cpu::decode_merge(shape, first_part[static_cast<size_t>(n) + 1] - i, maxes + i * Hq, sums + i * Hq, accs + i * Hq * V, merged.mutable_data_ptr<float>() + n * Hq * V,
                      lse.defined() ? lse.mutable_data_ptr<float>() + sequences[static_cast<size_t>(n)].row * Hq : nullptr);
  }
  o.view({-1, Hq * V}).index_copy_(0, index, merged.to(o.scalar_type()));
}

}  // namespace oryx::ops
