#include "oryx/generate/fused_weights_cuda.h"

#include "oryx/common/error.h"
#include "oryx/generate/fused_layout.h"

namespace oryx::fused {

namespace {

at::Tensor floats(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }
at::Tensor bf16(const at::Tensor& x) { return x.to(at::kBFloat16).contiguous(); }

// Rows 2 i and 2 i + 1 add up to row i of x; zero rows up to a multiple of 32.
at::Tensor halves(const at::Tensor& x) {
  const at::Tensor high = bf16(x), both = at::stack({high, bf16(x - high.to(at::kFloat))}, 1).flatten(0, 1);
  return at::constant_pad_nd(both, {0, 0, 0, (32 - both.size(0) % 32) % 32});
}

}  // namespace

PackedWeights::PackedWeights(const LanguageModel& model, bool persistent) {
  const ModelConfig& c = model.config();
  const int64_t heads = c.layer.num_heads;
  const auto by_columns = [&](const at::Tensor& w) { return persistent ? column_pieces(w, heads) : product_fragments(w); };
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const MultiMixerLayer& layer = model.layer(i);
    const std::string prefix = fmt::format("layers.{}.", i);
    const auto p = [&](const char* name) { return model.parameter(prefix + name); };
    PackedLayer packed;
    packed.attends = layer.mixer_names().size() > 1;
    std::vector<at::Tensor> in = {p("mixer.k_proj.weight"), p("mixer.v_proj.weight"), p("mixer.g_proj.weight"), p("mixer.gated_delta_net.q_proj.weight")};
    if (packed.attends) in.push_back(p("mixer.attention.q_proj.weight"));
    for (at::Tensor& x : in) x = bf16(x);
    packed.in = persistent ? row_pieces_by_head(at::cat(in), heads) : product_fragments(at::cat(in));
    packed.in_rows = static_cast<int64_t>(in.size()) * in[0].size(0);
    packed.narrow = floats(at::cat({p("mixer.gated_delta_net.b_proj.weight"), p("mixer.gated_delta_net.a_proj.weight")}));
    if (!persistent) {
      packed.narrow = halves(packed.narrow);
      packed.narrow_rows = packed.narrow.size(0);
      packed.narrow = product_fragments(packed.narrow);
    }
    packed.out = by_columns(bf16(p("mixer.o_proj.weight")));
    const at::Tensor gate_up = at::stack({bf16(p("mlp.gate_proj.weight")), bf16(p("mlp.up_proj.weight"))}, 1).flatten(0, 1);
    packed.gate_up = persistent ? row_pieces_by_group(gate_up, heads) : product_fragments(gate_up);
    packed.down = by_columns(bf16(p("mlp.down_proj.weight")));
    packed.norm1 = floats(norm_factor(layer.config(), p("norm1.weight")));
    packed.norm2 = floats(norm_factor(layer.config(), p("norm2.weight")));
    packed.k_conv = floats(p("mixer.k_conv.weight")), packed.v_conv = floats(p("mixer.v_conv.weight"));
    packed.A_log = floats(p("mixer.gated_delta_net.A_log")), packed.dt_bias = floats(p("mixer.gated_delta_net.dt_bias"));
    packed.o_norm = floats(p("mixer.o_norm.weight"));
    layers.push_back(std::move(packed));
  }
  embed = bf16(model.parameter("embed.weight"));
  head = c.tie_word_embeddings ? embed : bf16(model.parameter("lm_head.weight"));
  head = persistent ? row_pieces(head) : product_fragments(head);
  final_norm = floats(norm_factor(c.layer, model.parameter("final_norm.weight")));
}

int64_t PackedWeights::bytes() const {
  auto sum = static_cast<int64_t>(head.nbytes());
  for (const PackedLayer& l : layers) {
    for (const auto* t : {&l.narrow, &l.out, &l.gate_up, &l.down}) sum += static_cast<int64_t>(t->nbytes());
    sum += static_cast<int64_t>(l.in.nbytes()) / (l.attends ? 5 : 4) * 4;  // keys, values, gate, one query
  }
  return sum;
}

}  // namespace oryx::fused
