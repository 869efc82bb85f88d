// Small models of every kind with random modes, for tests.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "oryx/common/random.h"
#include "oryx/model/language_model.h"

namespace oryx::test {

struct Case {
  std::string name;
  ModelConfig config;
};

inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

inline ModelConfig small(std::vector<std::vector<std::string>> mixers) {
  ModelConfig c;
  c.vocab_size = 61;
  c.num_layers = 3;
  c.layer.hidden_size = 48;
  c.layer.num_heads = 4;
  c.layer.num_kv_heads = 2;
  c.layer.head_dim = 16;
  c.layer.value_head_dim = 24;
  c.layer.intermediate_size = 64;
  c.layer.window = 9;
  c.layer_mixers = std::move(mixers);
  return c;
}

inline std::vector<Case> cases() {
  std::vector<Case> all;
  auto add = [&](const std::string& name, std::vector<std::vector<std::string>> mixers, auto change) {
    ModelConfig c = small(std::move(mixers));
    change(c);
    all.push_back({name, c});
  };
  auto nothing = [](ModelConfig&) {};
  add("oryx_gdn", {{"gated_delta_net", "attention"}}, nothing);
  add("oryx_gdn_query_conv", {{"gated_delta_net", "attention"}}, [](ModelConfig& c) { c.layer.query_conv = true; });
  add("oryx_mamba2", {{"mamba2", "attention"}}, nothing);
  add("oryx_kda", {{"kimi_delta_attention", "attention"}}, [](ModelConfig& c) { c.layer.gate_activation = "sigmoid"; });
  add("kda", {{"kimi_delta_attention"}}, [](ModelConfig& c) {
    c.layer.query_conv = c.layer.allow_neg_eigval = true;
    c.layer.num_value_heads = 4;
  });
  add("three_recurrences", {{"kimi_delta_attention", "mamba2", "gated_delta_net", "attention"}}, nothing);
  add("transformer", {{"attention"}}, [](ModelConfig& c) { c.layer.conv = c.layer.gate = c.layer.head_norm = false; });
  add("gdn", {{"gated_delta_net"}}, [](ModelConfig& c) { c.layer.query_conv = true; });
  add("mamba2", {{"mamba2"}}, [](ModelConfig& c) { c.layer.query_conv = true; });
  add("inter_layer", {{"gated_delta_net"}, {"attention"}}, nothing);
  add("intra_layer", {{"gated_delta_net", "attention"}}, [](ModelConfig& c) { c.layer.combine = "mean"; });
  add("three_mixers", {{"gated_delta_net", "sliding_window", "attention"}}, nothing);
  add("looking_back_alone", {{"attention", "sliding_window"}}, nothing);
  add("window_own_query", {{"mamba2", "sliding_window", "attention"}}, [](ModelConfig& c) { c.layer.sliding_window_query = true; });
  add("shared_query", {{"gated_delta_net", "attention"}}, [](ModelConfig& c) { c.layer.share_query = true; });
  add("own_kv", {{"gated_delta_net", "attention"}}, [](ModelConfig& c) { c.layer.share_kv = false; });
  add("qk_norm_untied", {{"gated_delta_net", "attention"}}, [](ModelConfig& c) {
    c.layer.qk_norm = true;
    c.tie_word_embeddings = false;
  });
  add("published_gdn", {{"gated_delta_net"}, {"attention"}}, [](ModelConfig& c) {
    LayerConfig& l = c.layer;
    l.num_heads = l.num_kv_heads = 2;
    l.num_value_heads = 4;
    l.query_conv = l.conv_bias = l.zero_centred_norm = l.allow_neg_eigval = true;
    l.head_norm_eps = 1e-5;
    c.layer_overrides = Json::parse(R"({"attention": {"num_heads": 4, "num_value_heads": 0, "value_head_dim": 0, "conv": false, "conv_bias": false,
      "query_conv": false, "head_norm": false, "gate_activation": "sigmoid", "qk_norm": true, "rotary_dim": 4, "norm_placement": "after"}})");
  });
  add("published_mamba2", {{"mamba2"}, {"attention"}}, [](ModelConfig& c) {
    LayerConfig& l = c.layer;
    l.num_heads = l.num_kv_heads = 2;
    l.num_value_heads = 6;
    l.query_conv = l.conv_bias = true;
    l.gated_norm_order = "gate_first";
    l.head_norm_groups = 2;
    l.residual_multiplier = 0.7;
    c.embedding_multiplier = 1.5;
    c.logits_scaling = 0.5;
    c.layer_overrides = Json::parse(R"({"attention": {"num_heads": 4, "num_value_heads": 0, "conv": false, "conv_bias": false, "query_conv": false,
      "gate": false, "head_norm": false, "gated_norm_order": "norm_first", "head_norm_groups": 0, "qk_norm": true, "qk_norm_over": "all_heads",
      "attention_scale": 0.3}})");
  });
  add("gate_first_by_head", {{"mamba2", "attention"}}, [](ModelConfig& c) { c.layer.gated_norm_order = "gate_first"; });
  add("no_feed_forward", {{"mamba2"}}, [](ModelConfig& c) { c.layer.intermediate_size = 0; });
  return all;
}

inline std::unique_ptr<LanguageModel> make(const ModelConfig& c) {
  auto m = std::make_unique<LanguageModel>(c);
  m->initialize(3);
  // Louder than the initialisation, so that a wrong token shows.
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < m->specs().size(); ++i) {
    at::Tensor p = m->parameters()[i];
    if (p.dim() == 2 && m->specs()[i].part != "convolution") p.mul_(6);
    if (p.dim() == 1 && m->specs()[i].part == "convolution") p.add_(0.3);
  }
  return m;
}

// A random mode for each token of [B, T], in runs.
inline std::vector<std::vector<int32_t>> random_modes(CounterRng& rng, int64_t B, int64_t T, size_t mixers) {
  std::vector<std::vector<int32_t>> modes(static_cast<size_t>(B));
  for (auto& row : modes) {
    while (static_cast<int64_t>(row.size()) < T) {
      const auto mode = static_cast<int32_t>(rng.below(mixers));
      row.insert(row.end(), 1 + rng.below(7), mode);
    }
    row.resize(static_cast<size_t>(T));
  }
  return modes;
}

inline std::shared_ptr<const Routing> routing(const ModelConfig& c, const std::vector<std::vector<int32_t>>& modes, int64_t begin, int64_t end) {
  std::vector<RoutedSpan> spans;
  for (size_t b = 0; b < modes.size(); ++b) {
    for (int64_t t = begin; t < end; ++t) {
      const auto at = static_cast<int32_t>(t - begin);
      spans.push_back({static_cast<int32_t>(b), at, at + 1, modes[b][static_cast<size_t>(t)]});
    }
  }
  return std::make_shared<Routing>(static_cast<int64_t>(modes.size()), end - begin, c.mixers(), spans);
}

inline at::Tensor run(const LanguageModel& m, const at::Tensor& ids, std::shared_ptr<const Routing> r, State* state = nullptr,
               std::optional<at::Tensor> cu = {}) {
  at::NoGradGuard no_grad;
  ModelInput in;
  in.input_ids = ids;
  in.routing = {std::move(r)};
  in.state = state;
  in.cu_seqlens = std::move(cu);
  return m.logits(m.hidden(in));
}

inline at::Tensor random_ids(CounterRng& rng, int64_t B, int64_t T, int64_t vocab) {
  at::Tensor ids = at::empty({B, T}, at::kLong);
  for (int64_t i = 0; i < B * T; ++i) ids.data_ptr<int64_t>()[i] = static_cast<int64_t>(rng.below(static_cast<uint64_t>(vocab)));
  return ids;
}

}  // namespace oryx::test
