#include "oryx/model/surprise.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/error.h"
#include "oryx/model/state_test_support.h"

namespace oryx {
namespace {

using namespace test;

// Of the first layer, whose keys and values do not hang on any mode: predictions token by token from the rows and scalars that a state keeps.
std::vector<double> by_hand(const LanguageModel& m, const at::Tensor& ids) {
  const ModelConfig& c = m.config();
  const int64_t T = ids.size(1);
  State state = m.make_state(1, {0, 0, true});
  run(m, ids, routing(c, std::vector<std::vector<int32_t>>(1, std::vector<int32_t>(static_cast<size_t>(T), 0)), 0, T), &state);
  const at::Tensor k = state.rows(0, "keys", T)[0].to(at::kDouble), v = state.rows(0, "values", T)[0].to(at::kDouble);  // [T, Hk, K or V]
  const bool channels = state.layer(0).has("kimi_delta_attention.f"), delta = channels || state.layer(0).has("gated_delta_net.g");
  const int64_t H = k.size(1), K = k.size(2);
  const std::string name = channels ? "kimi_delta_attention" : "gated_delta_net";
  const auto decay = [&](int64_t t) {  // [H, 1, 1 or K]
    if (!channels) return state.rows(0, "gated_delta_net.g", T)[0][t].to(at::kDouble).exp().view({H, 1, 1});
    const auto of = [&](const char* parameter) { return m.parameter(std::string("layers.0.mixer.kimi_delta_attention.") + parameter).to(at::kDouble); };
    const at::Tensor f = state.rows(0, "kimi_delta_attention.f", T)[0][t].to(at::kDouble);  // [V]
    const at::Tensor step = (at::matmul(of("f_up_proj.weight"), f) + of("dt_bias")).exp().log1p().view({H, 1, K});
    return (-of("A_log").exp().view({H, 1, 1}) * step).exp();
  };
  at::Tensor S = at::zeros({H, v.size(2), k.size(2)}, at::kDouble);
  std::vector<double> out;
  for (int64_t t = 0; t < T; ++t) {
    if (delta) {
      const at::Tensor unit = k[t] * (k[t].square().sum(-1, true) + 1e-6).rsqrt();
      const at::Tensor b = state.rows(0, name + ".beta", T)[0][t].to(at::kDouble);
      S = S * decay(t);
      const at::Tensor error = v[t] - at::matmul(S, unit.unsqueeze(-1)).squeeze(-1);
      S = S + (b.view({H, 1}) * error).unsqueeze(-1) * unit.unsqueeze(1);
      out.push_back((error.square().sum() / v[t].square().sum()).item<double>());
      continue;
    }
    const at::Tensor bias = m.parameter("layers.0.mixer.mamba2.dt_bias").to(at::kDouble), A = -m.parameter("layers.0.mixer.mamba2.A_log").to(at::kDouble).exp();
    const at::Tensor dt = (state.rows(0, "mamba2.dt", T)[0][t].to(at::kDouble) + bias).exp().log1p();
    S = S * (dt * A).exp().view({H, 1, 1});
    const at::Tensor p = at::matmul(S, k[t].unsqueeze(-1)).squeeze(-1);
    S = S + dt.view({H, 1, 1}) * v[t].unsqueeze(-1) * k[t].unsqueeze(1);
    const double norms = (p.norm() * v[t].norm()).item<double>();
    out.push_back(1 - (norms > 0 ? (p * v[t]).sum().item<double>() / norms : 0));
  }
  return out;
}

TEST(Surprise, IsThePredictionsError) {
  for (const char* linear : {"gated_delta_net", "kimi_delta_attention", "mamba2"}) {
    ModelConfig c = small({{linear, "attention"}});
    c.num_layers = 1;
    const auto m = make(c);
    CounterRng rng(3);
    at::Tensor ids = random_ids(rng, 1, 60, c.vocab_size);
    ids.narrow(1, 30, 30).copy_(ids.narrow(1, 0, 30));  // what was seen before
    const auto scores = token_surprise(*m, ids);
    const auto expected = by_hand(*m, ids);
    // In float32 a write strength near 1 costs digits (delta_rule_surprise): of 1 up to 0.001, by the processor.
    for (size_t t = 0; t < scores.size(); ++t) EXPECT_NEAR(scores[t], expected[t], 4e-3 * std::max(1.0, expected[t])) << linear << " token " << t;
    EXPECT_NEAR(scores[0], 1, 4e-3) << "an empty state predicts nothing";
  }
}

TEST(Surprise, PackedDocumentsAreAlone) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}, {"mamba2"}});
  const auto m = make(c);
  CounterRng rng(4);
  const at::Tensor ids = random_ids(rng, 1, 50, c.vocab_size);
  const auto packed = token_surprise(*m, ids, at::tensor({0, 20, 50}, at::kInt));
  const auto first = token_surprise(*m, ids.narrow(1, 0, 20)), second = token_surprise(*m, ids.narrow(1, 20, 30));
  for (size_t t = 0; t < 50; ++t) EXPECT_NEAR(packed[t], t < 20 ? first[t] : second[t - 20], 1e-3 * std::max(1.0F, packed[t]));
}

TEST(Surprise, AModelWithoutAPredictorSaysSo) {
  ModelConfig c = small({{"attention"}});
  const auto m = make(c);
  CounterRng rng(5);
  try {
    (void)token_surprise(*m, random_ids(rng, 1, 5, c.vocab_size));
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), ::testing::HasSubstr("the model's mixers are attention: none of them predicts values"));
  }
}

}  // namespace
}  // namespace oryx
