// LlamaForCausalLM: pre-norm softmax attention with rotary embedding and a SwiGLU feed-forward.
#include "oryx/model/hf/family.h"

namespace oryx {

namespace {

ModelConfig llama_config(HfConfig& hf) {
  ModelConfig c;
  LayerConfig& l = c.layer;
  c.vocab_size = hf.integer("vocab_size");
  c.num_layers = layer_count(hf);
  c.layer_mixers.assign(1, {"attention"});
  c.tie_word_embeddings = hf.flag("tie_word_embeddings", false);
  l.hidden_size = hf.integer("hidden_size");
  l.intermediate_size = feed_forward_width(hf, "intermediate_size");
  set_attention_heads(l, hf);
  l.conv = l.gate = l.head_norm = false;
  l.norm_eps = hf.number("rms_norm_eps", 1e-6);
  const HfRope rope = read_rope(hf, 10000);
  l.rope_theta = rope.theta;
  l.rotary_dim = rotary_dim(hf, l, rope);
  hf.expect("hidden_act", "silu");
  hf.expect("attention_bias", false);
  hf.expect("mlp_bias", false);
  hf.ignore({"pretraining_tp", "is_llama_config"});
  return c;
}

std::vector<HfTensor> llama_tensors(const ModelConfig& c) {
  std::vector<HfTensor> out;
  add_outer(out, c, "model.embed_tokens.weight", "model.norm.weight");
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string prefix = "model." + layer_name(i, "");
    out.push_back({prefix + "input_layernorm.weight", {{layer_name(i, "norm1.weight"), 0}}});
    out.push_back({prefix + "post_attention_layernorm.weight", {{layer_name(i, "norm2.weight"), 0}}});
    add_attention(out, i, prefix + "self_attn.");
    add_feed_forward(out, i, prefix + "mlp.");
  }
  return out;
}

Json llama_hf_config(const ModelConfig& c) {
  const LayerConfig& l = c.layer;
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"vocab_size", c.vocab_size},
          {"hidden_size", l.hidden_size},
          {"intermediate_size", l.intermediate_size},
          {"num_hidden_layers", c.num_layers},
          {"num_attention_heads", l.num_heads},
          {"num_key_value_heads", l.kv_heads()},
          {"head_dim", l.head_dim},
          {"hidden_act", "silu"},
          {"rms_norm_eps", l.norm_eps},
          {"rope_theta", l.rope_theta},  // transformers 4 reads this, 5 the object below
          {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", l.rope_theta}}},
          {"attention_bias", false},
          {"mlp_bias", false},
          {"tie_word_embeddings", c.tie_word_embeddings},
          {"dtype", "float32"}};
}

ORYX_HF_FAMILY(llama, "llama", "LlamaForCausalLM", llama_config, llama_tensors, llama_hf_config);

}  // namespace
}  // namespace oryx
