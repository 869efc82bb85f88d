#include "oryx/ops/decode_attention/decode_attention.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/log.h"
#include "oryx/ops/decode_attention/decode_attention_internal.h"

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

void check_decode_attention(const PagedDecode& a) {
  if (a.keys.empty() || a.keys.size() != a.values.size()) {
    fail("decode_attention: {} pools of keys and {} of values, expected as many of each, and one at least", a.keys.size(), a.values.size());
  }
  for (size_t i = 0; i < a.keys.size(); ++i) {
    check_decode_attention(a.q, a.keys[i], a.values[i], a.lengths, a.blocks, a.wanted, a.rope, a.window, a.scale);
    if (a.keys[i].size(1) != a.keys[0].size(1) || a.keys[i].size(1) == 0 || a.keys[i].size(2) != a.keys[0].size(2) || a.values[i].size(3) != a.values[0].size(3)) {
      fail("decode_attention: pool {} has pages of {}, the first one of {}", i, c10::str(a.keys[i].sizes()), c10::str(a.keys[0].sizes()));
    }
  }
  if (a.reach < 0) fail("decode_attention: reach is {}, expected 0 (no end) or more", a.reach);
  if (a.first < 0 || (a.first > 0 && a.window == 0)) fail("decode_attention: the first {} keys beside a window of {}: expected 0, or a window", a.first, a.window);
  if (!a.k_norm) return;
  const int64_t width = a.keys[0].size(3), all = width * a.keys[0].size(2);
  if (a.k_norm->dim() != 1 || (a.k_norm->size(0) != width && a.k_norm->size(0) != all)) {
    fail("decode_attention: k_norm has shape {}, expected [{}], or [{}] over all heads", c10::str(a.k_norm->sizes()), width, all);
  }
}

void check_lengths(const at::Tensor& lengths, const std::optional<at::Tensor>& wanted, int64_t capacity) {
  const at::Tensor c = lengths.contiguous();
  for (int64_t n = 0; n < c.numel(); ++n) {
    const int32_t length = c.const_data_ptr<int32_t>()[n];
    if ((length < 1 || length > capacity) && is_wanted(wanted, n)) fail("decode_attention: lengths[{}] is {}, expected 1 to {}", n, length, capacity);
  }
}

void check_blocks(const PagedDecode& a) {
  const int64_t page = a.keys[0].size(1);
  check_lengths(a.lengths, a.wanted, a.blocks.size(1) * page);
  int64_t pages = 0;
  for (const auto& pool : a.keys) pages += pool.size(0);
  const auto blocks = a.blocks.accessor<int32_t, 2>();
  const auto lengths = a.lengths.accessor<int32_t, 1>();
  const auto check = [&](int64_t n, int64_t begin, int64_t end) {
    for (int64_t i = begin / page; begin < end && i * page < end; ++i) {
      if (blocks[n][i] < 0 || blocks[n][i] >= pages) fail("decode_attention: blocks[{}][{}] is {}, expected a page of {}", n, i, blocks[n][i], pages);
    }
  };
  for (int64_t n = 0; n < a.blocks.size(0); ++n) {
    if (!is_wanted(a.wanted, n)) continue;
    const VisibleRange seen = visible_keys(lengths[n], a.window, a.first, a.reach);
    check(n, seen.head, seen.head_end);
    check(n, seen.begin, seen.end);
  }
}

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// As the dispatcher knows the two operators.
using RowsOp = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, double, int64_t, int64_t,
                          std::optional<double>);
using PagesOp = at::Tensor(const at::Tensor&, at::TensorList, at::TensorList, const at::Tensor&, const at::Tensor&, const OptionalTensor&, double, int64_t, int64_t, int64_t,
                           int64_t, std::optional<double>, const OptionalTensor&, double);

// Where no kernel of the device knows pools: one pool is made of them.
at::Tensor decode_pools_joined(const at::Tensor& q, at::TensorList keys, at::TensorList values, const at::Tensor& lengths, const at::Tensor& blocks, const OptionalTensor& wanted,
                               double theta, int64_t rotary_dim, int64_t window, int64_t first, int64_t reach, std::optional<double> scale, const OptionalTensor& k_norm, double norm_eps) {
  const PagedDecode a{q, keys.vec(), values.vec(), lengths, blocks, wanted, {theta, rotary_dim}, window, first, reach, scale, k_norm, norm_eps};
  check_decode_attention(a);
  if (first > 0 || reach > 0 || k_norm) {
    log::warn_once("decode_attention: first keys and normalised keys over pages run in the naive form on {}, slowly", q.device().str());
    return paged_decode_attention_naive(a);
  }
  const auto one = [](at::TensorList pools) { return pools.size() == 1 ? pools[0] : at::cat(pools); };
  return decode_attention(q, one(keys), one(values), lengths, blocks, wanted, a.rope, window, scale);
}

}  // namespace

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                            const OptionalTensor& blocks, const OptionalTensor& wanted, DecodeRope rope, int64_t window,
                            std::optional<double> scale) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::decode_attention", "").typed<RowsOp>();
  return op.call(q, keys, values, lengths, blocks, wanted, rope.theta, rope.rotary_dim, window, scale);
}

at::Tensor paged_decode_attention(const PagedDecode& a) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("oryx::decode_attention", "pools").typed<PagesOp>();
  return op.call(a.q, a.keys, a.values, a.lengths, a.blocks, a.wanted, a.rope.theta, a.rope.rotary_dim, a.window, a.first, a.reach, a.scale, a.k_norm, a.norm_eps);
}

}  // namespace oryx::ops

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def(
      "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor lengths, Tensor? blocks=None, Tensor? wanted=None, float theta=0, "
      "int rotary_dim=0, int window=0, float? scale=None) -> Tensor");
  m.def(
      "decode_attention.pools(Tensor q, Tensor[] keys, Tensor[] values, Tensor lengths, Tensor blocks, Tensor? wanted=None, float theta=0, int rotary_dim=0, int window=0, "
      "int first=0, int reach=0, float? scale=None, Tensor? k_norm=None, float norm_eps=0) -> Tensor");
}
TORCH_LIBRARY_IMPL(oryx, CompositeExplicitAutograd, m) { m.impl("decode_attention.pools", oryx::ops::decode_pools_joined); }
