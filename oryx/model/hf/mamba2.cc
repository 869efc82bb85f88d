// Mamba2ForCausalLM (arXiv 2405.21060): Mamba-2 layers without a feed-forward.
#include "oryx/model/hf/family.h"

namespace oryx {

namespace {

ModelConfig mamba2_config(HfConfig& hf) {
  ModelConfig c;
  LayerConfig& l = c.layer;
  c.vocab_size = hf.integer("vocab_size");
  c.num_layers = layer_count(hf);
  c.layer_mixers.assign(1, {"mamba2"});
  c.tie_word_embeddings = hf.flag("tie_word_embeddings", false);
  l.hidden_size = hf.integer("hidden_size");
  l.intermediate_size = 0;
  const Mamba2Shape shape{hf.integer("num_heads"), hf.integer("head_dim"), hf.integer("n_groups"), hf.integer("state_size")};
  check_mamba2_shape(hf, shape, hf.number("expand", 2), l.hidden_size);
  set_mamba2(l, shape);
  l.conv_kernel = hf.integer("conv_kernel", 4);
  l.conv_bias = hf.flag("use_conv_bias", true);
  l.norm_eps = hf.number("layer_norm_epsilon", 1e-5);
  expect_no_time_step_limit(hf);
  hf.expect("hidden_act", "silu");
  hf.expect("use_bias", false);
  hf.expect("rms_norm", true);
  // norm_before_gate stands in published files, and no implementation of this class reads it.
  hf.ignore({"chunk_size", "residual_in_fp32", "rescale_prenorm_residual", "time_step_floor", "time_step_max", "time_step_min", "time_step_rank",
             "norm_before_gate"});
  return c;
}

std::vector<HfTensor> mamba2_tensors(const ModelConfig& c) {
  std::vector<HfTensor> out;
  add_outer(out, c, "backbone.embeddings.weight", "backbone.norm_f.weight");
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string prefix = "backbone." + layer_name(i, "");
    out.push_back({prefix + "norm.weight", {{layer_name(i, "norm1.weight"), 0}}});
    add_mamba2(out, c, i, prefix + "mixer.");
  }
  return out;
}

ORYX_HF_FAMILY(mamba2, "mamba2", "Mamba2ForCausalLM", mamba2_config, mamba2_tensors);

}  // namespace
}  // namespace oryx
