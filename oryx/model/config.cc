#include "oryx/model/config.h"

#include <algorithm>
#include <set>

#include "oryx/common/options.h"
#include "oryx/common/utf8.h"
#include "oryx/mixers/mixer.h"
#include "oryx/model/language_model.h"

namespace oryx {

std::vector<std::string> ModelConfig::mixers() const {
  std::vector<std::string> all;
  for (const auto& layer_list : layer_mixers) {
    for (const auto& name : layer_list) {
      if (std::find(all.begin(), all.end(), name) == all.end()) all.push_back(name);
    }
  }
  return all;
}

void ModelConfig::describe(Fields& f) {
  f.add("vocab_size", vocab_size, "tokens the model knows", between(2, 1 << 30));
  f.add("num_layers", num_layers, "depth", between(1, 10000));
  f.add("layer_mixers", layer_mixers, "the mixers of each layer, the first is its default mode; a shorter list is repeated", one_of(mixer_names()));
  layer.describe(f);
  f.add("layer_overrides", layer_overrides, "keys that differ in the layers whose first mixer has this name: `{\"attention\": {\"conv\": false}}`");
  f.add("tie_word_embeddings", tie_word_embeddings, "the output head is the embedding");
  f.add("embedding_multiplier", embedding_multiplier, "embeddings are multiplied by it");
  f.add("logits_scaling", logits_scaling, "logits are divided by it", above(0));
}

LayerConfig ModelConfig::layer_of(const std::vector<std::string>& layer_mixers) const {
  LayerConfig own = layer;
  if (const auto it = layer_overrides.find(layer_mixers.front()); it != layer_overrides.end()) {
    const std::string source = fmt::format("layer_overrides.{}", layer_mixers.front());
    if (it->is_object() && it->contains("hidden_size")) fail("{}: hidden_size is of the whole model, expected keys of a layer", source);
    fields_of(own).read(*it, source);
  }
  return own;
}

namespace {

void validate_heads(const LayerConfig& l, bool attends) {
  if (l.num_heads % l.kv_heads() != 0) fail("num_heads is {}, expected a multiple of num_kv_heads {}", l.num_heads, l.kv_heads());
  if (l.value_heads() % l.kv_heads() != 0) fail("num_value_heads is {}, expected a multiple of num_kv_heads {}", l.value_heads(), l.kv_heads());
  if (attends && l.value_heads() != l.kv_heads()) {
    fail("num_value_heads is {}, expected {} as num_kv_heads: attention reads a key and a value a head", l.value_heads(), l.kv_heads());
  }
  if (l.output_heads() % l.num_heads != 0 || l.output_heads() % l.value_heads() != 0) {
    fail("num_heads is {} and num_value_heads {}, expected one to divide the other", l.num_heads, l.value_heads());
  }
  const int64_t rotated = l.rotary_dim > 0 ? l.rotary_dim : l.head_dim;
  if (!attends || l.rope_theta == 0) return;
  if (l.rotary_dim > l.head_dim) fail("rotary_dim is {}, expected at most head_dim {}", l.rotary_dim, l.head_dim);
  if (rotated % 2 != 0) {
    fail("{} is {}, expected an even number: rotary embedding pairs dimensions (rope_theta 0 switches it off)",
         l.rotary_dim > 0 ? "rotary_dim" : "head_dim", rotated);
  }
}

void validate_layer(const LayerConfig& l, const std::vector<std::string>& names) {
  validate_heads(l, std::any_of(names.begin(), names.end(), [&](const auto& m) { return make_mixer(m, l)->keeps_tokens(); }));
  if (l.query_conv && !l.conv) fail("query_conv is on but conv is off; switch conv on, or query_conv off");
  if (l.conv_bias && !l.conv) fail("conv_bias is on but conv is off; switch conv on, or conv_bias off");
  if (l.combine == "mean" && !l.head_norm) fail("combine 'mean' averages head-normalised outputs; switch head_norm on");
  if (l.gated_norm_order == "gate_first") {
    if (!l.gate || !l.head_norm || l.gate_activation != "silu" || l.combine == "mean") {
      fail("gated_norm_order is 'gate_first', which wants gate and head_norm on, gate_activation 'silu' and combine 'select'");
    }
  } else if (l.head_norm_groups > 0) {
    fail("head_norm_groups is {}, which wants gated_norm_order 'gate_first'", l.head_norm_groups);
  }
  if (l.head_norm_groups > 0 && l.output_width() % l.head_norm_groups != 0) {
    fail("head_norm_groups is {}, expected a divisor of the {} values of all heads", l.head_norm_groups, l.output_width());
  }
}

}  // namespace

void ModelConfig::validate() const {
  if (layer_mixers.empty()) fail("layer_mixers is empty, expected a list of mixers for each layer");
  if (static_cast<int64_t>(layer_mixers.size()) > num_layers) {
    fail("layer_mixers names {} layers, but num_layers is {}", layer_mixers.size(), num_layers);
  }
  for (size_t i = 0; i < layer_mixers.size(); ++i) {
    const auto& names = layer_mixers[i];
    if (names.empty()) fail("layer_mixers[{}] is empty, expected at least one of {}", i, fmt::join(mixer_names(), ", "));
    if (std::set<std::string>(names.begin(), names.end()).size() != names.size()) {
      fail("layer_mixers[{}] names a mixer twice: {}", i, fmt::join(names, ", "));
    }
  }
  if (!layer_overrides.is_object()) fail("layer_overrides is {}, expected an object of mixers' names", describe_json(layer_overrides));
  for (const auto& [name, keys] : layer_overrides.items()) {
    const auto known = mixer_names();
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      fail("layer_overrides: unknown mixer '{}', known: {}{}", shown(name), fmt::join(known, ", "), did_you_mean(name, known));
    }
    layer_of({name});
  }
  for (const auto& names : layer_mixers) {
    const LayerConfig own = layer_of(names);
    validate_layer(own, names);
    if (own.combine != layer.combine) fail("layer_overrides.{}: combine is of the whole model, expected keys of a layer", names.front());
  }
  double parameters = 0;
  for (const auto& spec : LanguageModel::parameter_specs(*this)) parameters += static_cast<double>(spec.numel());
  // Beyond, counts of FLOPs and bytes would leave 64 bits.
  if (parameters > 1e15) fail("the model would have {:.2g} parameters, expected at most 1e15; check the sizes", parameters);
}

namespace {

struct Size {
  const char* name;
  int64_t vocab, D, layers, heads, dim, F;
};
// Vocabulary 32,000, tied (docs/model.md); tiny is for tests and the quick start.
constexpr Size kSizes[] = {{"tiny", 4096, 128, 4, 2, 64, 352},    {"130m", 32000, 768, 12, 12, 64, 2048},
                           {"380m", 32000, 1024, 24, 16, 64, 2752}, {"810m", 32000, 1536, 24, 12, 128, 4096},
                           {"1.4b", 32000, 2048, 24, 16, 128, 5440}};

struct Variant {
  const char* name;
  void (*apply)(ModelConfig&);
};
using Lists = std::vector<std::vector<std::string>>;
const Variant kVariants[] = {
    {"oryx-gdn", [](ModelConfig& c) { c.layer_mixers = Lists{{"gated_delta_net", "attention"}}; }},
    {"oryx-kda",
     [](ModelConfig& c) {
       c.layer_mixers = Lists{{"kimi_delta_attention", "attention"}};
       c.layer.gate_activation = "sigmoid";
     }},
    {"oryx-mamba2", [](ModelConfig& c) { c.layer_mixers = Lists{{"mamba2", "attention"}}; }},
    {"transformer",
     [](ModelConfig& c) {
       c.layer_mixers = Lists{{"attention"}};
       c.layer.conv = c.layer.gate = c.layer.head_norm = false;
     }},
    {"gdn",
     [](ModelConfig& c) {
       c.layer_mixers = Lists{{"gated_delta_net"}};
       c.layer.query_conv = true;
     }},
    {"mamba2",
     [](ModelConfig& c) {
       c.layer_mixers = Lists{{"mamba2"}};
       c.layer.query_conv = true;
     }},
    {"kda",
     [](ModelConfig& c) {
       c.layer_mixers = Lists{{"kimi_delta_attention"}};
       c.layer.query_conv = true;
       c.layer.gate_activation = "sigmoid";
     }},
    {"inter-layer",
     [](ModelConfig& c) { c.layer_mixers = Lists{{"gated_delta_net"}, {"gated_delta_net"}, {"gated_delta_net"}, {"attention"}}; }},
    {"intra-layer",
     [](ModelConfig& c) {
       c.layer_mixers = Lists{{"gated_delta_net", "attention"}};
       c.layer.combine = "mean";
     }},
    {"three-mixer", [](ModelConfig& c) { c.layer_mixers = Lists{{"gated_delta_net", "sliding_window", "attention"}}; }},
};

}  // namespace

std::vector<std::string> preset_sizes() {
  std::vector<std::string> names;
  for (const auto& s : kSizes) names.emplace_back(s.name);
  return names;
}

std::vector<std::string> preset_variants() {
  std::vector<std::string> names;
  for (const auto& v : kVariants) names.emplace_back(v.name);
  return names;
}

ModelConfig preset(const std::string& name) {
  const auto dash = name.find('-');
  const std::string size_name = name.substr(0, dash);
  const std::string variant_name = dash == std::string::npos ? "oryx-gdn" : name.substr(dash + 1);
  const auto* size = std::find_if(std::begin(kSizes), std::end(kSizes), [&](const Size& s) { return s.name == size_name; });
  if (size == std::end(kSizes)) {
    fail("unknown preset '{}', expected one of {}, each also as SIZE-VARIANT{}", name, fmt::join(preset_sizes(), ", "),
         did_you_mean(size_name, preset_sizes()));
  }
  const auto* variant = std::find_if(std::begin(kVariants), std::end(kVariants), [&](const Variant& v) { return v.name == variant_name; });
  if (variant == std::end(kVariants)) {
    fail("unknown variant '{}' of preset '{}', expected one of {}{}", variant_name, size_name, fmt::join(preset_variants(), ", "),
         did_you_mean(variant_name, preset_variants()));
  }
  ModelConfig c;
  c.vocab_size = size->vocab;
  c.num_layers = size->layers;
  c.layer.hidden_size = size->D;
  c.layer.num_heads = size->heads;
  c.layer.head_dim = size->dim;
  c.layer.intermediate_size = size->F;
  variant->apply(c);
  return c;
}

int64_t count_parameters(const ModelConfig& config) {
  int64_t n = 0;
  for (const auto& spec : LanguageModel::parameter_specs(config)) n += spec.numel();
  return n;
}

ModelConfig matched(ModelConfig config, int64_t parameters) {
  // The count is affine in the feed-forward width.
  constexpr int64_t kStep = 16;
  config.layer.intermediate_size = kStep;
  const int64_t base = count_parameters(config);
  config.layer.intermediate_size = 2 * kStep;
  const int64_t per_step = count_parameters(config) - base;
  const int64_t steps = std::max<int64_t>(1, 1 + (parameters - base + per_step / 2) / per_step);
  config.layer.intermediate_size = steps * kStep;
  return config;
}

}  // namespace oryx
