// What a model is: the layer's shape, which mixers each layer has, vocabulary and depth. One JSON file (docs/model.md lists the keys).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/mixers/layer_config.h"

namespace oryx {

struct ModelConfig {
  int64_t vocab_size = 256;
  int64_t num_layers = 2;
  LayerConfig layer;
  // The mixers of each layer, in order; a list shorter than num_layers is repeated. The first of a layer is its default mode.
  std::vector<std::vector<std::string>> layer_mixers = {{"gated_delta_net", "attention"}};
  // What differs in the layers whose first mixer has this name: {"attention": {"conv": false}}, keys of LayerConfig.
  Json layer_overrides = Json::object();
  bool tie_word_embeddings = true;
  double embedding_multiplier = 1;
  double logits_scaling = 1;

  const std::vector<std::string>& mixers_of(int64_t layer_index) const {
    return layer_mixers[static_cast<size_t>(layer_index) % layer_mixers.size()];
  }
  // The shape of a layer with these mixers: `layer`, changed by layer_overrides. Throws Error for overrides that are no such keys.
  LayerConfig layer_of(const std::vector<std::string>& layer_mixers) const;
  // All mixers of the model, each once, the first layer's first.
  std::vector<std::string> mixers() const;

  void describe(Fields& f);
  // Throws Error for what no single key shows: heads that do not divide, a repeated mixer, an odd head_dim with RoPE, keys that
  // contradict each other.
  void validate() const;
};

// Presets: a size (tiny, 130m, 380m, 810m, 1.4b), or SIZE-VARIANT. Variants: oryx-gdn (the default), oryx-mamba2, transformer, gdn, mamba2,
// inter-layer, intra-layer, three-mixer. Throws Error for an unknown name.
ModelConfig preset(const std::string& name);
std::vector<std::string> preset_sizes();
std::vector<std::string> preset_variants();

// The config with the intermediate_size (a multiple of 16) that brings its parameters nearest to `parameters`.
ModelConfig matched(ModelConfig config, int64_t parameters);
int64_t count_parameters(const ModelConfig& config);

}  // namespace oryx
