#include "oryx/generate/captured_weights.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "oryx/common/error.h"
#include "oryx/generate/fused_layout.h"

namespace oryx::captured {

namespace {

constexpr int64_t kStep = 32;  // of rows and columns of a product

int64_t rounded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }
at::Tensor wide(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }
at::Tensor with_rows(const at::Tensor& x, int64_t rows) { return at::constant_pad_nd(x, {0, 0, 0, rows - x.size(0)}); }
at::Tensor with_columns(const at::Tensor& x, int64_t columns) { return at::constant_pad_nd(x, {0, columns - x.size(1)}); }
at::Tensor packed(const at::Tensor& x) { return fused::product_fragments(x.to(at::kBFloat16).contiguous()); }

// Rows 2 i and 2 i + 1 add up to row i of x.
at::Tensor both_halves(const at::Tensor& x) {
  const at::Tensor high = x.to(at::kBFloat16), rest = (x - high.to(at::kFloat)).to(at::kBFloat16);
  return at::stack({high, rest}, 1).flatten(0, 1);
}

// Attention: none of the recurrences.
Kind kind_of(const std::string& mixer) {
  if (mixer == "gated_delta_net") return Kind::kGatedDelta;
  if (mixer == "kimi_delta_attention") return Kind::kKda;
  return mixer == "mamba2" ? Kind::kSsd : Kind::kAttention;
}

// The projections that a recurrence's scalars come from, and the slots that keep them.
struct Scalar {
  const char *weight, *rows;
  Function function;
};
std::vector<Scalar> scalars_of(Kind kind) {
  switch (kind) {
    case Kind::kGatedDelta: return {{"b_proj.weight", "beta", Function::kWrite}, {"a_proj.weight", "g", Function::kDecay}};
    case Kind::kKda: return {{"b_proj.weight", "beta", Function::kWrite}, {"f_proj.weight", "f", Function::kCopy}};
    case Kind::kSsd: return {{"dt_proj.weight", "dt", Function::kCopy}};
    case Kind::kAttention: break;
  }
  return {};
}

std::string layer_refusal(const MultiMixerLayer& layer) {
  const LayerConfig& c = layer.config();
  const auto& names = layer.mixer_names();
  for (const auto& name : names) {
    const bool attention = name == "attention" || name == "sliding_window";
    if (!attention && kind_of(name) == Kind::kAttention) return "mixer " + name;
  }
  if (names.size() > 4) return fmt::format("{} mixers", names.size());
  if (c.head_dim % 2 != 0 || c.value_dim() % 2 != 0) return fmt::format("heads of {} keys and {} values, expected even numbers", c.head_dim, c.value_dim());
  if (c.hidden_size % kStep != 0) return fmt::format("hidden_size {}, expected a multiple of {}", c.hidden_size, kStep);
  if (c.head_norm_groups > 0 && c.output_width() / c.head_norm_groups % 2 != 0) return "head_norm_groups of an odd number of values";
  return {};
}

// As MultiMixerLayer has it: whether SiLU stands behind the convolutions, and the name of a mixer's query.
bool silu_behind_convolutions(const MultiMixerLayer& layer) {
  if (layer.config().conv_activation != "auto") return layer.config().conv_activation == "silu";
  bool plain = false, keeps = false;
  for (size_t m = 0; m < layer.mixer_names().size(); ++m) plain |= layer.mixer(m).plain_keys(), keeps |= layer.mixer(m).keeps_tokens();
  return !(plain && keeps);
}

std::string query_name(const MultiMixerLayer& layer, size_t m) {
  const auto& names = layer.mixer_names();
  const std::string lender = layer.mixer(m).borrows_query_of();
  if (layer.config().share_query) return "q_proj.weight";
  return (std::find(names.begin(), names.end(), lender) != names.end() ? lender : names[m]) + ".q_proj.weight";
}

LayerPlan plan_of(const LanguageModel& model, int64_t i) {
  const MultiMixerLayer& layer = model.layer(i);
  LayerPlan plan;
  plan.config = layer.config(), plan.silu = silu_behind_convolutions(layer);
  const LayerConfig& c = plan.config;
  const std::string prefix = fmt::format("layers.{}.", i);
  const auto p = [&](const std::string& name) { return model.parameter(prefix + name); };
  std::vector<at::Tensor> in;
  const auto add = [&](const std::string& name) {
    const at::Tensor w = p(name);
    const int64_t begin = plan.rows;
    in.push_back(with_rows(w, rounded(w.size(0))));
    plan.rows += in.back().size(0);
    return begin;
  };
  for (const std::string& name : c.share_kv ? std::vector<std::string>{""} : layer.mixer_names()) {
    GroupPlan g;
    g.prefix = name.empty() ? "" : name + ".";
    const std::string own = "mixer." + g.prefix;
    g.keys = add(own + "k_proj.weight"), g.values = add(own + "v_proj.weight");
    if (c.conv) g.key_filter = wide(p(own + "k_conv.weight")), g.value_filter = wide(p(own + "v_conv.weight"));
    if (c.conv && c.conv_bias) g.key_bias = wide(p(own + "k_conv.bias")), g.value_bias = wide(p(own + "v_conv.bias"));
    plan.groups.push_back(std::move(g));
  }
  if (c.gate) plan.gate = add("mixer.g_proj.weight");
  std::vector<at::Tensor> narrow;
  for (const std::string& name : layer.mixer_names()) {
    MixerPlan m;
    m.name = name;
    m.kind = kind_of(name);
    m.group = c.share_kv ? 0 : plan.mixers.size();
    if (name == "sliding_window") m.window = c.window;
    const std::string own = "mixer." + name + ".";
    if (m.kind == Kind::kAttention && c.qk_norm) m.q_norm = wide(norm_factor(c, p(own + "q_norm.weight"))), m.k_norm = wide(norm_factor(c, p(own + "k_norm.weight")));
    if (m.kind != Kind::kAttention) {
      for (const Scalar& scalar : scalars_of(m.kind)) {
        narrow.push_back(wide(p(own + scalar.weight)));
        m.scalars.push_back({scalar.function, plan.scalars, narrow.back().size(0), name + "." + scalar.rows});
        plan.scalars += narrow.back().size(0);
      }
      m.A_log = wide(p(own + "A_log")), m.dt_bias = wide(p(own + "dt_bias"));
      if (m.kind == Kind::kSsd) m.D = wide(p(own + "D"));
      if (m.kind == Kind::kKda) m.decay_up = wide(p(own + "f_up_proj.weight"));
      if (c.query_conv) {
        m.query_filter = wide(p(own + "q_conv.weight"));
        if (c.conv_bias) m.query_bias = wide(p(own + "q_conv.bias"));
      }
    }
    plan.mixers.push_back(std::move(m));
  }
  // The linear mixers' queries first: what they share with attention is always wanted.
  std::vector<std::pair<std::string, int64_t>> placed;
  for (const bool linear : {true, false}) {
    if (!linear) plan.optional = plan.rows;
    for (size_t m = 0; m < plan.mixers.size(); ++m) {
      if ((plan.mixers[m].kind != Kind::kAttention) != linear) continue;
      const std::string name = query_name(layer, m);
      auto it = std::find_if(placed.begin(), placed.end(), [&](const auto& other) { return other.first == name; });
      if (it == placed.end()) it = placed.emplace(placed.end(), name, add("mixer." + name));
      plan.mixers[m].query = it->second;
    }
  }
  plan.in = packed(at::cat(in));
  if (!narrow.empty()) {
    const at::Tensor both = both_halves(at::cat(narrow));
    plan.narrow_rows = rounded(both.size(0));
    plan.narrow = packed(with_rows(both, plan.narrow_rows));
  }
  // What a part adds to the stream is multiplied: by its last weight, or by its norm behind.
  plan.norms_behind = c.norm_placement == "after";
  const auto multiplied = [&](const at::Tensor& w, bool here) { return here && c.residual_multiplier != 1 ? w * c.residual_multiplier : w; };
  const auto scaled = [&](const at::Tensor& w) { return multiplied(w, !plan.norms_behind); };
  const auto norm = [&](const std::string& name) { return wide(multiplied(norm_factor(c, p(name)), plan.norms_behind)); };
  plan.width = rounded(c.output_width());
  plan.out = packed(with_columns(scaled(p("mixer.o_proj.weight")), plan.width));
  plan.norm1 = norm("norm1.weight");
  if (c.intermediate_size > 0) {
    plan.feed_forward = rounded(c.intermediate_size);
    const at::Tensor gate = with_rows(p("mlp.gate_proj.weight"), plan.feed_forward), up = with_rows(p("mlp.up_proj.weight"), plan.feed_forward);
    plan.gate_up = packed(at::stack({gate, up}, 1).flatten(0, 1));
    plan.down = packed(with_columns(scaled(p("mlp.down_proj.weight")), plan.feed_forward));
    plan.norm2 = norm("norm2.weight");
  }
  if (c.head_norm) plan.o_norm = wide(p("mixer.o_norm.weight"));
  return plan;
}

}  // namespace

std::string refusal(const LanguageModel& model) {
  if (model.compute_dtype() != at::kBFloat16) return "activations are not bfloat16 (--precision bfloat16)";
  for (int64_t i = 0; i < model.config().num_layers; ++i) {
    if (const std::string why = layer_refusal(model.layer(i)); !why.empty()) return fmt::format("layer {}: {}", i, why);
  }
  return {};
}

std::string refusal(const StateOptions& state) {
  if (state.kept.on()) return "the state keeps rows by choice, which the host makes";
  if (state.ring > 0) return "the state keeps a ring of convolution inputs";
  return {};
}

Plan make_plan(const LanguageModel& model) {
  const ModelConfig& c = model.config();
  Plan plan;
  for (int64_t i = 0; i < c.num_layers; ++i) plan.layers.push_back(plan_of(model, i));
  const at::Tensor embed = model.parameter("embed.weight"), head = c.tie_word_embeddings ? embed : model.parameter("lm_head.weight");
  plan.embed = (c.embedding_multiplier == 1 ? embed : embed * c.embedding_multiplier).to(at::kBFloat16).contiguous();
  plan.head_rows = rounded(c.vocab_size);
  plan.head = packed(with_rows(head, plan.head_rows));
  plan.final_norm = wide(norm_factor(c.layer, model.parameter("final_norm.weight")) / c.logits_scaling);
  return plan;
}

}  // namespace oryx::captured
