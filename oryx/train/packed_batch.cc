#include "oryx/train/packed_batch.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstring>

#include "oryx/common/error.h"
#include "oryx/model/device.h"
#include "oryx/ops/rope/rope.h"

namespace oryx {

namespace {

constexpr int64_t kPackedAlignment = 256;  // bytes

// Room for n spans: empty ones cost next to nothing, another layout a capture.
int64_t span_room(int64_t n) {
  int64_t room = 64;
  while (room < n) room *= 4;
  return room;
}

BatchLayout layout_of(const LanguageModel& model, const ModelInput& input, int64_t least_spans, bool weighs) {
  using Share = BatchLayout::Group::Share;
  BatchLayout l;
  l.rows = input.input_ids.size(0), l.tokens = input.input_ids.size(1);
  l.bounds = input.cu_seqlens ? input.cu_seqlens->numel() : 0;
  std::vector<const Routing*> distinct;
  for (const auto& r : input.routing) {
    const auto it = std::find(distinct.begin(), distinct.end(), r.get());
    l.routings.push_back(static_cast<size_t>(it - distinct.begin()));
    if (it == distinct.end()) distinct.push_back(r.get());
  }
  int64_t most = 0;
  for (int64_t i = 0; i < model.config().num_layers; ++i) {
    const size_t routing = l.routings[input.routing.size() == 1 ? 0 : static_cast<size_t>(i)];
    const auto& names = model.layer(i).mixer_names();
    const auto known = [&](const BatchLayout::Group& g) { return g.routing == routing && g.mixers == names; };
    if (std::any_of(l.groups.begin(), l.groups.end(), known)) continue;
    BatchLayout::Group group{routing, names, {}, -1, {}};
    for (size_t m = 0; m < names.size(); ++m) {
      const TokenSet& set = distinct[routing]->tokens(names, m);
      group.shares.push_back(set.all ? Share::kAll : set.count == 0 ? Share::kNone : Share::kSome);
      if (group.shares.back() != Share::kSome) continue;
      most = std::max(most, set.spans->size(0));
      l.fixed_shapes = l.fixed_shapes && model.layer(i).whole_queries(l.rows * l.tokens, model.device());
    }
    l.groups.push_back(std::move(group));
  }
  l.spans = most > 0 ? span_room(std::max(most, least_spans)) : 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = l.bytes;
    l.bytes += (bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
    return at;
  };
  const int64_t tokens = l.rows * l.tokens;
  l.ids_at = take(8 * tokens), l.targets_at = take(8 * tokens), l.positions_at = take(4 * tokens);
  if (l.bounds > 0) l.bounds_at = take(4 * l.bounds);
  if (weighs) l.weight_at = take(4);
  for (auto& group : l.groups) {
    for (const Share share : group.shares) {
      const bool some = share == Share::kSome;
      if (some && group.places_at < 0) group.places_at = take(tokens);
      group.spans_at.push_back(some ? take(12 * l.spans) : -1);
    }
  }
  l.kind = fmt::format("{}x{}{} {}", l.rows, l.tokens, l.bounds > 0 ? " packed" : "", fmt::join(l.routings, ","));
  for (const auto& group : l.groups) {
    l.kind += fmt::format(" {}:{}:", group.routing, fmt::join(group.mixers, "+"));
    for (const Share share : group.shares) l.kind += static_cast<char>(share);
  }
  l.key = fmt::format("{} bounds {} spans {}", l.kind, l.bounds, l.spans);
  return l;
}

}  // namespace

int64_t document_room(int64_t documents) {
  int64_t room = 1;
  while (room < documents) room = room < 2 ? room + 1 : (room & (room - 1)) == 0 ? room / 2 * 3 : room / 3 * 4;
  return room;
}

at::Tensor padded_bounds(const at::Tensor& cu_seqlens, int64_t documents) {
  const int64_t values = cu_seqlens.numel();
  return values > documents ? cu_seqlens : at::cat({cu_seqlens, cu_seqlens.narrow(0, values - 1, 1).expand({documents + 1 - values})});
}

PackedBatch pack_batch(const LanguageModel& model, const ModelInput& input, const at::Tensor& targets, int64_t least_spans, std::optional<double> weight) {
  using Share = BatchLayout::Group::Share;
  const at::NoGradGuard no_grad;
  auto layout = std::make_shared<BatchLayout>(layout_of(model, input, least_spans, weight.has_value()));
  const BatchLayout& l = *layout;
  const bool on_gpu = !model.device().is_cpu();
  at::Tensor bytes = at::empty({l.bytes}, at::TensorOptions(at::kByte).pinned_memory(on_gpu));
  auto* const p = bytes.mutable_data_ptr<uint8_t>();
  const auto put = [&](int64_t at, const at::Tensor& x, at::ScalarType type) {
    const at::Tensor dense = x.to(type).contiguous();
    std::memcpy(p + at, dense.const_data_ptr(), dense.nbytes());
  };
  put(l.ids_at, input.input_ids, at::kLong);
  put(l.targets_at, targets, at::kLong);
  put(l.positions_at, ops::sequence_positions(l.rows, l.tokens, input.cu_seqlens), at::kInt);
  if (l.bounds > 0) put(l.bounds_at, *input.cu_seqlens, at::kInt);
  if (weight) put(l.weight_at, at::full({}, *weight, at::kFloat), at::kFloat);
  std::vector<const Routing*> distinct;
  for (size_t i = 0; i < l.routings.size(); ++i) {
    if (l.routings[i] == distinct.size()) distinct.push_back(input.routing[i].get());
  }
  for (const auto& group : l.groups) {
    const Routing& routing = *distinct[group.routing];
    if (group.places_at >= 0) put(group.places_at, routing.places(group.mixers), at::kChar);
    for (size_t m = 0; m < group.mixers.size(); ++m) {
      if (group.shares[m] != Share::kSome) continue;
      const at::Tensor& spans = *routing.tokens(group.mixers, m).spans;
      put(group.spans_at[m], spans, at::kInt);
      std::memset(p + group.spans_at[m] + spans.nbytes(), 0, static_cast<size_t>(12 * l.spans) - spans.nbytes());
    }
  }
  return {layout, on_gpu ? bytes.to(model.device(), /*non_blocking=*/true) : bytes};
}

UnpackedBatch unpack_batch(const BatchLayout& l, const at::Tensor& bytes) {
  using Share = BatchLayout::Group::Share;
  TORCH_CHECK(l.fixed_shapes, "unpack_batch: the shapes of a pass depend on the modes");
  const auto view = [&](int64_t at, at::ScalarType type, std::vector<int64_t> shape) {
    int64_t size = static_cast<int64_t>(at::elementSize(type));
    for (const int64_t n : shape) size *= n;
    return bytes.narrow(0, at, size).view(type).view(shape);
  };
  UnpackedBatch out;
  out.input.input_ids = view(l.ids_at, at::kLong, {l.rows, l.tokens});
  out.targets = view(l.targets_at, at::kLong, {l.rows, l.tokens});
  if (l.weight_at >= 0) out.weight = view(l.weight_at, at::kFloat, {});
  if (l.bounds > 0) out.input.cu_seqlens = view(l.bounds_at, at::kInt, {l.bounds});
  out.input.prepared = PreparedInput{out.input.input_ids, view(l.positions_at, at::kInt, {l.rows, l.tokens}), out.input.cu_seqlens, {}};
  std::vector<Routing::LayerSets> sets(static_cast<size_t>(*std::max_element(l.routings.begin(), l.routings.end())) + 1);
  for (const auto& group : l.groups) {
    std::vector<TokenSet>& own = sets[group.routing][group.mixers];
    for (size_t m = 0; m < group.mixers.size(); ++m) {
      TokenSet set;
      set.all = group.shares[m] == Share::kAll;
      // How many there are is the batch's: with fixed shapes layers ask no more than whether there are any.
      set.count = group.shares[m] == Share::kNone ? 0 : set.all ? l.rows * l.tokens : 1;
      if (group.shares[m] == Share::kSome) {
        set.spans = view(group.spans_at[m], at::kInt, {l.spans, 3});
        set.mask = view(group.places_at, at::kChar, {l.rows, l.tokens}).eq(static_cast<int64_t>(m));
      }
      own.push_back(std::move(set));
    }
  }
  std::vector<std::shared_ptr<const Routing>> distinct;
  for (auto& own : sets) distinct.push_back(std::make_shared<Routing>(l.rows, l.tokens, std::move(own), bytes.device()));
  for (const size_t r : l.routings) out.input.routing.push_back(distinct[r]);
  return out;
}

}  // namespace oryx
