#include "oryx/model/inspect.h"

#include <algorithm>
#include <map>

#include "oryx/model/language_model.h"

namespace oryx {

namespace {

// The mixer of this layer that answers for a token in mode `mixer`.
const std::string& effective(const std::vector<std::string>& layer_mixers, const std::string& mixer) {
  const auto it = std::find(layer_mixers.begin(), layer_mixers.end(), mixer);
  return it == layer_mixers.end() ? layer_mixers.front() : *it;
}

bool used_in(const ParameterSpec& spec, const ModelConfig& c, const std::vector<std::string>& layer_mixers, const std::string& mixer) {
  if (spec.mixers.empty() || c.layer.combine == "mean") return true;
  return std::find(spec.mixers.begin(), spec.mixers.end(), effective(layer_mixers, mixer)) != spec.mixers.end();
}

// Layers of one kind are counted once.
std::map<std::vector<std::string>, int64_t> layer_kinds(const ModelConfig& c) {
  std::map<std::vector<std::string>, int64_t> kinds;
  for (int64_t i = 0; i < c.num_layers; ++i) ++kinds[c.mixers_of(i)];
  return kinds;
}

// 2 FLOPs a weight that a token in this mode passes through, in one layer.
double weight_flops(const ModelConfig& c, const MultiMixerLayer& layer, const std::string& mixer) {
  double flops = 0;
  for (const auto& spec : layer.parameters()) {
    bool used = used_in(spec, c, layer.mixer_names(), mixer);
    // A linear mixer's decay works at every token; so does its query where a convolution runs over it. Keys and values of a mixer's
    // own (share_kv off) are made at every token too: the cache and the recurrences want them whatever the token's mode.
    const auto& names = layer.mixer_names();
    for (size_t m = 0; m < names.size() && !used; ++m) {
      const bool its_own = std::find(spec.mixers.begin(), spec.mixers.end(), names[m]) != spec.mixers.end();
      const bool kept = spec.part != "norm" && (spec.name.find(".k_") != std::string::npos || spec.name.find(".v_") != std::string::npos);
      used = its_own && (kept || (layer.mixer(m).advances_everywhere() && (spec.part != "query" || layer.config().query_conv)));
    }
    if (used) flops += 2.0 * static_cast<double>(spec.numel());
  }
  return flops;
}

double mixing_flops(const ModelConfig& c, const MultiMixerLayer& layer, const std::string& mixer, int64_t context) {
  double flops = 0;
  const std::string& mine = effective(layer.mixer_names(), mixer);
  for (size_t m = 0; m < layer.mixer_names().size(); ++m) {
    const MixerFlops f = layer.mixer(m).flops(context);
    flops += f.every_token;
    if (c.layer.combine == "mean" || layer.mixer_names()[m] == mine) flops += f.in_mode;
  }
  return flops;
}

double head_flops(const ModelConfig& c) { return 2.0 * static_cast<double>(c.vocab_size) * static_cast<double>(c.layer.hidden_size); }

}  // namespace

ParameterReport report_parameters(const ModelConfig& c) {
  ParameterReport r;
  const auto specs = LanguageModel::parameter_specs(c);
  for (const auto& spec : specs) {
    r.total += spec.numel();
    auto it = std::find_if(r.parts.begin(), r.parts.end(), [&](const auto& p) { return p.first == spec.part; });
    if (it == r.parts.end()) it = r.parts.insert(r.parts.end(), {spec.part, 0});
    it->second += spec.numel();
  }
  // Layer by layer, since layers may differ in their mixers.
  const auto modes = c.mixers();
  std::vector<int64_t> used(modes.size(), 0);
  int64_t shared = 0;
  auto count = [&](const ParameterSpec& spec, const std::vector<std::string>& layer_mixers) {
    bool by_all = true;
    for (size_t m = 0; m < modes.size(); ++m) {
      const bool uses = used_in(spec, c, layer_mixers, modes[m]);
      if (uses) used[m] += spec.numel();
      by_all &= uses;
    }
    if (by_all) shared += spec.numel();
  };
  for (const auto& [kind, layers] : layer_kinds(c)) {
    const MultiMixerLayer layer(c.layer_of(kind), kind, 0);
    for (int64_t i = 0; i < layers; ++i) {
      for (const auto& spec : layer.parameters()) count(spec, kind);
    }
  }
  for (const auto& spec : specs) {
    if (spec.name.rfind("layers.", 0) != 0) count(spec, {});
  }
  for (size_t m = 0; m < modes.size(); ++m) r.modes.push_back({modes[m], used[m], shared});
  return r;
}

double token_flops(const ModelConfig& c, const std::string& mixer, int64_t context) {
  double flops = head_flops(c);
  for (const auto& [kind, layers] : layer_kinds(c)) {
    const MultiMixerLayer layer(c.layer_of(kind), kind, 0);
    flops += static_cast<double>(layers) * (weight_flops(c, layer, mixer) + mixing_flops(c, layer, mixer, context));
  }
  return flops;
}

double batch_flops(const ModelConfig& c, const Routing& routing, const std::vector<int32_t>& context) {
  double flops = static_cast<double>(routing.rows() * routing.length()) * head_flops(c);
  for (const auto& [kind, layers] : layer_kinds(c)) {
    const MultiMixerLayer layer(c.layer_of(kind), kind, 0);
    double each = 0;
    for (const auto& span : routing.spans()) {
      const auto& mixer = routing.mixers()[static_cast<size_t>(span.mixer)];
      each += static_cast<double>(span.end - span.begin) * weight_flops(c, layer, mixer);
      for (int64_t t = span.begin; t < span.end; ++t) {
        const int64_t seen = context.empty() ? t + 1 : context[static_cast<size_t>(span.row * routing.length() + t)];
        each += mixing_flops(c, layer, mixer, seen);
      }
    }
    flops += static_cast<double>(layers) * each;
  }
  return flops;
}

StateBytes state_bytes(const ModelConfig& c, int64_t tokens, at::ScalarType compute, const StateOptions& options) {
  options.validate();
  StateBytes b;
  const RowBound bound = options.row_bound(LanguageModel::refill_tokens(c));
  const int64_t rows = bound.on() ? std::min(tokens, bound.first + bound.last) : tokens;
  int64_t longest = 0, inputs = 0;  // tokens of the longest tail, bytes of one token's convolution inputs
  for (const auto& layer : LanguageModel::slots(c, compute, options)) {
    for (const auto& slot : layer) {
      if (slot.kind == SlotKind::kRecurrent) b.recurrent += slot.bytes();
      if (slot.kind == SlotKind::kPerToken) b.tokens += slot.bytes() * rows;
      if (slot.kind != SlotKind::kTail) continue;
      b.tails += slot.bytes();
      longest = std::max(longest, slot.shape[1]);
      inputs += slot.shape[0] * static_cast<int64_t>(at::elementSize(slot.dtype));
    }
  }
  if (options.kept.on()) {
    const int64_t kept = KeptRows::most_rows(options.kept, options.bound.first, options.bound.window, tokens);
    for (const auto& layer : LanguageModel::slots(c, compute, options)) {
      int64_t bytes = 0;
      for (const auto& slot : layer) bytes += slot.kind == SlotKind::kPerToken && slot.looked_at ? slot.bytes() : 0;
      b.tokens += bytes > 0 ? kept * (bytes + KeptRows::kRowBytes) : 0;
    }
  }
  const int64_t mark = b.recurrent + b.tails;
  if (options.checkpoint_every > 0) {
    // Under a bound those before its rows are dropped.
    const int64_t most = bound.on() && tokens > bound.first + bound.last ? bound.last / options.checkpoint_every + 1 : tokens;
    b.checkpoints = std::min(most, tokens / options.checkpoint_every) * mark;
  }
  if (options.ring > 0) b.ring = (options.ring + 1) * mark + inputs * (options.ring + longest);
  return b;
}

}  // namespace oryx
