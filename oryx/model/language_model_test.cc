// Properties of whole models: any split, any packing and token-by-token decoding give the parallel form's answer, for every row of the
// paper's table and under any modes.
#include "oryx/model/language_model.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/model/inspect.h"
#include "oryx/model/scheduling.h"
#include "oryx/model/test_support.h"
#include "tests/support/fixtures.h"

namespace oryx {
namespace {

constexpr double kTolerance = 2e-5;  // float32, two or three small layers, different orders of summation

using namespace test;

class EveryModel : public ::testing::TestWithParam<Case> {};

TEST_P(EveryModel, AnySplitEqualsTheWhole) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(11);
  const int64_t B = 2, T = 83;
  const at::Tensor ids = random_ids(rng, B, T, c.vocab_size);
  const auto modes = random_modes(rng, B, T, c.mixers().size());
  const at::Tensor whole = run(*m, ids, routing(c, modes, 0, T));
  // Pieces of many tokens, of one, and of fewer than the convolution's width.
  const std::vector<std::vector<int64_t>> splits = {{0, 70, 71, 73, 83}, {0, 1, 2, 5, 64, 65, 83}, {0, 83}};
  for (const auto& cuts : splits) {
    State state = m->make_state(B);
    std::vector<at::Tensor> pieces;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      pieces.push_back(run(*m, ids.narrow(1, cuts[i], cuts[i + 1] - cuts[i]), routing(c, modes, cuts[i], cuts[i + 1]), &state));
    }
    EXPECT_LT(test::fixture_error(at::cat(pieces, 1), whole), kTolerance);
    EXPECT_EQ(state.bytes().total(), 2 * state_bytes(c, T).total());
  }
  State state = m->make_state(B);
  std::vector<at::Tensor> tokens;
  for (int64_t t = 0; t < T; ++t) tokens.push_back(run(*m, ids.narrow(1, t, 1), routing(c, modes, t, t + 1), &state));
  EXPECT_LT(test::fixture_error(at::cat(tokens, 1), whole), kTolerance) << "token by token";
}

TEST_P(EveryModel, PackedEqualsAlone) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(12);
  const std::vector<int64_t> lengths = {5, 1, 40, 2, 33};
  std::vector<int32_t> cu{0};
  for (const int64_t n : lengths) cu.push_back(cu.back() + static_cast<int32_t>(n));
  const int64_t T = cu.back();
  const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size);
  const auto modes = random_modes(rng, 1, T, c.mixers().size());
  const at::Tensor bounds = at::tensor(cu, at::kInt);
  const at::Tensor packed = run(*m, ids, routing(c, modes, 0, T), nullptr, bounds);
  State together = m->make_state(static_cast<int64_t>(lengths.size()));
  EXPECT_LT(test::fixture_error(run(*m, ids, routing(c, modes, 0, T), &together, bounds), packed), kTolerance);
  // Both halves continue: packed again, with pasts of different lengths.
  const at::Tensor again = run(*m, ids, routing(c, modes, 0, T), &together, bounds);
  for (size_t n = 0; n < lengths.size(); ++n) {
    const at::Tensor mine = ids.narrow(1, cu[n], lengths[n]);
    State alone = m->make_state(1);
    const auto r = routing(c, modes, cu[n], cu[n + 1]);
    EXPECT_LT(test::fixture_error(run(*m, mine, r, &alone), packed.narrow(1, cu[n], lengths[n])), kTolerance);
    EXPECT_LT(test::fixture_error(run(*m, mine, r, &alone), again.narrow(1, cu[n], lengths[n])), kTolerance);
  }
}

TEST_P(EveryModel, CheckpointedGradientsAreTheSame) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(13);
  const at::Tensor ids = random_ids(rng, 2, 40, c.vocab_size);
  const auto r = routing(c, random_modes(rng, 2, 40, c.mixers().size()), 0, 40);
  m->requires_grad(true);
  std::vector<at::Tensor> first;
  for (const bool checkpointed : {false, true}) {
    ModelInput in;
    in.input_ids = ids;
    in.routing = {r};
    in.checkpoint_layers = checkpointed;
    torch::autograd::backward({m->loss(m->hidden(in), ids.roll(-1, 1)).loss}, {});
    for (size_t i = 0; i < m->parameters().size(); ++i) {
      at::Tensor p = m->parameters()[i];
      const at::Tensor g = p.grad().defined() ? p.grad().clone() : at::zeros_like(p);
      p.mutable_grad() = at::Tensor();
      if (checkpointed) {
        EXPECT_TRUE(at::equal(g, first[i])) << m->specs()[i].name;
      } else {
        first.push_back(g);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, EveryModel, ::testing::ValuesIn(cases()), [](const auto& info) { return info.param.name; });

TEST(LanguageModel, PresetTotals) {
  EXPECT_NEAR(static_cast<double>(count_parameters(preset("130m"))), 124e6, 1e6);
  EXPECT_NEAR(static_cast<double>(count_parameters(preset("380m"))), 388e6, 2e6);
  EXPECT_NEAR(static_cast<double>(count_parameters(preset("810m"))), 843e6, 4e6);
  EXPECT_NEAR(static_cast<double>(count_parameters(preset("1.4b"))), 1.47e9, 1e7);
}

TEST(LanguageModel, SharedShareAtTheLargestShape) {
  const auto r = report_parameters(preset("1.4b"));
  for (const auto& mode : r.modes) EXPECT_GT(mode.shared_share(), 0.92) << mode.mixer;
}

TEST(LanguageModel, MatchedBaselinesAreWithinOnePercent) {
  const auto total = static_cast<double>(count_parameters(preset("130m")));
  for (const auto& variant : preset_variants()) {
    const auto n = static_cast<double>(count_parameters(matched(preset("130m-" + variant), static_cast<int64_t>(total))));
    EXPECT_NEAR(n / total, 1, 0.01) << variant;
  }
}

TEST(LanguageModel, TransformerPresetIsALlama) {
  // Embedding + layers x (4 D^2 + 3 D F + 2 D) + D.
  const int64_t D = 768, F = 2048;
  EXPECT_EQ(count_parameters(preset("130m-transformer")), 32000 * D + 12 * (4 * D * D + 3 * D * F + 2 * D) + D);
}

// `linear` and what a schedule leaves open is each layer's own first mixer.
TEST(LanguageModel, LinearIsEachLayersFirstMixer) {
  const ModelConfig c = small({{"gated_delta_net", "mamba2"}, {"mamba2", "gated_delta_net"}, {"mamba2", "attention"}});
  const ModePiece piece{.row = 0, .column = 0, .length = 8, .start = 0, .context = {.prompt_length = 8}};
  auto first_mixer_tokens = [&](const std::string& text) {
    const auto routings = ModelSchedule(c, text).route({piece}, 1, 8);
    std::vector<int64_t> counts;
    for (int64_t i = 0; i < 3; ++i) counts.push_back(routings[routings.size() == 1 ? 0 : static_cast<size_t>(i)]->tokens(c.mixers_of(i), 0).count);
    return counts;
  };
  EXPECT_EQ(first_mixer_tokens("linear"), (std::vector<int64_t>{8, 8, 8}));
  EXPECT_EQ(first_mixer_tokens(""), (std::vector<int64_t>{8, 8, 8}));
  EXPECT_EQ(first_mixer_tokens("linear,attention@6:"), (std::vector<int64_t>{8, 8, 6}));
  EXPECT_EQ(first_mixer_tokens("gated_delta_net@:3"), (std::vector<int64_t>{8, 5, 8}));
  EXPECT_THROW(ModelSchedule(c, "sliding_window"), Error);
}

TEST(LanguageModel, KeysAndValuesOfAMixersOwnAreMadeAtEveryToken) {
  ModelConfig c = small({{"gated_delta_net", "attention"}});
  c.layer.query_conv = true;
  const double shared = token_flops(c, "gated_delta_net", 1);
  c.layer.share_kv = false;
  const LayerConfig& l = c.layer;
  const auto widths = static_cast<double>(l.key_width() + l.value_width());
  EXPECT_EQ(token_flops(c, "gated_delta_net", 1) - shared, 3 * 2 * widths * static_cast<double>(l.hidden_size + l.conv_kernel));
}

TEST(LanguageModel, RefusesEmptyBatchesAndGradientsThroughAState) {
  LanguageModel model(small({{"gated_delta_net", "attention"}}));
  ModelInput input;
  input.routing = {std::make_shared<Routing>(1, 1, "attention")};
  input.input_ids = at::zeros({1, 0}, at::kLong);
  EXPECT_THROW(model.hidden(input), c10::Error);
  input.input_ids = at::zeros({1, 1}, at::kLong);
  State state = model.make_state(1);
  input.state = &state;
  model.requires_grad(true);
  EXPECT_THROW(model.hidden(input), c10::Error);
  const at::NoGradGuard no_grad;
  EXPECT_EQ(model.hidden(input).size(1), 1);
  EXPECT_THROW(LanguageModel(small({{"mamba2"}}), at::kDouble, at::kDouble).make_state(1), c10::Error);
}

// Without gradients the feed-forward takes a long row in blocks.
TEST(LanguageModel, LongRowsWithoutGradientsAreTheSame) {
  ModelConfig c = small({{"gated_delta_net"}});
  c.num_layers = 1;
  LanguageModel model(c);
  model.initialize(3);
  ModelInput input;
  input.input_ids = at::arange(2 * 2500, at::kLong).remainder(c.vocab_size).view({2, 2500});
  input.routing = {std::make_shared<Routing>(2, 2500, "gated_delta_net")};
  const at::Tensor whole = model.hidden(input);
  const at::NoGradGuard no_grad;
  const at::Tensor blocks = model.hidden(input);
  EXPECT_LT((blocks - whole).abs().max().item<double>(), 1e-5 * whole.abs().max().item<double>());
}

TEST(LanguageModel, RefusesForeignTokens) {
  const auto m = make(small({{"attention"}}));
  const auto r = std::make_shared<Routing>(1, 3, "attention");
  EXPECT_THROW(run(*m, at::tensor({1, 61, 2}, at::kLong).view({1, 3}), r), Error);
  EXPECT_THROW(run(*m, at::tensor({1, -1, 2}, at::kLong).view({1, 3}), r), Error);
}

TEST(LanguageModel, InitialisationIsAFunctionOfTheSeed) {
  LanguageModel a(small({{"gated_delta_net", "attention"}})), b(a.config()), other(a.config());
  a.initialize(1);
  b.initialize(1);
  other.initialize(2);
  for (size_t i = 0; i < a.parameters().size(); ++i) EXPECT_TRUE(at::equal(a.parameters()[i], b.parameters()[i]));
  EXPECT_FALSE(at::equal(a.parameter("embed.weight"), other.parameter("embed.weight")));
}

}  // namespace
}  // namespace oryx
