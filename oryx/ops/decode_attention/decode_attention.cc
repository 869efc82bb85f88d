#include "oryx/ops/decode_attention/decode_attention.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/ops/decode_attention/decode_attention_internal.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/rope/rope_table.h"
#include "oryx/ops/span_attention/span_attention.h"
#include "oryx/ops/span_attention/span_attention_cpu.h"

namespace oryx::ops {

void check_decode_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                            const std::optional<at::Tensor>& blocks, const std::optional<at::Tensor>& wanted, DecodeRope rope, int64_t window,
                            std::optional<double> scale) {
  const std::string shapes = c10::str("q ", q.sizes(), ", keys ", keys.sizes(), ", values ", values.sizes());
  if (q.dim() != 3 || keys.dim() != 4 || values.dim() != 4) {
    fail("decode_attention: {}: expected q [N, Hq, K], keys [N, capacity, Hk, K], values [N, capacity, Hk, V]", shapes);
  }
  if (keys.size(0) != values.size(0) || keys.size(1) != values.size(1) || keys.size(2) != values.size(2)) {
    fail("decode_attention: {}: keys and values differ in rows or heads", shapes);
  }
  if (q.size(2) != keys.size(3) || q.size(2) == 0) fail("decode_attention: {}: queries and keys differ in width, or have none", shapes);
  if (keys.size(2) == 0 || q.size(1) % keys.size(2) != 0) {
    fail("decode_attention: {} query heads do not divide into groups for {} key heads", q.size(1), keys.size(2));
  }
  const auto dtype = q.scalar_type();
  if (keys.scalar_type() != dtype || values.scalar_type() != dtype) {
    fail("decode_attention: q is {}, keys are {}, values are {}: expected one dtype", c10::toString(dtype), c10::toString(keys.scalar_type()),
         c10::toString(values.scalar_type()));
  }
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kDouble) {
    fail("decode_attention: q is {}, expected float32, bfloat16 or float64", c10::toString(dtype));
  }
  const int64_t N = q.size(0);
  if (lengths.scalar_type() != at::kInt || lengths.dim() != 1 || lengths.size(0) != N) {
    fail("decode_attention: lengths is {} of shape {}, expected Int of [{}]", c10::toString(lengths.scalar_type()), c10::str(lengths.sizes()), N);
  }
  if (blocks && (blocks->scalar_type() != at::kInt || blocks->dim() != 2 || blocks->size(0) != N)) {
    fail("decode_attention: blocks is {} of shape {}, expected Int of [{}, pages]", c10::toString(blocks->scalar_type()), c10::str(blocks->sizes()), N);
  }
  if (!blocks && keys.size(0) != N) fail("decode_attention: {}: the batch sizes differ", shapes);
  if (wanted && (wanted->scalar_type() != at::kBool || wanted->dim() != 1 || wanted->size(0) != N)) {
    fail("decode_attention: wanted is {} of shape {}, expected Bool of [{}]", c10::toString(wanted->scalar_type()), c10::str(wanted->sizes()), N);
  }
  const int64_t rotated = rope.rotary_dim > 0 ? rope.rotary_dim : q.size(2);
  if (rope.theta < 0 || !std::isfinite(rope.theta)) fail("decode_attention: theta is {}, expected 0 (no rotation) or more", rope.theta);
  if (rope.theta > 0 && (rope.rotary_dim < 0 || rotated > q.size(2) || rotated % 2 != 0)) {
    fail("decode_attention: rotates {} of {} values of a head, expected an even number of them", rope.rotary_dim, q.size(2));
  }
  if (window < 0) fail("decode_attention: window is {}, expected 0 (unlimited) or more", window);
  if (scale && !std::isfinite(*scale)) fail("decode_attention: scale is {}, expected a finite number", *scale);
}

namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_lengths(const at::Tensor& lengths, int64_t capacity) {
  const at::Tensor c = lengths.contiguous();
  for (int64_t n = 0; n < c.numel(); ++n) {
    const int32_t length = c.const_data_ptr<int32_t>()[n];
    if (length < 1 || length > capacity) fail("decode_attention: lengths[{}] is {}, expected 1 to {}", n, length, capacity);
  }
}

at::Tensor decode_cpu(const at::Tensor& q, const at::Tensor& keys_in, const at::Tensor& values_in, const at::Tensor& lengths,
                      const OptionalTensor& blocks, const OptionalTensor& wanted, double theta, int64_t rotary_dim, int64_t window,
                      std::optional<double> scale) {
  const DecodeRope rope{theta, rotary_dim};
  check_decode_attention(q, keys_in, values_in, lengths, blocks, wanted, rope, window, scale);
  const at::Tensor keys = blocks ? gather_pages(keys_in, *blocks) : keys_in, values = blocks ? gather_pages(values_in, *blocks) : values_in;
  check_lengths(lengths, keys.size(1));
  if (q.size(0) == 0) return at::empty({0, q.size(1), values.size(3)}, q.options());
  if (q.scalar_type() == at::kDouble) return decode_attention_naive(q, keys, values, lengths, {}, wanted, rope, window, scale);
  at::Tensor query = q.unsqueeze(1);
  if (theta > 0) query = ops::rope(query, (lengths - 1).unsqueeze(1), theta, rotary_dim);
  const AttentionPlan plan = make_attention_plan(query, keys, values, wanted_spans(wanted), {}, {}, lengths, window, scale);
  if (theta <= 0) return span_attention_cpu(query, keys, values, plan, false).first.squeeze(1);
  const auto table = rope_rows(lengths.max().item<int>(), theta, rotary_dim > 0 ? rotary_dim : q.size(2));
  return span_attention_cpu_decode(query, keys, values, plan, *table).squeeze(1);
}

}  // namespace

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                            const OptionalTensor& blocks, const OptionalTensor& wanted, DecodeRope rope, int64_t window,
                            std::optional<double> scale) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::decode_attention", "").typed<decltype(decode_cpu)>();
  return op.call(q, keys, values, lengths, blocks, wanted, rope.theta, rope.rotary_dim, window, scale);
}

}  // namespace oryx::ops

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor lengths, Tensor? blocks=None, Tensor? wanted=None, float theta=0, "
      "int rotary_dim=0, int window=0, float? scale=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(oryx, CPU, m) { m.impl("decode_attention", oryx::ops::decode_cpu); }
