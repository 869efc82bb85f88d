// BambaForCausalLM: Mamba-2 layers beside plain attention, each with a feed-forward.
#include "oryx/common/error.h"
#include "oryx/model/hf/family.h"

namespace oryx {

namespace {

LayerConfig bamba_attention_layer(const LayerConfig& mamba, HfConfig& hf) {
  LayerConfig l = mamba;
  set_attention_heads(l, hf);
  l.conv = l.conv_bias = l.query_conv = l.gate = l.head_norm = false;
  l.gated_norm_order = "norm_first";
  l.head_norm_groups = 0;
  const HfRope rope = read_rope(hf, 10000, 0.5);
  l.rope_theta = rope.theta;
  l.rotary_dim = rotary_dim(hf, l, rope);
  hf.expect("attn_rotary_emb", l.rotary_dim > 0 ? l.rotary_dim : l.head_dim);
  return l;
}

ModelConfig bamba_config(HfConfig& hf) {
  ModelConfig c;
  LayerConfig& l = c.layer;
  c.vocab_size = hf.integer("vocab_size");
  c.num_layers = layer_count(hf);
  c.layer_mixers.assign(static_cast<size_t>(c.num_layers), {"mamba2"});
  for (const int64_t i : hf.integers("attn_layer_indices")) {
    if (i < 0 || i >= c.num_layers) hf.refuse("attn_layer_indices", fmt::format("indices of the {} layers", c.num_layers));
    c.layer_mixers[static_cast<size_t>(i)] = {"attention"};
  }
  c.tie_word_embeddings = hf.flag("tie_word_embeddings", false);
  l.hidden_size = hf.integer("hidden_size");
  l.intermediate_size = feed_forward_width(hf, "intermediate_size");
  set_mamba2(l, read_mamba2_shape(hf));
  l.conv_kernel = hf.integer("mamba_d_conv", 4);
  l.conv_bias = hf.flag("mamba_conv_bias", true);
  l.norm_eps = hf.number("rms_norm_eps", 1e-5);
  c.layer_overrides = attention_overrides(c, bamba_attention_layer(l, hf));
  expect_no_time_step_limit(hf);
  hf.expect("hidden_act", "silu");
  hf.expect("attention_bias", false);
  hf.expect("mlp_bias", false);
  hf.expect("mamba_proj_bias", false);
  hf.ignore({"mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient"});
  return c;
}

std::vector<HfTensor> bamba_tensors(const ModelConfig& c) {
  std::vector<HfTensor> out;
  add_outer(out, c, "model.embed_tokens.weight", "model.final_layernorm.weight");
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string prefix = "model." + layer_name(i, "");
    out.push_back({prefix + "input_layernorm.weight", {{layer_name(i, "norm1.weight"), 0}}});
    out.push_back({prefix + "pre_ff_layernorm.weight", {{layer_name(i, "norm2.weight"), 0}}});
    c.mixers_of(i).front() == "attention" ? add_attention(out, i, prefix + "self_attn.") : add_mamba2(out, c, i, prefix + "mamba.");
    add_feed_forward(out, i, prefix + "feed_forward.");
  }
  return out;
}

ORYX_HF_FAMILY(bamba, "bamba", "BambaForCausalLM", bamba_config, bamba_tensors);

}  // namespace
}  // namespace oryx
