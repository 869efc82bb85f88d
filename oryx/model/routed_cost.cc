#include "oryx/model/routed_cost.h"

#include <algorithm>

#include "oryx/model/inspect.h"

namespace oryx {

namespace {

constexpr const char* kAttention = "attention";

double share_in_layer(const ModelConfig& c, const std::vector<std::string>& mixers, const Routing& routing) {
  if (std::find(mixers.begin(), mixers.end(), kAttention) == mixers.end()) return 0;
  if (c.layer.combine == "mean" || mixers.size() == 1) return 1;
  double share = routing.share(kAttention);
  if (mixers.front() != kAttention) return share;
  // What this layer lacks falls to its first mixer.
  for (const auto& name : routing.mixers()) {
    if (std::find(mixers.begin(), mixers.end(), name) == mixers.end()) share += routing.share(name);
  }
  return share;
}

const Routing& of_layer(const Routings& routings, int64_t layer) {
  return *routings[routings.size() == 1 ? 0 : static_cast<size_t>(layer)];
}

}  // namespace

double attention_share(const ModelConfig& c, const Routings& routings) {
  double sum = 0;
  for (int64_t i = 0; i < c.num_layers; ++i) sum += share_in_layer(c, c.mixers_of(i), of_layer(routings, i));
  return sum / static_cast<double>(c.num_layers);
}

double routed_flops(const ModelConfig& c, const Routings& routings, const std::vector<int32_t>& context) {
  if (routings.size() == 1) return batch_flops(c, *routings.front(), context);
  // Layer by layer; a model without layers is its output head, which counts once.
  ModelConfig empty = c;
  empty.num_layers = 0;
  const double head = batch_flops(empty, *routings.front(), context);
  double flops = head;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    ModelConfig one = c;
    one.num_layers = 1;
    one.layer_mixers = {c.mixers_of(i)};
    flops += batch_flops(one, of_layer(routings, i), context) - head;
  }
  return flops;
}

double pieces_flops(const ModelConfig& c, const Routings& routings, const std::vector<ModePiece>& pieces) {
  const Routing& first = *routings.front();
  std::vector<int32_t> context(static_cast<size_t>(first.rows() * first.length()), 1);
  for (const ModePiece& p : pieces) {
    int32_t* at = context.data() + p.row * first.length() + p.column;
    for (int64_t t = 0; t < p.length; ++t) at[t] = static_cast<int32_t>(p.start + t + 1);
  }
  return routed_flops(c, routings, context);
}

}  // namespace oryx
