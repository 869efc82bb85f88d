#include <ATen/ATen.h>

#include <cmath>

#include "oryx/ops/decode_attention/decode_attention_internal.h"
#include "oryx/ops/norm/norm.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/span_attention/span_attention.h"

namespace oryx::ops {

at::Tensor gather_pages(const at::Tensor& rows, const at::Tensor& blocks) {
  const at::Tensor gathered = rows.index_select(0, blocks.reshape({-1}).to(at::kLong));  // [N * most, page, H, d]
  return gathered.view({blocks.size(0), blocks.size(1) * rows.size(1), rows.size(2), rows.size(3)});
}

std::optional<at::Tensor> wanted_spans(const std::optional<at::Tensor>& wanted) {
  if (!wanted) return std::nullopt;
  const at::Tensor rows = wanted->nonzero().to(at::kInt);  // [n, 1]
  return at::cat({rows, at::zeros_like(rows), at::ones_like(rows)}, 1);
}

at::Tensor decode_attention_naive(const at::Tensor& q, const at::Tensor& keys_in, const at::Tensor& values_in, const at::Tensor& lengths,
                                  const std::optional<at::Tensor>& blocks, const std::optional<at::Tensor>& wanted, DecodeRope rope,
                                  int64_t window, std::optional<double> scale) {
  check_decode_attention(q, keys_in, values_in, lengths, blocks, wanted, rope, window, scale);
  const at::Tensor keys = blocks ? gather_pages(keys_in, *blocks) : keys_in, values = blocks ? gather_pages(values_in, *blocks) : values_in;
  at::Tensor query = q.unsqueeze(1), k = keys;
  if (rope.theta > 0) {
    const at::Tensor positions = at::arange(keys.size(1), lengths.options()).expand({q.size(0), -1});
    query = rope_naive(query, (lengths - 1).unsqueeze(1), rope.theta, rope.rotary_dim);
    k = rope_naive(keys, positions, rope.theta, rope.rotary_dim);
  }
  return span_attention_naive(query, k, values, wanted_spans(wanted), {}, {}, lengths, window, scale).squeeze(1);
}

// Each sequence by itself: its visible keys side by side, normalised and rotated, and one softmax.
at::Tensor paged_decode_attention_naive(const PagedDecode& a) {
  check_decode_attention(a);
  const at::Tensor keys = at::cat(a.keys), values = at::cat(a.values);  // [pages, page, Hk, K or V]
  const int64_t page = keys.size(1), Hk = keys.size(2), K = keys.size(3), group = a.q.size(1) / Hk;
  const double scale = a.scale.value_or(1 / std::sqrt(static_cast<double>(K)));
  at::Tensor o = at::zeros({a.q.size(0), a.q.size(1), values.size(3)}, a.q.options());
  const at::Tensor lengths = a.lengths.cpu();
  for (int64_t n = 0; n < a.q.size(0); ++n) {
    if (!is_wanted(a.wanted, n)) continue;
    const VisibleRange seen = visible_keys(lengths[n].item<int>(), a.window, a.first, a.reach);
    const auto ints = a.lengths.options();
    const at::Tensor tokens = at::cat({at::arange(seen.head, seen.head_end, ints), at::arange(seen.begin, seen.end, ints)}).to(at::kLong);
    const at::Tensor rows = a.blocks[n].to(at::kLong).index_select(0, tokens.div(page, "floor")) * page + tokens.remainder(page);
    at::Tensor k = keys.flatten(0, 1).index_select(0, rows), q = a.q[n];  // [T, Hk, K], [Hq, K]
    const at::Tensor v = values.flatten(0, 1).index_select(0, rows);
    if (a.k_norm) {
      const at::Tensor factor = a.k_norm->to(k.scalar_type());
      k = factor.size(0) == K ? rms_norm_naive(k, factor, a.norm_eps) : rms_norm_naive(k.flatten(1), factor, a.norm_eps).view(k.sizes());
    }
    if (a.rope.theta > 0) {
      const at::Tensor last = (a.lengths.narrow(0, n, 1) - 1).unsqueeze(0);
      k = rope_naive(k.unsqueeze(0), tokens.to(at::kInt).unsqueeze(0), a.rope.theta, a.rope.rotary_dim).squeeze(0);
      q = rope_naive(q.unsqueeze(0).unsqueeze(0), last, a.rope.theta, a.rope.rotary_dim).squeeze(0).squeeze(0);
    }
    const at::Tensor scores = at::matmul(q.view({Hk, group, K}), k.permute({1, 2, 0})) * scale;  // [Hk, group, T]
    o[n].copy_(at::matmul(scores.softmax(-1), v.transpose(0, 1)).flatten(0, 1));
  }
  return o;
}

}  // namespace oryx::ops
