#include "oryx/generate/fused_decoder.h"

#include "oryx/common/error.h"
#include "oryx/generate/captured_decoder.h"

namespace oryx {

namespace {

// Filled by static initialisers of a build with CUDA, read-only afterwards.
detail::FusedDecoderFactory& factory() {
  static detail::FusedDecoderFactory f = nullptr;
  return f;
}
detail::FusedDecoderFactory& captured_factory() {
  static detail::FusedDecoderFactory f = nullptr;
  return f;
}

// Why a layer of this kind is none of the fused ones; empty when it is.
std::string layer_refusal(const LayerConfig& c, const std::vector<std::string>& mixers) {
  using Names = std::vector<std::string>;
  if (mixers != Names{"gated_delta_net"} && mixers != Names{"gated_delta_net", "attention"}) {
    return fmt::format("mixers [{}], expected [gated_delta_net] or [gated_delta_net, attention]", fmt::join(mixers, ", "));
  }
  if (mixers.size() > 1 && c.combine != "select") return "combine " + c.combine;
  if (c.head_dim != 128 || c.value_dim() != 128) return fmt::format("heads of {} keys and {} values, expected 128", c.head_dim, c.value_dim());
  if (c.kv_heads() != c.num_heads || c.value_heads() != c.num_heads) return "grouped heads";
  if (!c.conv || c.conv_kernel != 4 || c.conv_bias || c.query_conv) return "its convolutions (expected keys and values alone, four taps, no bias)";
  if (c.conv_activation != "auto" && c.conv_activation != "silu") return "conv_activation " + c.conv_activation;
  if (!c.gate || c.gate_activation != "silu" || !c.head_norm || c.gated_norm_order != "norm_first" || c.head_norm_groups != 0) return "its output gate or head norm";
  if (c.qk_norm) return "qk_norm";
  if (c.share_query || !c.share_kv) return "share_query or share_kv";
  if (c.norm_placement != "before" || c.residual_multiplier != 1) return "norm_placement or residual_multiplier";
  if (c.rope_theta <= 0 || (c.rotary_dim != 0 && c.rotary_dim != c.head_dim)) return "rope_theta or rotary_dim";
  if (c.allow_neg_eigval) return "allow_neg_eigval";
  if (c.intermediate_size == 0 || c.intermediate_size % 8 != 0 || c.hidden_size % 8 != 0 || c.hidden_size > 8192) return "its widths";
  return {};
}

}  // namespace

std::string detail::fused_refusal(const LanguageModel& model, const StateOptions& state) {
  if (!model.device().is_cuda()) return "the model is not on a GPU";
  if (model.compute_dtype() != at::kBFloat16) return "activations are not bfloat16 (--precision bfloat16)";
  const ModelConfig& c = model.config();
  if (c.embedding_multiplier != 1 || c.logits_scaling != 1) return "embedding_multiplier or logits_scaling";
  if (state.kept.on()) return "the state keeps rows by choice, which the host makes";
  if (state.ring > 0) return "the state keeps a ring of convolution inputs";
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const MultiMixerLayer& layer = model.layer(i);
    if (const std::string why = layer_refusal(layer.config(), layer.mixer_names()); !why.empty()) return fmt::format("layer {}: {}", i, why);
    const LayerConfig &first = model.layer(0).config(), &own = layer.config();
    if (own.num_heads != first.num_heads || own.intermediate_size != first.intermediate_size || own.hidden_size != first.hidden_size) return "layers of different widths";
  }
  return {};
}

bool detail::register_fused_decoder(FusedDecoderFactory f) {
  factory() = f;
  return true;
}

bool detail::register_captured_decoder(FusedDecoderFactory f) {
  captured_factory() = f;
  return true;
}

std::unique_ptr<FusedDecoder> make_fused_decoder(const LanguageModel& model, State& state, int64_t tokens, std::string* why, bool hidden) {
  std::string reason;
  if (!model.device().is_cuda()) {
    reason = "the model is not on a GPU";
  } else if (factory() == nullptr || captured_factory() == nullptr) {
    reason = "this build has no CUDA";
  } else {
    // The persistent kernel keeps hidden states to itself.
    if (!hidden) reason = detail::fused_refusal(model, state.options());
    if (reason.empty() && !hidden) {
      if (auto decoder = factory()(model, state, tokens, &reason)) return decoder;
    }
    // What is said is why not even the general one will do.
    reason.clear();
    if (auto decoder = captured_factory()(model, state, tokens, &reason)) return decoder;
  }
  if (why != nullptr) *why = reason;
  return nullptr;
}

}  // namespace oryx
