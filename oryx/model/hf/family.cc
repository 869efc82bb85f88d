#include "oryx/model/hf/family.h"

#include <algorithm>
#include <cmath>

#include "oryx/common/options.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace {

// Filled by static initialisers, read-only afterwards.
std::vector<HfFamily>& registry() {
  static std::vector<HfFamily> r;
  return r;
}

}  // namespace

bool detail::register_hf_family(HfFamily family) {
  registry().push_back(std::move(family));
  return true;
}

std::vector<HfFamily> hf_families() {
  auto all = registry();
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.model_type < b.model_type; });
  return all;
}

HfFamily hf_family(HfConfig& config) {
  std::vector<std::string> known;
  const std::string type = config.text("model_type");
  for (const auto& family : hf_families()) {
    known.push_back(family.model_type);
    if (family.model_type != type) continue;
    if (config.has("architectures")) {
      const auto classes = config.texts("architectures");
      if (std::find(classes.begin(), classes.end(), family.architecture) == classes.end()) {
        config.refuse("architectures", fmt::format("\"{}\" for model_type \"{}\"", family.architecture, type));
      }
    }
    return family;
  }
  fail("{}: model_type is \"{}\", supported: {}{}", config.source(), shown(type), fmt::join(known, ", "), did_you_mean(type, known));
}

std::string layer_name(int64_t layer, const std::string& name) { return fmt::format("layers.{}.{}", layer, name); }

void add_outer(std::vector<HfTensor>& out, const ModelConfig& c, const std::string& embedding, const std::string& final_norm) {
  out.push_back({embedding, {{"embed.weight", 0}}});
  out.push_back({final_norm, {{"final_norm.weight", 0}}});
  if (!c.tie_word_embeddings) out.push_back({"lm_head.weight", {{"lm_head.weight", 0}}});
}

void add_feed_forward(std::vector<HfTensor>& out, int64_t layer, const std::string& prefix) {
  for (const char* name : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {
    out.push_back({prefix + name, {{layer_name(layer, std::string("mlp.") + name), 0}}});
  }
}

void add_attention(std::vector<HfTensor>& out, int64_t layer, const std::string& prefix) {
  out.push_back({prefix + "q_proj.weight", {{layer_name(layer, "mixer.attention.q_proj.weight"), 0}}});
  for (const char* name : {"k_proj.weight", "v_proj.weight", "o_proj.weight"}) {
    out.push_back({prefix + name, {{layer_name(layer, std::string("mixer.") + name), 0}}});
  }
}

void add_mamba2(std::vector<HfTensor>& out, const ModelConfig& c, int64_t layer, const std::string& prefix) {
  const LayerConfig l = c.layer_of({"mamba2"});
  const auto ours = [&](const std::string& name) { return layer_name(layer, "mixer." + name); };
  const int64_t inner = l.value_width(), group = l.key_width();
  out.push_back({prefix + "in_proj.weight",
                 {{ours("g_proj.weight"), inner},
                  {ours("v_proj.weight"), inner},
                  {ours("k_proj.weight"), group},
                  {ours("mamba2.q_proj.weight"), group},
                  {ours("mamba2.dt_proj.weight"), l.state_heads()}}});
  const auto convolution = [&](const std::string& kind, bool depthwise) {
    out.push_back({prefix + "conv1d." + kind,
                   {{ours("v_conv." + kind), inner}, {ours("k_conv." + kind), group}, {ours("mamba2.q_conv." + kind), group}},
                   1,
                   depthwise});
  };
  convolution("weight", true);
  if (l.conv_bias) convolution("bias", false);
  for (const char* name : {"A_log", "dt_bias", "D"}) out.push_back({prefix + name, {{ours(std::string("mamba2.") + name), 0}}});
  out.push_back({prefix + "norm.weight", {{ours("o_norm.weight"), 0}}});
  out.push_back({prefix + "out_proj.weight", {{ours("o_proj.weight"), 0}}});
}

void set_mamba2(LayerConfig& l, const Mamba2Shape& s) {
  l.num_heads = l.num_kv_heads = s.groups;
  l.num_value_heads = s.heads;
  l.head_dim = s.state;
  l.value_head_dim = s.head_dim;
  l.conv_activation = "silu";
  l.query_conv = true;
  l.gated_norm_order = "gate_first";
  l.head_norm_groups = s.groups;
}

void set_gated_delta_net(LayerConfig& l, HfConfig& c) {
  l.num_heads = l.num_kv_heads = c.integer("linear_num_key_heads");
  l.num_value_heads = c.integer("linear_num_value_heads");
  l.head_dim = c.integer("linear_key_head_dim");
  l.value_head_dim = c.integer("linear_value_head_dim");
  l.conv_kernel = c.integer("linear_conv_kernel_dim", 4);
  l.conv_activation = "silu";
  l.query_conv = true;
}

Mamba2Shape read_mamba2_shape(HfConfig& c) {
  const Mamba2Shape shape{c.integer("mamba_n_heads"), c.integer("mamba_d_head"), c.integer("mamba_n_groups"), c.integer("mamba_d_state")};
  check_mamba2_shape(c, shape, c.number("mamba_expand", 2), c.integer("hidden_size"));
  return shape;
}

void check_mamba2_shape(const HfConfig& c, const Mamba2Shape& shape, double expand, int64_t hidden_size) {
  // As doubles, which hold what a foreign config may name.
  if (static_cast<double>(shape.heads) * static_cast<double>(shape.head_dim) == std::trunc(expand * static_cast<double>(hidden_size))) return;
  fail("{}: {} Mamba-2 heads of width {} are not expand {} times hidden_size {}", c.source(), shape.heads, shape.head_dim, expand, hidden_size);
}

void expect_no_time_step_limit(HfConfig& c) {
  c.ignore({"time_step_limit"});
  if (!c.has("time_step_limit")) return;
  const Json& limit = c.json().at("time_step_limit");
  const auto infinite = [](const Json& j) {
    if (j.is_object()) return j == Json({{"__float__", "Infinity"}});
    return j == "Infinity" || (j.is_number() && j.get<double>() > 1e30);
  };
  if (!limit.is_array() || limit.size() != 2 || limit[0] != 0 || !infinite(limit[1])) c.refuse("time_step_limit", "[0, Infinity]");
}

void set_attention_heads(LayerConfig& l, HfConfig& c) {
  const int64_t width = c.integer("hidden_size");
  l.num_heads = c.integer("num_attention_heads");
  if (l.num_heads < 1) c.refuse("num_attention_heads", "at least 1");
  l.num_kv_heads = c.integer("num_key_value_heads", l.num_heads);
  l.num_value_heads = l.value_head_dim = 0;
  l.head_dim = c.integer("head_dim", width / l.num_heads);
}

Json attention_overrides(const ModelConfig& c, const LayerConfig& attention) {
  const auto all = c.mixers();
  Json out = Json::object();
  if (std::find(all.begin(), all.end(), "attention") == all.end()) return out;
  LayerConfig from = c.layer, to = attention;
  const Json before = fields_of(from).dump(), after = fields_of(to).dump();
  for (const auto& [key, value] : after.items()) {
    if (before.at(key) != value) out["attention"][key] = value;
  }
  return out;
}

int64_t feed_forward_width(HfConfig& c, const std::string& key) {
  const int64_t width = c.integer(key);
  if (width < 1) c.refuse(key, "at least 1");
  return width;
}

int64_t layer_count(HfConfig& c) {
  const int64_t layers = c.integer("num_hidden_layers");
  if (layers < 1 || layers > 10000) c.refuse("num_hidden_layers", "from 1 to 10000");
  return layers;
}

std::vector<std::vector<std::string>> mixers_of_types(HfConfig& c, const std::string& linear) {
  std::vector<std::vector<std::string>> mixers;
  for (const auto& type : c.texts("layer_types")) {
    if (type == "full_attention" || type == "attention") {
      mixers.push_back({"attention"});
    } else if (type == "linear_attention" || type == "mamba") {
      mixers.push_back({linear});
    } else {
      c.refuse("layer_types", "\"linear_attention\" and \"full_attention\"");
    }
  }
  if (const int64_t layers = layer_count(c); static_cast<int64_t>(mixers.size()) != layers) {
    fail("{}: layer_types names {} layers, num_hidden_layers is {}; expected as many", c.source(), mixers.size(), layers);
  }
  return mixers;
}

int64_t rotary_dim(const HfConfig& c, const LayerConfig& l, const HfRope& rope) {
  if (rope.partial_factor == 1) return 0;
  const auto dim = static_cast<int64_t>(static_cast<double>(l.head_dim) * rope.partial_factor);
  if (dim < 1) fail("{}: partial_rotary_factor {} of head_dim {} leaves nothing to rotate", c.source(), rope.partial_factor, l.head_dim);
  return dim;
}

}  // namespace oryx
