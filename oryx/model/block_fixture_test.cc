// Whole tiny models against the golden values: logits, hidden states, loss, every parameter's gradient, and decoding traces.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/model/language_model.h"
#include "oryx/ops/rope/rope.h"
#include "tests/support/fixtures.h"

namespace oryx {
namespace {

using test::Fixture;

constexpr double kOutputs = 5e-5, kGradients = 3e-4;

std::string linear_mixer(const Fixture& f) { return f.attrs.at("variant") == "gdn" ? "gated_delta_net" : "mamba2"; }

ModelConfig config_of(const Fixture& f) {
  const auto& a = f.attrs;
  ModelConfig c;
  c.vocab_size = a.at("vocab");
  c.num_layers = a.at("layers");
  c.tie_word_embeddings = a.at("tied");
  c.layer.hidden_size = a.at("D");
  c.layer.num_heads = a.at("H");
  c.layer.head_dim = a.at("dk");
  c.layer.value_head_dim = a.at("dv");
  c.layer.intermediate_size = a.at("F");
  c.layer.norm_eps = a.at("eps");
  c.layer.rope_theta = a.at("rope_theta");
  c.layer.query_conv = true;
  c.layer_mixers = {{linear_mixer(f), "attention"}};
  return c;
}

// The fixtures' name of one of our parameters.
std::string fixture_name(const Fixture& f, std::string ours) {
  const std::string linear = linear_mixer(f);
  const std::vector<std::pair<std::string, std::string>> renames = {
      {"attention.q_proj", "qa_proj"}, {linear + ".q_proj", "ql_proj"}, {linear + ".q_conv", "ql_conv"}, {linear + ".", ""}};
  for (const auto& [from, to] : renames) {
    const auto at = ours.find(from);
    if (at != std::string::npos) return ours.replace(at, from.size(), to);
  }
  return ours;
}

std::unique_ptr<LanguageModel> model_of(const Fixture& run) {
  const Fixture params = test::load_fixture(test::fixture_folder() / "block" / run.attrs.at("params").get<std::string>());
  auto model = std::make_unique<LanguageModel>(config_of(params));
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < model->specs().size(); ++i) {
    at::Tensor p = model->parameters()[i];
    p.copy_(params.at(fixture_name(params, model->specs()[i].name)));
  }
  model->to(run.device);
  return model;
}

// modes [B, T], 1 = attention.
std::shared_ptr<const Routing> routing_of(const Fixture& f, const at::Tensor& modes) {
  std::vector<RoutedSpan> spans;
  const auto m = modes.to(at::kInt).contiguous();
  const int64_t B = m.size(0), T = m.size(1);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < T; ++t) {
      const int32_t mode = m[b][t].item<int32_t>();
      const bool joins = t > 0 && spans.back().mixer == mode;
      if (joins) {
        spans.back().end++;
      } else {
        spans.push_back({static_cast<int32_t>(b), static_cast<int32_t>(t), static_cast<int32_t>(t + 1), mode});
      }
    }
  }
  return std::make_shared<Routing>(B, T, std::vector<std::string>{linear_mixer(f), "attention"}, spans);
}

TEST(BlockFixture, ForwardLossAndGradients) {
  ORYX_REQUIRE_FIXTURES();
  for (const Fixture& f : test::fixtures("block", "block_run")) {
    SCOPED_TRACE(f.name);
    auto model = model_of(f);
    for (const bool checkpointed : {false, true}) {
      model->requires_grad(false);
      for (at::Tensor p : model->parameters()) p.mutable_grad() = at::Tensor();
      model->requires_grad(true);
      ModelInput in;
      in.input_ids = f.at("input_ids").to(at::kLong);
      if (f.has("cu_seqlens")) in.cu_seqlens = f.at("cu_seqlens");
      in.routing = {routing_of(f, f.at("modes"))};
      in.checkpoint_layers = checkpointed;
      in.tap = [&](std::string_view what, int64_t layer, const at::Tensor& x) {
        EXPECT_LT(test::fixture_error(x, f.at(fmt::format("{}.{}", what, layer))), f.limit(fmt::format("{}.{}", what, layer), kOutputs)) << what << layer;
      };
      const at::Tensor h = model->hidden(in);
      EXPECT_LT(test::fixture_error(model->logits(h), f.at("logits")), f.limit("logits", kOutputs));
      const at::Tensor loss = model->loss(h, f.at("targets")).loss;
      EXPECT_LT(test::fixture_error(loss, f.at("loss")), f.limit("loss", kOutputs));
      torch::autograd::backward({loss}, {});
      for (size_t i = 0; i < model->specs().size(); ++i) {
        const auto& name = model->specs()[i].name;
        const std::string golden = "d_" + fixture_name(f, name);
        const at::Tensor want = f.at(golden);
        const at::Tensor grad = model->parameters()[i].grad();
        if (want.abs().max().item<float>() == 0) {
          EXPECT_TRUE(!grad.defined() || grad.abs().max().item<float>() == 0) << name;
        } else {
          EXPECT_LT(test::fixture_error(grad, want), f.limit(golden, kGradients)) << name;
        }
      }
    }
  }
}

TEST(BlockFixture, DecodingTrace) {
  ORYX_REQUIRE_FIXTURES();
  for (const Fixture& f : test::fixtures("block", "block_trace")) {
    SCOPED_TRACE(f.name);
    at::NoGradGuard no_grad;
    const auto model = model_of(f);
    const std::string linear = linear_mixer(f);
    const at::Tensor ids = f.at("input_ids").to(at::kLong), modes = f.at("modes");
    const int64_t T = ids.size(1);
    State state = model->make_state(1);
    for (int64_t t = 0; t < T; ++t) {
      ModelInput in;
      in.input_ids = ids.narrow(1, t, 1);
      in.routing = {routing_of(f, modes.narrow(1, t, 1))};
      in.state = &state;
      const at::Tensor logits = model->logits(model->hidden(in));
      EXPECT_LT(test::fixture_error(logits[0][0], f.at("logits")[t]), kOutputs) << t;
      for (int64_t i = 0; i < model->config().num_layers; ++i) {
        const auto& layer = state.layer(i);
        auto check = [&](const std::string& slot, const std::string& name) {
          EXPECT_LT(test::fixture_error(layer.tensor(slot)[0], f.at(fmt::format("{}.{}", name, i))[t]), kOutputs) << name << i << " after " << t;
        };
        check(linear + ".S", "recurrent");
        check("k_conv", "k_conv");
        check("v_conv", "v_conv");
        check(linear + ".q_conv", "ql_conv");
      }
    }
    for (int64_t i = 0; i < model->config().num_layers; ++i) {
      // The cache holds keys before RoPE, the golden values after.
      const at::Tensor keys = state.rows(i, "keys", T);
      const at::Tensor rotated = ops::rope(keys, ops::sequence_positions(1, T), model->config().layer.rope_theta);
      EXPECT_LT(test::fixture_error(rotated[0], f.at(fmt::format("rotated_keys.{}", i))), kOutputs);
      EXPECT_LT(test::fixture_error(state.rows(i, "values", T)[0], f.at(fmt::format("values.{}", i))), kOutputs);
    }
  }
}

}  // namespace
}  // namespace oryx
