#include <ATen/ATen.h>

#include "oryx/ops/decode_attention/decode_attention_internal.h"
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

}  // namespace oryx::ops
