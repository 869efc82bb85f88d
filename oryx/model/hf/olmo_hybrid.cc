// OlmoHybridForCausalLM: Gated DeltaNet layers that normalise their input beside attention layers that normalise their output.
#include "oryx/model/hf/family.h"

namespace oryx {

namespace {

LayerConfig olmo_attention_layer(const LayerConfig& linear, HfConfig& hf) {
  LayerConfig l = linear;
  set_attention_heads(l, hf);
  l.conv = l.query_conv = l.gate = l.head_norm = false;
  l.head_norm_eps = 0;
  l.qk_norm = true;
  l.qk_norm_over = "all_heads";
  l.norm_placement = "after";
  const HfRope rope = read_rope(hf, 10000);
  l.rope_theta = rope.theta;
  l.rotary_dim = rotary_dim(hf, l, rope);
  return l;
}

ModelConfig olmo_hybrid_config(HfConfig& hf) {
  ModelConfig c;
  LayerConfig& l = c.layer;
  c.vocab_size = hf.integer("vocab_size");
  c.num_layers = layer_count(hf);
  c.layer_mixers = mixers_of_types(hf, "gated_delta_net");
  c.tie_word_embeddings = hf.flag("tie_word_embeddings", false);
  l.hidden_size = hf.integer("hidden_size");
  l.intermediate_size = feed_forward_width(hf, "intermediate_size");
  set_gated_delta_net(l, hf);
  l.allow_neg_eigval = hf.flag("linear_allow_neg_eigval", true);
  l.norm_eps = hf.number("rms_norm_eps", 1e-6);
  l.head_norm_eps = 1e-5;  // fixed in the class, whatever rms_norm_eps
  c.layer_overrides = attention_overrides(c, olmo_attention_layer(l, hf));
  hf.expect("hidden_act", "silu");
  hf.expect("attention_bias", false);
  hf.expect("linear_use_gate", true);
  hf.ignore({"linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min"});
  return c;
}

void add_linear_layer(std::vector<HfTensor>& out, int64_t i, const std::string& prefix) {
  const auto ours = [&](const std::string& name) { return layer_name(i, "mixer." + name); };
  out.push_back({prefix + "attention_layer_norm.weight", {{layer_name(i, "norm1.weight"), 0}}});
  out.push_back({prefix + "feedforward_layer_norm.weight", {{layer_name(i, "norm2.weight"), 0}}});
  const std::string theirs = prefix + "linear_attn.";
  for (const char* name : {"q_proj.weight", "a_proj.weight", "b_proj.weight", "A_log", "dt_bias"}) {
    out.push_back({theirs + name, {{ours(std::string("gated_delta_net.") + name), 0}}});
  }
  for (const char* name : {"k_proj.weight", "v_proj.weight", "g_proj.weight", "o_norm.weight", "o_proj.weight"}) {
    out.push_back({theirs + name, {{ours(name), 0}}});
  }
  out.push_back({theirs + "q_conv1d.weight", {{ours("gated_delta_net.q_conv.weight"), 0}}, 1, true});
  out.push_back({theirs + "k_conv1d.weight", {{ours("k_conv.weight"), 0}}, 1, true});
  out.push_back({theirs + "v_conv1d.weight", {{ours("v_conv.weight"), 0}}, 1, true});
}

void add_attention_layer(std::vector<HfTensor>& out, int64_t i, const std::string& prefix) {
  out.push_back({prefix + "post_attention_layernorm.weight", {{layer_name(i, "norm1.weight"), 0}}});
  out.push_back({prefix + "post_feedforward_layernorm.weight", {{layer_name(i, "norm2.weight"), 0}}});
  add_attention(out, i, prefix + "self_attn.");
  for (const char* name : {"q_norm.weight", "k_norm.weight"}) {
    out.push_back({prefix + "self_attn." + name, {{layer_name(i, std::string("mixer.attention.") + name), 0}}});
  }
}

std::vector<HfTensor> olmo_hybrid_tensors(const ModelConfig& c) {
  std::vector<HfTensor> out;
  add_outer(out, c, "model.embed_tokens.weight", "model.norm.weight");
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string prefix = "model." + layer_name(i, "");
    c.mixers_of(i).front() == "attention" ? add_attention_layer(out, i, prefix) : add_linear_layer(out, i, prefix);
    add_feed_forward(out, i, prefix + "mlp.");
  }
  return out;
}

ORYX_HF_FAMILY(olmo_hybrid, "olmo_hybrid", "OlmoHybridForCausalLM", olmo_hybrid_config, olmo_hybrid_tensors);

}  // namespace
}  // namespace oryx
