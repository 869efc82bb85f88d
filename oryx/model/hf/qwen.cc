#include "oryx/model/hf/qwen.h"

namespace oryx {

namespace {

// layer_types, or attention in every full_attention_interval-th layer.
std::vector<std::vector<std::string>> layer_mixers(HfConfig& hf) {
  const int64_t interval = hf.integer("full_attention_interval", 4), layers = layer_count(hf);
  if (hf.has("layer_types")) return mixers_of_types(hf, "gated_delta_net");
  if (interval < 1) hf.refuse("full_attention_interval", "at least 1");
  std::vector<std::vector<std::string>> mixers;
  for (int64_t i = 0; i < layers; ++i) mixers.push_back({(i + 1) % interval == 0 ? "attention" : "gated_delta_net"});
  return mixers;
}

LayerConfig qwen_attention_layer(const LayerConfig& linear, HfConfig& hf) {
  LayerConfig l = linear;
  set_attention_heads(l, hf);
  l.conv = l.query_conv = l.head_norm = false;
  l.gate_activation = "sigmoid";
  l.qk_norm = true;
  const HfRope rope = read_rope(hf, 10000, 0.25);
  l.rope_theta = rope.theta;
  l.rotary_dim = rotary_dim(hf, l, rope);
  return l;
}

void add_qwen_attention(std::vector<HfTensor>& out, const LayerConfig& l, int64_t i, const std::string& prefix) {
  const auto ours = [&](const char* name) { return layer_name(i, std::string("mixer.") + name); };
  // Each head's query, then its gate.
  out.push_back({prefix + "q_proj.weight", {{ours("attention.q_proj.weight"), l.head_dim}, {ours("g_proj.weight"), l.value_dim()}}, l.num_heads});
  out.push_back({prefix + "k_proj.weight", {{ours("k_proj.weight"), 0}}});
  out.push_back({prefix + "v_proj.weight", {{ours("v_proj.weight"), 0}}});
  out.push_back({prefix + "q_norm.weight", {{ours("attention.q_norm.weight"), 0}}});
  out.push_back({prefix + "k_norm.weight", {{ours("attention.k_norm.weight"), 0}}});
  out.push_back({prefix + "o_proj.weight", {{ours("o_proj.weight"), 0}}});
}

void add_gated_delta_net(std::vector<HfTensor>& out, const LayerConfig& l, int64_t i, const std::string& prefix) {
  const auto ours = [&](const char* name) { return layer_name(i, std::string("mixer.") + name); };
  out.push_back(
      {prefix + "conv1d.weight",
       {{ours("gated_delta_net.q_conv.weight"), l.query_width()}, {ours("k_conv.weight"), l.key_width()}, {ours("v_conv.weight"), l.value_width()}},
       1,
       true});
  out.push_back({prefix + "A_log", {{ours("gated_delta_net.A_log"), 0}}});
  out.push_back({prefix + "dt_bias", {{ours("gated_delta_net.dt_bias"), 0}}});
  out.push_back({prefix + "norm.weight", {{ours("o_norm.weight"), 0}}});
  out.push_back({prefix + "out_proj.weight", {{ours("o_proj.weight"), 0}}});
}

}  // namespace

ModelConfig qwen_config(HfConfig& hf) {
  ModelConfig c;
  LayerConfig& l = c.layer;
  c.vocab_size = hf.integer("vocab_size");
  c.num_layers = layer_count(hf);
  c.layer_mixers = layer_mixers(hf);
  c.tie_word_embeddings = hf.flag("tie_word_embeddings", false);
  l.hidden_size = hf.integer("hidden_size");
  l.intermediate_size = feed_forward_width(hf, "intermediate_size");
  set_gated_delta_net(l, hf);
  l.norm_eps = hf.number("rms_norm_eps", 1e-6);
  l.zero_centred_norm = true;
  c.layer_overrides = attention_overrides(c, qwen_attention_layer(l, hf));
  hf.expect("hidden_act", "silu");
  hf.expect("attention_bias", false);
  return c;
}

std::vector<HfTensor> qwen_tensors(const ModelConfig& c,
                                   void (*projections)(std::vector<HfTensor>&, const LayerConfig&, int64_t, const std::string&)) {
  std::vector<HfTensor> out;
  add_outer(out, c, "model.embed_tokens.weight", "model.norm.weight");
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string prefix = "model." + layer_name(i, "");
    const LayerConfig l = c.layer_of(c.mixers_of(i));
    out.push_back({prefix + "input_layernorm.weight", {{layer_name(i, "norm1.weight"), 0}}});
    out.push_back({prefix + "post_attention_layernorm.weight", {{layer_name(i, "norm2.weight"), 0}}});
    if (c.mixers_of(i).front() == "attention") {
      add_qwen_attention(out, l, i, prefix + "self_attn.");
    } else {
      projections(out, l, i, prefix + "linear_attn.");
      add_gated_delta_net(out, l, i, prefix + "linear_attn.");
    }
    add_feed_forward(out, i, prefix + "mlp.");
  }
  return out;
}

}  // namespace oryx
