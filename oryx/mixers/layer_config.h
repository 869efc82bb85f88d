// The shape of one layer: what mixers, layer and model agree on. Names and defaults of the config file's keys are these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace oryx {

class Fields;

struct LayerConfig {
  int64_t hidden_size = 64;
  int64_t num_heads = 2;
  int64_t num_kv_heads = 0;
  int64_t num_value_heads = 0;
  int64_t head_dim = 32;
  int64_t value_head_dim = 0;
  int64_t intermediate_size = 256;

  bool conv = true;
  int64_t conv_kernel = 4;
  std::string conv_activation = "auto"; // silu, none, or auto: none where mamba2 shares a layer with attention, else silu
  bool conv_bias = false;
  bool query_conv = false;
  bool gate = true;
  std::string gate_activation = "silu";
  bool head_norm = true;
  std::string gated_norm_order = "norm_first";
  int64_t head_norm_groups = 0;
  double head_norm_eps = 0;
  bool qk_norm = false;
  std::string qk_norm_over = "head";
  bool share_query = false;
  bool share_kv = true;
  bool sliding_window_query = false;
  int64_t window = 1024;
  double norm_eps = 1e-6;
  bool zero_centred_norm = false;
  std::string norm_placement = "before";
  double residual_multiplier = 1;
  double rope_theta = 10000;
  int64_t rotary_dim = 0;
  double attention_scale = 0;
  bool allow_neg_eigval = false;
  std::string combine = "select";

  // Keys, checks and meanings: the config file, `oryx inspect` and docs/model.md read them here.
  void describe(Fields& f);

  int64_t kv_heads() const { return num_kv_heads > 0 ? num_kv_heads : num_heads; }
  int64_t value_dim() const { return value_head_dim > 0 ? value_head_dim : head_dim; }
  int64_t query_width() const { return num_heads * head_dim; }
  int64_t key_width() const { return kv_heads() * head_dim; }
  // Linear mixers may have more value heads than keys: a state head each, and as many outputs (oryx/ops/gated_delta/gated_delta.h).
  int64_t value_heads() const { return num_value_heads > 0 ? num_value_heads : kv_heads(); }
  int64_t state_heads() const { return std::max(kv_heads(), value_heads()); }
  int64_t output_heads() const { return std::max(num_heads, state_heads()); }
  int64_t value_width() const { return value_heads() * value_dim(); }
  int64_t output_width() const { return output_heads() * value_dim(); }
  double o_norm_eps() const { return head_norm_eps > 0 ? head_norm_eps : norm_eps; }
};

}  // namespace oryx
