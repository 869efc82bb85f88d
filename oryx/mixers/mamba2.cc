// Mamba-2 (arXiv 2405.21060) on the layer's keys and values: v is Mamba's x, k its B, q its C.
//
//   dt_t = softplus(u W_dt + dt_bias),  A = -exp(A_log)                           float32
//   S_t, o_t: oryx/ops/ssd/ssd.h
#include <ATen/ATen.h>

#include "oryx/mixers/mixer.h"
#include "oryx/ops/ssd/ssd.h"

namespace oryx {

namespace {

class Mamba2 : public Mixer {
 public:
  using Mixer::Mixer;

  std::string name() const override { return "mamba2"; }
  bool advances_everywhere() const override { return true; }
  // The paper's variant drops the activation for attention's sake (arXiv 2605.28769, appendix).
  bool plain_keys() const override { return true; }

  std::vector<ParameterSpec> parameters() const override {
    const int64_t heads = config_.state_heads(), D = config_.hidden_size;
    return {{"dt_proj.weight", {heads, D}, Init::kNormal, true, "decay and step"},
            {"A_log", {heads}, Init::kLogDecay, false, "decay and step"},
            {"dt_bias", {heads}, Init::kTimeStep, false, "decay and step"},
            {"D", {heads}, Init::kOnes, false, "decay and step"}};
  }

  std::vector<SlotSpec> slots() const override {
    return {{"mamba2.S", SlotKind::kRecurrent, {config_.state_heads(), config_.value_dim(), config_.head_dim}, at::kFloat}};
  }

  std::vector<SlotSpec> row_slots() const override { return {{"mamba2.dt", SlotKind::kPerToken, {config_.state_heads()}, at::kFloat}}; }

  void bind(const ParameterMap& p, const std::string& prefix) override {
    dt_proj_ = p.at(prefix + "dt_proj.weight");
    A_log_ = p.at(prefix + "A_log");
    dt_bias_ = p.at(prefix + "dt_bias");
    D_ = p.at(prefix + "D");
  }

  at::Tensor forward(const MixerInput& in) const override {
    at::Tensor dt_raw = in.project.wide({dt_proj_});  // [B, T, Hs], float32
    if (in.state == nullptr) {
      return ops::ssd(in.q, in.k, in.v, dt_raw, dt_bias_, A_log_, D_, {}, in.sequences.cu_seqlens, in.spans).o;
    }
    if (in.keep) dt_raw = in.keep("mamba2.dt", dt_raw);
    at::Tensor S = in.state->tensor("mamba2.S");  // [N, Hs, V, K]
    if (in.in_steps()) {
      const auto step = [&](int64_t t) { return ops::ssd_step(in.q.select(1, t), in.k.select(1, t), in.v.select(1, t), dt_raw.select(1, t), dt_bias_, A_log_, D_, S); };
      return in.by_token("mamba2.S", step);
    }
    const auto r = ops::ssd(in.q, in.k, in.v, dt_raw, dt_bias_, A_log_, D_, S, in.sequences.cu_seqlens, in.spans);
    in.store(S, r.final_state);
    return r.o;
  }

  void replay(const MixerRows& rows, LayerState& state) const override {
    at::Tensor S = state.tensor("mamba2.S");
    const at::Tensor none = at::empty({0, 3}, at::kInt);  // no readout is wanted: any query will do
    S.copy_(ops::ssd(rows.k, rows.k, rows.v, rows.own("mamba2.dt"), dt_bias_, A_log_, D_, S, {}, none).final_state);
  }

  // (1 - cos(v, a S_{t-1} k)) over all heads: the recurrence does not divide by the keys' length, so that only a prediction's direction counts. The state
  // after the token, read with its own key, is a S_{t-1} k + dt |k|^2 v. A token writes dt v k^T, whatever the state is.
  bool predicts_values() const override { return true; }
  std::optional<at::Tensor> surprise(const MixerInput& in, TokenMeasure measure) const override {
    const at::Tensor dt_raw = in.project.wide({dt_proj_});  // [B, T, Hs]
    const at::Tensor none = at::zeros_like(D_);
    const at::Tensor k = in.k.to(at::kFloat), v_in = in.v.to(at::kFloat);
    std::optional<at::Tensor> S;
    if (in.state != nullptr) S = in.state->tensor("mamba2.S");
    const auto squares = [&](const at::Tensor& x) { return x.square().sum(-1).repeat_interleave(dt_raw.size(2) / x.size(2), 2); };  // [B, T, Hs]
    const at::Tensor dt = at::logaddexp(dt_raw + dt_bias_, at::zeros({}, dt_bias_.options()));
    if (measure == TokenMeasure::kWrite) return (dt.square() * squares(v_in) * squares(k)).sum(2);
    const at::Tensor after = ops::ssd(k, k, v_in, dt_raw, dt_bias_, A_log_, none, S, in.sequences.cu_seqlens).o;  // [B, T, Hs, V]
    const int64_t heads = after.size(2);
    const at::Tensor v = v_in.repeat_interleave(heads / v_in.size(2), 2);
    const at::Tensor own = dt * squares(k);  // [B, T, Hs]
    const at::Tensor before = after - own.unsqueeze(-1) * v;
    const auto norm = [](const at::Tensor& x) { return x.square().sum({2, 3}).sqrt(); };
    // What the difference leaves of an empty state is rounding, and predicts nothing.
    const at::Tensor length = at::maximum(norm(before), 1e-4 * norm(own.unsqueeze(-1) * v));
    return 1 - (before * v).sum({2, 3}) / (length * norm(v)).clamp_min(1e-12);
  }

  MixerFlops flops(int64_t) const override {
    // Recurrent form: the rank-one update and the decay (2 + 1) at every token; the readout and the skip in this mode.
    const double cell = static_cast<double>(config_.head_dim) * config_.value_dim();
    return {3 * cell * config_.state_heads(), (2 * cell + 2.0 * config_.value_dim()) * config_.output_heads()};
  }

 private:
  at::Tensor dt_proj_, A_log_, dt_bias_, D_;
};

ORYX_REGISTER_MIXER("mamba2", Mamba2);

}  // namespace
}  // namespace oryx
