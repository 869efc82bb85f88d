// The shape of one layer: what mixers, layer and model agree on. Names and defaults of the config file's keys are these.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace oryx {

class Fields;

struct LayerConfig {
  int64_t hidden_size = 64;
  int64_t num_heads = 2;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 32;
  int64_t value_head_dim = 0;
  int64_t intermediate_size = 256;

  bool conv = true;
  int64_t conv_kernel = 4;
  std::string conv_activation = "auto"; // silu, none, or auto: none where mamba2 shares a layer with attention, else silu
  bool query_conv = false;
  bool gate = true;
  bool head_norm = true;
  bool qk_norm = false;
  bool share_query = false;
  bool share_kv = true;
  bool sliding_window_query = false;
  int64_t window = 1024;
  double norm_eps = 1e-6;
  double rope_theta = 10000;
  std::string combine = "select";

  // Keys, checks and meanings: the config file, `oryx inspect` and docs/model.md read them here.
  void describe(Fields& f);

  int64_t kv_heads() const { return num_kv_heads > 0 ? num_kv_heads : num_heads; }
  int64_t value_dim() const { return value_head_dim > 0 ? value_head_dim : head_dim; }
  int64_t query_width() const { return num_heads * head_dim; }
  int64_t key_width() const { return kv_heads() * head_dim; }
  int64_t value_width() const { return kv_heads() * value_dim(); }
  int64_t output_width() const { return num_heads * value_dim(); }
};

}  // namespace oryx
