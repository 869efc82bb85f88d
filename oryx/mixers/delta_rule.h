// What mixers of the delta rule (gated_delta_net, kimi_delta_attention) have in common, whatever their decays.
#pragma once

#include <ATen/ATen.h>

#include "oryx/mixers/mixer.h"

namespace oryx {

// Mixer::surprise(): |v - a S_{t-1} k^|^2 / |v|^2 over all heads, or |b (v - a S_{t-1} k^)|^2, what the token writes (kWrite); [B, T]. `after` [B, T, Hs, V] is the state after each token read with the token's own key
// (scale 1), (1 - b) a S_{t-1} k^ + b v; v [B, T, Hv, V], b [B, T, Hs].
inline at::Tensor delta_rule_surprise(const at::Tensor& after, const at::Tensor& v, const at::Tensor& beta, TokenMeasure measure) {
  const at::Tensor read = after.to(at::kFloat), values = v.to(at::kFloat).repeat_interleave(after.size(2) / v.size(2), 2);
  const at::Tensor left = 1 - beta;
  const at::Tensor divisor = at::where(left.abs() < 1e-3, at::full_like(left, 1e-3), left).unsqueeze(-1);
  const at::Tensor error = (values - read) / divisor;
  if (measure == TokenMeasure::kWrite) return (beta.unsqueeze(-1) * error).square().sum({2, 3});
  return error.square().sum({2, 3}) / values.square().sum({2, 3}).clamp_min(1e-12);
}

// The state after one token each, read with the token's own key as `after` above, from the state before it: k [B, 1, Hk, K], v [B, 1, Hv, V], log decays [B, 1, Hs] or [B, 1, Hs, K], b [B, 1, Hs],
// S [B, Hs, V, K] -> [B, 1, Hs, V]. Keys are normalised here.
inline at::Tensor delta_rule_after(const at::Tensor& k, const at::Tensor& v, const at::Tensor& log_decay, const at::Tensor& beta, const at::Tensor& S) {
  const int64_t heads = S.size(1);
  const auto spread = [&](const at::Tensor& x) { return x.to(at::kFloat).squeeze(1).repeat_interleave(heads / x.size(2), 1); };  // [B, Hs, K or V]
  const at::Tensor key = spread(k), unit = key * (key.square().sum(-1, true) + 1e-6).rsqrt();
  const at::Tensor a = log_decay.squeeze(1).exp(), b = beta.squeeze(1).unsqueeze(-1);
  const at::Tensor before = at::matmul(S, (unit * (a.dim() == 2 ? a.unsqueeze(-1) : a)).unsqueeze(-1)).squeeze(-1);  // [B, Hs, V]
  return ((1 - b) * before + b * spread(v)).unsqueeze(1);
}

// Of the recurrent form: S k, the rank-one update and the decay (2 + 2 + 1) at every token; the readout S q in its mode.
inline MixerFlops delta_rule_flops(const LayerConfig& config) {
  const double cell = static_cast<double>(config.head_dim) * config.value_dim();
  return {5 * cell * config.state_heads(), 2 * cell * config.output_heads()};
}

}  // namespace oryx
