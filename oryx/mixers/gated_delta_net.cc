// Gated DeltaNet (arXiv 2412.06464): the delta rule with a scalar decay and write strength a state head.
//
//   b_t = sigmoid(u W_b) (twice that with allow_neg_eigval: arXiv 2411.12537),  log a_t = -exp(A_log) * softplus(u W_a + dt_bias)      float32
//   S_t, o_t: oryx/ops/gated_delta/gated_delta.h
#include <ATen/ATen.h>

#include "oryx/mixers/delta_rule.h"
#include "oryx/mixers/mixer.h"
#include "oryx/ops/gated_delta/gated_delta.h"
#include "oryx/ops/gated_delta/gates.h"

namespace oryx {

namespace {

class GatedDeltaNet : public Mixer {
 public:
  using Mixer::Mixer;

  std::string name() const override { return "gated_delta_net"; }
  bool advances_everywhere() const override { return true; }

  std::vector<ParameterSpec> parameters() const override {
    const int64_t heads = config_.state_heads(), D = config_.hidden_size;
    return {{"b_proj.weight", {heads, D}, Init::kNormal, true, "decay and step"},
            {"a_proj.weight", {heads, D}, Init::kNormal, true, "decay and step"},
            {"A_log", {heads}, Init::kLogDecay, false, "decay and step"},
            {"dt_bias", {heads}, Init::kTimeStep, false, "decay and step"}};
  }

  std::vector<SlotSpec> slots() const override {
    return {{"gated_delta_net.S", SlotKind::kRecurrent, {config_.state_heads(), config_.value_dim(), config_.head_dim}, at::kFloat}};
  }

  std::vector<SlotSpec> row_slots() const override {
    return {{"gated_delta_net.g", SlotKind::kPerToken, {config_.state_heads()}, at::kFloat},
            {"gated_delta_net.beta", SlotKind::kPerToken, {config_.state_heads()}, at::kFloat}};
  }

  void bind(const ParameterMap& p, const std::string& prefix) override {
    b_proj_ = p.at(prefix + "b_proj.weight");
    a_proj_ = p.at(prefix + "a_proj.weight");
    A_log_ = p.at(prefix + "A_log");
    dt_bias_ = p.at(prefix + "dt_bias");
  }

  at::Tensor forward(const MixerInput& in) const override {
    auto [g, beta] = scalars(in.project);
    if (in.state == nullptr) {
      return ops::gated_delta_rule(in.q, in.k, in.v, g, beta, {}, in.sequences.cu_seqlens, in.spans).o;
    }
    if (in.keep) {
      g = in.keep("gated_delta_net.g", g);
      beta = in.keep("gated_delta_net.beta", beta);
    }
    at::Tensor S = in.state->tensor("gated_delta_net.S");  // [N, Hs, V, K]
    if (in.in_steps()) {
      const auto step = [&](int64_t t) { return ops::gated_delta_step(in.q.select(1, t), in.k.select(1, t), in.v.select(1, t), g.select(1, t), beta.select(1, t), S); };
      return in.by_token("gated_delta_net.S", step);
    }
    const auto r = ops::gated_delta_rule(in.q, in.k, in.v, g, beta, S, in.sequences.cu_seqlens, in.spans);
    in.store(S, r.final_state);
    return r.o;
  }

  void replay(const MixerRows& rows, LayerState& state) const override {
    at::Tensor S = state.tensor("gated_delta_net.S");
    const at::Tensor none = at::empty({0, 3}, at::kInt);  // no readout is wanted: any query will do
    S.copy_(ops::gated_delta_rule(rows.k, rows.k, rows.v, rows.own("gated_delta_net.g"), rows.own("gated_delta_net.beta"), S, {}, none).final_state);
  }

  bool predicts_values() const override { return true; }
  std::optional<at::Tensor> surprise(const MixerInput& in, TokenMeasure measure) const override {
    const auto [g, beta] = scalars(in.project);
    std::optional<at::Tensor> S;
    if (in.state != nullptr) S = in.state->tensor("gated_delta_net.S");
    if (S && in.k.size(1) == 1 && !in.sequences.cu_seqlens) return delta_rule_surprise(delta_rule_after(in.k, in.v, g, beta, *S), in.v, beta, measure);
    return delta_rule_surprise(ops::gated_delta_rule(in.k, in.k, in.v, g, beta, S, in.sequences.cu_seqlens, {}, 1.0).o, in.v, beta, measure);
  }

  MixerFlops flops(int64_t) const override { return delta_rule_flops(config_); }

 private:
  // Log decay and write strength of each token and head, [B, T, Hs] float32.
  std::pair<at::Tensor, at::Tensor> scalars(const Projections& u) const {
    // Both projections are narrow (one column a head): one product, in float32, as the decay must be.
    const at::Tensor ba = u.wide({b_proj_, a_proj_});  // [B, T, 2 Hs]
    return ops::gated_delta_gates(ba, A_log_, dt_bias_, config_.allow_neg_eigval ? 2 : 1);
  }

  at::Tensor b_proj_, a_proj_, A_log_, dt_bias_;
};

ORYX_REGISTER_MIXER("gated_delta_net", GatedDeltaNet);

}  // namespace
}  // namespace oryx
