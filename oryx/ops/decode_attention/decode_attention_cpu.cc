// Decode attention on the CPU: keys and values are read where they lie (span_attention_cpu_decode.h).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "oryx/ops/decode_attention/decode_attention_internal.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/rope/rope_table.h"
#include "oryx/ops/span_attention/span_attention_cpu_decode.h"

namespace oryx::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Tokens up to which the angles of all positions are kept (rope_table.h).
constexpr int64_t kWholeTable = 65536;

std::vector<at::Tensor> dense_heads(at::TensorList pools) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& x : pools) out.push_back(x.stride(3) == 1 ? x : x.contiguous());
  return out;
}

// One stride serves all pools: where they are of several layouts they are copied.
void make_alike(std::vector<at::Tensor>& pools) {
  const auto alike = [&](const at::Tensor& x) { return x.stride(1) == pools[0].stride(1) && x.stride(2) == pools[0].stride(2); };
  if (std::all_of(pools.begin(), pools.end(), alike)) return;
  for (at::Tensor& x : pools) x = x.contiguous();
}

std::vector<const char*> page_starts(const std::vector<at::Tensor>& pools) {
  std::vector<const char*> starts;
  for (const at::Tensor& x : pools) {
    const auto* data = static_cast<const char*>(x.const_data_ptr());
    for (int64_t i = 0; i < x.size(0); ++i) starts.push_back(data + i * x.stride(0) * static_cast<int64_t>(x.element_size()));
  }
  return starts;
}

// The positions of the keys that are seen, sequence by sequence.
std::vector<int32_t> seen_positions(const PagedDecode& a, const at::Tensor& lengths) {
  std::vector<int32_t> all;
  for (int64_t n = 0; n < lengths.size(0); ++n) {
    if (!is_wanted(a.wanted, n)) continue;
    const VisibleRange seen = visible_keys(lengths.const_data_ptr<int32_t>()[n], a.window, a.first, a.reach);
    for (int64_t t = seen.head; t < seen.head_end; ++t) all.push_back(static_cast<int32_t>(t));
    for (int64_t t = seen.begin; t < seen.end; ++t) all.push_back(static_cast<int32_t>(t));
  }
  return all;
}

// Keys and values by pool, checked, of one layout and with dense heads; float32 or bfloat16. `blocks` undefined: the one pool has a row of its own for each sequence.
at::Tensor decode_rows(const PagedDecode& a) {
  const std::vector<at::Tensor>&keys = a.keys, &values = a.values;
  const int64_t N = a.q.size(0), K = a.q.size(2), V = values[0].size(3);
  const bool paged = a.blocks.defined();
  at::Tensor q = a.q.contiguous();
  // Rows of one sequence whose tokens come as several stay one, by which it is known.
  const bool one_sequence = paged && N > 1 && a.blocks.stride(0) == 0;
  const at::Tensor lengths = a.lengths.contiguous(), blocks = !paged ? a.blocks : one_sequence ? a.blocks[0].contiguous() : a.blocks.contiguous();
  attention_cpu::DecodeShape shape{};
  shape.query_heads = q.size(1), shape.key_heads = keys[0].size(2), shape.key = K, shape.value = V;
  shape.key_head_stride = keys[0].stride(2), shape.value_head_stride = values[0].stride(2);
  std::shared_ptr<const RopeTable> table;
  std::vector<int32_t> positions;  // where `table` has rows of the keys that are seen alone
  if (a.rope.theta > 0) {
    q = rope(q.unsqueeze(1), (lengths - 1).clamp_min(0).unsqueeze(1), a.rope.theta, a.rope.rotary_dim).squeeze(1).contiguous();
    const int64_t longest = std::max(1, lengths.max().item<int>()), rotated = a.rope.rotary_dim > 0 ? a.rope.rotary_dim : K;
    // A table of all positions up to here is small beside the keys that are read, unless only few of them are.
    const bool few = (a.window > 0 || a.reach > 0) && longest > kWholeTable;
    if (few) positions = seen_positions(a, lengths);
    table = few ? rope_table(positions.data(), static_cast<int64_t>(positions.size()), a.rope.theta, rotated) : rope_rows(longest, a.rope.theta, rotated);
    shape.cosine = table->cosine.data(), shape.sine = table->sine.data(), shape.half = table->half;
  }
  at::Tensor norm;
  if (a.k_norm) {
    norm = a.k_norm->to(at::kFloat).contiguous();
    shape.norm = norm.const_data_ptr<float>(), shape.norm_eps = static_cast<float>(a.norm_eps), shape.norm_over_heads = norm.size(0) != K;
  }
  const auto bytes = static_cast<int64_t>(q.element_size());
  const std::vector<const char*> key_rows = page_starts(keys), value_rows = page_starts(values);  // of pages, or of sequences
  const DecodeRows rows{bytes * keys[0].stride(1), bytes * values[0].stride(1), paged ? keys[0].size(1) : 0, key_rows.data(), value_rows.data()};
  std::vector<DecodeSequence> sequences;
  const int64_t* angles = table != nullptr && !table->rows.empty() ? table->rows.data() : nullptr;
  for (int64_t n = 0; n < N; ++n) {
    if (!is_wanted(a.wanted, n)) continue;
    const VisibleRange seen = visible_keys(lengths.const_data_ptr<int32_t>()[n], a.window, a.first, a.reach);
    const auto i = static_cast<size_t>(n);
    sequences.push_back({n, seen.head, seen.head_end, seen.begin, seen.end, paged ? nullptr : key_rows[i], paged ? nullptr : value_rows[i],
                         paged ? blocks.const_data_ptr<int32_t>() + (one_sequence ? 0 : n * blocks.size(1)) : nullptr, angles});
    if (angles != nullptr) angles += seen.head_end - seen.head + seen.end - seen.begin;
  }
  at::Tensor o = a.wanted ? at::zeros({N, q.size(1), V}, q.options()) : at::empty({N, q.size(1), V}, q.options());
  decode_sequences(q.scalar_type() == at::kBFloat16 ? attention_cpu::Element::kBFloat16 : attention_cpu::Element::kFloat32, shape, rows, sequences, q, o, {},
                   a.scale.value_or(1 / std::sqrt(static_cast<double>(K))));
  return o;
}

at::Tensor decode_cpu_pools(const at::Tensor& q, at::TensorList keys, at::TensorList values, const at::Tensor& lengths, const at::Tensor& blocks, const OptionalTensor& wanted,
                            double theta, int64_t rotary_dim, int64_t window, int64_t first, int64_t reach, std::optional<double> scale, const OptionalTensor& k_norm,
                            double norm_eps) {
  PagedDecode a{q, keys.vec(), values.vec(), lengths, blocks, wanted, {theta, rotary_dim}, window, first, reach, scale, k_norm, norm_eps};
  check_decode_attention(a);
  check_blocks(a);
  if (q.size(0) == 0) return at::empty({0, q.size(1), values[0].size(3)}, q.options());
  if (q.scalar_type() == at::kDouble) return paged_decode_attention_naive(a);
  a.keys = dense_heads(keys), a.values = dense_heads(values);
  make_alike(a.keys), make_alike(a.values);
  return decode_rows(a);
}

at::Tensor decode_cpu(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths, const OptionalTensor& blocks, const OptionalTensor& wanted,
                      double theta, int64_t rotary_dim, int64_t window, std::optional<double> scale) {
  const DecodeRope rope{theta, rotary_dim};
  check_decode_attention(q, keys, values, lengths, blocks, wanted, rope, window, scale);
  if (blocks) return decode_cpu_pools(q, keys, values, lengths, *blocks, wanted, theta, rotary_dim, window, 0, 0, scale, {}, 0);
  check_lengths(lengths, wanted, keys.size(1));
  if (q.size(0) == 0) return at::empty({0, q.size(1), values.size(3)}, q.options());
  if (q.scalar_type() == at::kDouble) return decode_attention_naive(q, keys, values, lengths, {}, wanted, rope, window, scale);
  return decode_rows({q, dense_heads({keys}), dense_heads({values}), lengths, {}, wanted, rope, window, 0, 0, scale, {}, 0});
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CPU, m) {
  m.impl("decode_attention", decode_cpu);
  m.impl("decode_attention.pools", decode_cpu_pools);
}

}  // namespace oryx::ops
