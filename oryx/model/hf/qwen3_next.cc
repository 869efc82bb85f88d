// Qwen3NextForCausalLM with dense feed-forwards. The projections of its Gated DeltaNet layers are interleaved by key head.
#include "oryx/model/hf/qwen.h"

namespace oryx {

namespace {

ModelConfig qwen3_next_config(HfConfig& hf) {
  const ModelConfig c = qwen_config(hf);
  // Where the key is absent, the class has 512 experts.
  if (hf.integer("num_experts", 512) != 0) hf.refuse("num_experts", "0 (dense feed-forwards)");
  hf.ignore({"decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
             "shared_expert_intermediate_size"});
  return c;
}

// For each key head: its query, its key, the values of its value heads, their gates; likewise the write strengths and the decays.
void qwen3_next_projections(std::vector<HfTensor>& out, const LayerConfig& l, int64_t i, const std::string& prefix) {
  const auto ours = [&](const char* name) { return layer_name(i, std::string("mixer.") + name); };
  const int64_t ratio = l.value_heads() / l.kv_heads(), values = ratio * l.value_dim();
  out.push_back({prefix + "in_proj_qkvz.weight",
                 {{ours("gated_delta_net.q_proj.weight"), l.head_dim},
                  {ours("k_proj.weight"), l.head_dim},
                  {ours("v_proj.weight"), values},
                  {ours("g_proj.weight"), values}},
                 l.kv_heads()});
  out.push_back(
      {prefix + "in_proj_ba.weight", {{ours("gated_delta_net.b_proj.weight"), ratio}, {ours("gated_delta_net.a_proj.weight"), ratio}}, l.kv_heads()});
}

std::vector<HfTensor> qwen3_next_tensors(const ModelConfig& c) { return qwen_tensors(c, qwen3_next_projections); }

ORYX_HF_FAMILY(qwen3_next, "qwen3_next", "Qwen3NextForCausalLM", qwen3_next_config, qwen3_next_tensors);

}  // namespace
}  // namespace oryx
