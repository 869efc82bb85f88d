// Qwen3_5ForCausalLM, the text model of Qwen3.5 with dense feed-forwards. The projections of its Gated DeltaNet layers stand side by side.
#include "oryx/model/hf/qwen.h"

namespace oryx {

namespace {

ModelConfig qwen3_5_config(HfConfig& hf) {
  const ModelConfig c = qwen_config(hf);
  hf.expect("attn_output_gate", true);
  hf.ignore({"mamba_ssm_dtype"});
  return c;
}

void qwen3_5_projections(std::vector<HfTensor>& out, const LayerConfig& l, int64_t i, const std::string& prefix) {
  const auto ours = [&](const char* name) { return layer_name(i, std::string("mixer.") + name); };
  out.push_back(
      {prefix + "in_proj_qkv.weight",
       {{ours("gated_delta_net.q_proj.weight"), l.query_width()}, {ours("k_proj.weight"), l.key_width()}, {ours("v_proj.weight"), l.value_width()}}});
  out.push_back({prefix + "in_proj_z.weight", {{ours("g_proj.weight"), 0}}});
  out.push_back({prefix + "in_proj_b.weight", {{ours("gated_delta_net.b_proj.weight"), 0}}});
  out.push_back({prefix + "in_proj_a.weight", {{ours("gated_delta_net.a_proj.weight"), 0}}});
}

std::vector<HfTensor> qwen3_5_tensors(const ModelConfig& c) { return qwen_tensors(c, qwen3_5_projections); }

ORYX_HF_FAMILY(qwen3_5, "qwen3_5_text", "Qwen3_5ForCausalLM", qwen3_5_config, qwen3_5_tensors);

}  // namespace
}  // namespace oryx
