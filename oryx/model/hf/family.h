// Families of published Hugging Face checkpoints. A family is one file that says how its config.json becomes ours and which of its tensors
// hold which of ours, and ends in one ORYX_HF_FAMILY line (docs/importing.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "oryx/model/config.h"
#include "oryx/model/hf/hf_config.h"

namespace oryx {

// One of their tensors and what it holds: rows of ours, in this order, `groups` times over. {"in_proj", {{"q", 16}, {"k", 16}}, 2} is the
// first 16 rows of q, the first 16 of k, the next 16 of q, the next of k.
struct HfTensor {
  struct Part {
    std::string ours;
    int64_t rows;  // of each group; 0: all of them
  };
  std::string theirs;
  std::vector<Part> parts;
  int64_t groups = 1;
  bool depthwise = false;  // [C, 1, w] there, [C, w] here
};

struct HfFamily {
  std::string model_type;    // as in config.json
  std::string architecture;  // the class that writes it: "LlamaForCausalLM"
  // Throws Error for what is not supported. Every key that changes the model must be taken or expected.
  ModelConfig (*config)(HfConfig&);
  // Where each parameter of such a model is found.
  std::vector<HfTensor> (*tensors)(const ModelConfig&);
  // The config.json of a model that was not imported, or null where that is not supported. What config() makes of it is compared with
  // the model's own config, so it need not check anything.
  Json (*hf_config)(const ModelConfig&) = nullptr;
};

std::vector<HfFamily> hf_families();  // sorted by model_type
// The family that a config.json names in model_type. Throws Error for an unknown one.
HfFamily hf_family(HfConfig& config);

namespace detail {
bool register_hf_family(HfFamily family);
}  // namespace detail

// `id` is an identifier; then the members of HfFamily in order.
#define ORYX_HF_FAMILY(id, ...) static const bool oryx_hf_family_##id = ::oryx::detail::register_hf_family(::oryx::HfFamily{__VA_ARGS__})

// What several families have in common.

// "layers.3." + name
std::string layer_name(int64_t layer, const std::string& name);
// Embedding, final norm and, when untied, the output head.
void add_outer(std::vector<HfTensor>& out, const ModelConfig& c, const std::string& embedding, const std::string& final_norm);
// The feed-forward as three matrices: PREFIX{gate_proj,up_proj,down_proj}.weight.
void add_feed_forward(std::vector<HfTensor>& out, int64_t layer, const std::string& prefix);
// Queries, keys, values and output of plain attention: PREFIX{q_proj,k_proj,v_proj,o_proj}.weight.
void add_attention(std::vector<HfTensor>& out, int64_t layer, const std::string& prefix);
// A Mamba-2 mixer: in_proj rows [z, x, B, C, dt], the convolution over x, B, C; z is our gate, x our value, B our key, C our query.
void add_mamba2(std::vector<HfTensor>& out, const ModelConfig& c, int64_t layer, const std::string& prefix);

// The shape of a Mamba-2 layer with `heads` heads of width `head_dim`, `groups` pairs of B and C of width `state`.
struct Mamba2Shape {
  int64_t heads, head_dim, groups, state;
};
void set_mamba2(LayerConfig& l, const Mamba2Shape& shape);
// The shape of a Gated DeltaNet layer: linear_num_key_heads, linear_num_value_heads, linear_key_head_dim, linear_value_head_dim, linear_conv_kernel_dim (4 unless said); its
// convolution runs over queries too and ends in SiLU.
void set_gated_delta_net(LayerConfig& l, HfConfig& c);
// From mamba_n_heads, mamba_d_head, mamba_n_groups, mamba_d_state; mamba_expand and hidden_size must agree with them.
Mamba2Shape read_mamba2_shape(HfConfig& c);
// Throws unless heads x head_dim is expand x hidden_size.
void check_mamba2_shape(const HfConfig& c, const Mamba2Shape& shape, double expand, int64_t hidden_size);
// layer_overrides of a model in which attention layers have another shape; empty where there are none.
Json attention_overrides(const ModelConfig& c, const LayerConfig& attention);
// Throws unless time_step_limit is 0 to infinity (dt is not clamped here).
void expect_no_time_step_limit(HfConfig& c);
// Takes the shape of attention: num_attention_heads, num_key_value_heads, head_dim. Everything else of `l` stays.
void set_attention_heads(LayerConfig& l, HfConfig& c);
// A key that must be at least 1: 0 would be a model without feed-forward here.
int64_t feed_forward_width(HfConfig& c, const std::string& key);
// num_hidden_layers, bounded before anything is made for each layer.
int64_t layer_count(HfConfig& c);
// layer_types ("linear_attention", "mamba" or `linear`'s own name; "full_attention" or "attention") -> the mixers of each layer.
std::vector<std::vector<std::string>> mixers_of_types(HfConfig& c, const std::string& linear);
// int(head_dim * factor), as the models compute it; 0 for a factor of 1. Throws where nothing is left to rotate.
int64_t rotary_dim(const HfConfig& c, const LayerConfig& l, const HfRope& rope);

}  // namespace oryx
