// Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay for each key channel, from a narrow projection, and a write strength a
// state head.
//
//   b_t = sigmoid(u W_b) (twice that with allow_neg_eigval)
//   f_t = u W_f,  log a_t = -exp(A_log) * softplus(f_t W_up + dt_bias)      float32; f of the width of a value head, A_log one a state head
//   S_t, o_t: oryx/ops/kda/kda.h
//
// The paper's block besides: convolution and SiLU on queries too (query_conv), a sigmoid behind the gate (gate_activation). Our choice: the gate's
// projection has full rank and no bias, as it is shared with the layer's other mixers.
#include <ATen/ATen.h>

#include "oryx/mixers/delta_rule.h"
#include "oryx/mixers/mixer.h"
#include "oryx/ops/kda/kda.h"
#include "oryx/ops/kda/kda_decay.h"

namespace oryx {

namespace {

class KimiDeltaAttention : public Mixer {
 public:
  using Mixer::Mixer;

  std::string name() const override { return "kimi_delta_attention"; }
  bool advances_everywhere() const override { return true; }

  std::vector<ParameterSpec> parameters() const override {
    const int64_t heads = config_.state_heads(), D = config_.hidden_size, narrow = config_.value_dim();
    return {{"b_proj.weight", {heads, D}, Init::kNormal, true, "decay and step"},
            {"f_proj.weight", {narrow, D}, Init::kNormal, true, "decay and step"},
            {"f_up_proj.weight", {heads * config_.head_dim, narrow}, Init::kNormal, true, "decay and step"},
            {"A_log", {heads}, Init::kLogDecay, false, "decay and step"},
            {"dt_bias", {heads * config_.head_dim}, Init::kTimeStep, false, "decay and step"}};
  }

  std::vector<SlotSpec> slots() const override {
    return {{"kimi_delta_attention.S", SlotKind::kRecurrent, {config_.state_heads(), config_.value_dim(), config_.head_dim}, at::kFloat}};
  }

  // Of a token's decays their narrow origin f is kept: V numbers in place of Hs K, and the rest is computed again.
  std::vector<SlotSpec> row_slots() const override {
    return {{"kimi_delta_attention.f", SlotKind::kPerToken, {config_.value_dim()}, at::kFloat},
            {"kimi_delta_attention.beta", SlotKind::kPerToken, {config_.state_heads()}, at::kFloat}};
  }

  void bind(const ParameterMap& p, const std::string& prefix) override {
    b_proj_ = p.at(prefix + "b_proj.weight");
    f_proj_ = p.at(prefix + "f_proj.weight");
    f_up_proj_ = p.at(prefix + "f_up_proj.weight");
    A_log_ = p.at(prefix + "A_log");
    dt_bias_ = p.at(prefix + "dt_bias");
  }

  at::Tensor forward(const MixerInput& in) const override {
    auto [f, beta] = narrow(in.project);
    if (in.state == nullptr) return ops::kda(in.q, in.k, in.v, decay(f), beta, {}, in.sequences.cu_seqlens, in.spans).o;
    if (in.keep) {
      f = in.keep("kimi_delta_attention.f", f);
      beta = in.keep("kimi_delta_attention.beta", beta);
    }
    at::Tensor S = in.state->tensor("kimi_delta_attention.S");  // [N, Hs, V, K]
    if (in.in_steps()) {
      const at::Tensor g = decay(f);
      const auto step = [&](int64_t t) { return ops::kda_step(in.q.select(1, t), in.k.select(1, t), in.v.select(1, t), g.select(1, t), beta.select(1, t), S); };
      return in.by_token("kimi_delta_attention.S", step);
    }
    const auto r = ops::kda(in.q, in.k, in.v, decay(f), beta, S, in.sequences.cu_seqlens, in.spans);
    in.store(S, r.final_state);
    return r.o;
  }

  void replay(const MixerRows& rows, LayerState& state) const override {
    at::Tensor S = state.tensor("kimi_delta_attention.S");
    const at::Tensor none = at::empty({0, 3}, at::kInt);  // no readout is wanted: any query will do
    const at::Tensor g = decay(rows.own("kimi_delta_attention.f"));
    S.copy_(ops::kda(rows.k, rows.k, rows.v, g, rows.own("kimi_delta_attention.beta"), S, {}, none).final_state);
  }

  bool predicts_values() const override { return true; }
  std::optional<at::Tensor> surprise(const MixerInput& in, TokenMeasure measure) const override {
    const auto [f, beta] = narrow(in.project);
    std::optional<at::Tensor> S;
    if (in.state != nullptr) S = in.state->tensor("kimi_delta_attention.S");
    if (S && in.k.size(1) == 1 && !in.sequences.cu_seqlens) return delta_rule_surprise(delta_rule_after(in.k, in.v, decay(f), beta, *S), in.v, beta, measure);
    return delta_rule_surprise(ops::kda(in.k, in.k, in.v, decay(f), beta, S, in.sequences.cu_seqlens, {}, 1.0).o, in.v, beta, measure);
  }

  MixerFlops flops(int64_t) const override { return delta_rule_flops(config_); }

 private:
  // f and write strength of each token, [B, T, V] and [B, T, Hs] float32.
  std::pair<at::Tensor, at::Tensor> narrow(const Projections& u) const {
    // One product for both narrow projections, in float32, as the decay must be.
    const int64_t heads = config_.state_heads();
    const at::Tensor bf = u.wide({b_proj_, f_proj_});  // [B, T, Hs + V]
    const at::Tensor beta = bf.narrow(-1, 0, heads).sigmoid();
    return {bf.narrow(-1, heads, config_.value_dim()), config_.allow_neg_eigval ? beta * 2 : beta};
  }

  // f [B, T, V] -> g [B, T, Hs, K], at most 0.
  at::Tensor decay(const at::Tensor& f) const {
    return ops::kda_decay(project(f, f_up_proj_), A_log_, dt_bias_);
  }

  at::Tensor b_proj_, f_proj_, f_up_proj_, A_log_, dt_bias_;
};

ORYX_REGISTER_MIXER("kimi_delta_attention", KimiDeltaAttention);

}  // namespace
}  // namespace oryx
