// GraniteMoeHybridForCausalLM with dense feed-forwards: Mamba-2 layers beside attention, with multipliers on embeddings, residuals, scores and
// logits.
#include "oryx/model/hf/family.h"

namespace oryx {

namespace {

LayerConfig granite_attention_layer(const LayerConfig& mamba, HfConfig& hf) {
  LayerConfig l = mamba;
  set_attention_heads(l, hf);
  l.conv = l.conv_bias = l.query_conv = l.gate = l.head_norm = false;
  l.gated_norm_order = "norm_first";
  l.head_norm_groups = 0;
  l.attention_scale = hf.number("attention_multiplier", 1.0);
  if (!(l.attention_scale > 0)) hf.refuse("attention_multiplier", "a number above 0");
  const HfRope rope = read_rope(hf, 10000);
  const std::string kind = hf.text("position_embedding_type", "nope");
  if (kind != "rope" && kind != "nope") hf.refuse("position_embedding_type", "\"rope\", \"nope\" and null");
  l.rope_theta = kind == "rope" ? rope.theta : 0;
  l.rotary_dim = rotary_dim(hf, l, rope);
  return l;
}

ModelConfig granite_hybrid_config(HfConfig& hf) {
  ModelConfig c;
  LayerConfig& l = c.layer;
  c.vocab_size = hf.integer("vocab_size");
  c.num_layers = layer_count(hf);
  c.layer_mixers = mixers_of_types(hf, "mamba2");
  c.tie_word_embeddings = hf.flag("tie_word_embeddings", false);
  c.embedding_multiplier = hf.number("embedding_multiplier", 1.0);
  c.logits_scaling = hf.number("logits_scaling", 1.0);
  l.hidden_size = hf.integer("hidden_size");
  l.intermediate_size = feed_forward_width(hf, "shared_intermediate_size");
  l.residual_multiplier = hf.number("residual_multiplier", 1.0);
  set_mamba2(l, read_mamba2_shape(hf));
  l.conv_kernel = hf.integer("mamba_d_conv", 4);
  l.conv_bias = hf.flag("mamba_conv_bias", true);
  l.norm_eps = hf.number("rms_norm_eps", 1e-6);
  c.layer_overrides = attention_overrides(c, granite_attention_layer(l, hf));
  // Where the key is absent, the class has 8 experts.
  if (hf.integer("num_local_experts", 8) != 0) hf.refuse("num_local_experts", "0 (dense feed-forwards)");
  expect_no_time_step_limit(hf);
  hf.expect("hidden_act", "silu");
  hf.expect("attention_bias", false);
  hf.expect("mamba_proj_bias", false);
  hf.expect("normalization_function", "rmsnorm");
  hf.ignore({"intermediate_size", "num_experts_per_tok", "mamba_chunk_size", "init_method", "attention_layer_indices"});
  return c;
}

std::vector<HfTensor> granite_hybrid_tensors(const ModelConfig& c) {
  std::vector<HfTensor> out;
  add_outer(out, c, "model.embed_tokens.weight", "model.norm.weight");
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string prefix = "model." + layer_name(i, "");
    const int64_t width = c.layer_of(c.mixers_of(i)).intermediate_size;
    out.push_back({prefix + "input_layernorm.weight", {{layer_name(i, "norm1.weight"), 0}}});
    out.push_back({prefix + "post_attention_layernorm.weight", {{layer_name(i, "norm2.weight"), 0}}});
    c.mixers_of(i).front() == "attention" ? add_attention(out, i, prefix + "self_attn.") : add_mamba2(out, c, i, prefix + "mamba.");
    out.push_back(
        {prefix + "shared_mlp.input_linear.weight", {{layer_name(i, "mlp.gate_proj.weight"), width}, {layer_name(i, "mlp.up_proj.weight"), width}}});
    out.push_back({prefix + "shared_mlp.output_linear.weight", {{layer_name(i, "mlp.down_proj.weight"), 0}}});
  }
  return out;
}

ORYX_HF_FAMILY(granite_hybrid, "granitemoehybrid", "GraniteMoeHybridForCausalLM", granite_hybrid_config, granite_hybrid_tensors);

}  // namespace
}  // namespace oryx
