// Captured decoding against the generic way from the same state: logits, every slot of the state, texts. And, without a GPU, which models it knows.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "oryx/generate/captured_weights.h"
#include "oryx/generate/fused_decoder.h"
#include "oryx/generate/session.h"
#include "oryx/generate/test_support.h"
#include "oryx/model/checkpoint.h"
#include "oryx/model/hf/convert.h"
#include "tests/support/fixtures.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using Lists = std::vector<std::vector<std::string>>;

ModelConfig captured_config(const Lists& mixers, int64_t heads = 3, int64_t dim = 64) {
  ModelConfig c;
  c.vocab_size = 320, c.num_layers = 2, c.layer_mixers = mixers;
  c.layer.hidden_size = 192, c.layer.num_heads = heads, c.layer.head_dim = dim, c.layer.intermediate_size = 224, c.layer.window = 9;
  return c;
}

std::string captured_refusal(const ModelConfig& c, at::ScalarType compute = at::kBFloat16) {
  c.validate();
  return captured::refusal(LanguageModel(c, compute));
}

TEST(CapturedDecoder, KnowsTheModelsItSaysItKnows) {
  for (const Lists& lists : {Lists{{"gated_delta_net", "attention"}}, Lists{{"mamba2", "sliding_window", "attention"}}, Lists{{"attention"}}, Lists{{"gated_delta_net"}, {"kimi_delta_attention"}}}) {
    EXPECT_EQ(captured_refusal(captured_config(lists)), "");
  }
  EXPECT_EQ(captured_refusal(captured_config({{"gated_delta_net"}}), at::kFloat), "activations are not bfloat16 (--precision bfloat16)");
  ModelConfig c = captured_config({{"gated_delta_net", "attention"}});
  c.layer.qk_norm = true, c.layer.norm_placement = "after", c.layer.share_kv = false;
  EXPECT_EQ(captured_refusal(c), "");
  c = captured_config({{"mamba2"}});
  c.layer.hidden_size = 200;
  EXPECT_EQ(captured_refusal(c), "layer 0: hidden_size 200, expected a multiple of 32");
  EXPECT_EQ(captured::refusal(StateOptions{.bound = {4, 16}}), "");
  StateOptions chosen{.bound = {4, 16}};
  chosen.kept.by = "write", chosen.kept.budget = 8;
  EXPECT_EQ(captured::refusal(chosen), "the state keeps rows by choice, which the host makes");
  EXPECT_EQ(captured::refusal(StateOptions{.ring = 2}), "the state keeps a ring of convolution inputs");
}

// Where the products of a plan find what: keys and values of each mixer where they share none, norms in front or behind.
TEST(CapturedDecoder, PlansHoldWhatLayersHave) {
  const at::NoGradGuard no_grad;
  ModelConfig c = captured_config({{"gated_delta_net", "attention"}});
  c.layer.share_kv = false, c.layer.norm_placement = "after", c.layer.residual_multiplier = 0.5, c.layer.qk_norm = true, c.layer.zero_centred_norm = true;
  LanguageModel model(c, at::kBFloat16);
  model.initialize(1);
  const captured::Plan plan = captured::make_plan(model);
  const captured::LayerPlan& l = plan.layers[1];
  ASSERT_EQ(l.groups.size(), 2u);
  EXPECT_EQ(l.groups[0].prefix, "gated_delta_net.");
  EXPECT_EQ(l.mixers[1].group, 1u);
  std::vector<int64_t> columns = {l.groups[0].keys, l.groups[0].values, l.groups[1].keys, l.groups[1].values, l.gate, l.mixers[0].query, l.mixers[1].query};
  for (const int64_t column : columns) EXPECT_EQ(column % 32, 0);
  std::sort(columns.begin(), columns.end());
  EXPECT_EQ(std::unique(columns.begin(), columns.end()), columns.end());
  EXPECT_EQ(l.optional, l.mixers[1].query);
  EXPECT_TRUE(l.norms_behind);
  EXPECT_TRUE(at::equal(l.norm1, (model.parameter("layers.1.norm1.weight") + 1) * 0.5));
  EXPECT_TRUE(at::equal(l.mixers[1].k_norm, model.parameter("layers.1.mixer.attention.k_norm.weight") + 1));
  EXPECT_FALSE(l.mixers[0].k_norm.defined());
}

// Models of every family that is imported, as published code computes them: each is one that captured decoding knows, and on a GPU it decodes what that code gives.
TEST(FixtureCapturedDecoder, DecodesEveryPublishedFamily) {
  ORYX_REQUIRE_FIXTURES();
  const at::NoGradGuard no_grad;
  int64_t models = 0;
  for (const auto& entry : std::filesystem::directory_iterator(test::fixture_folder() / "models")) {
    if (!std::filesystem::exists(entry.path() / "expected.safetensors")) continue;
    SCOPED_TRACE(entry.path().filename());
    const test::TemporaryFolder out;
    import_checkpoint(entry.path(), out / "model");
    const auto model = load_model(out / "model", at::kBFloat16);
    const ModelConfig& c = model->config();
    if (c.layer.hidden_size % 32 != 0) continue;  // none that is published
    EXPECT_EQ(captured::refusal(*model), "");
    ++models;
    if (!at::hasCUDA() || at::getNumGPUs() == 0) continue;
    model->to(at::kCUDA);
    const test::Fixture f = test::load_fixture(entry.path() / "expected");
    const at::Tensor ids = f.at("input_ids").to(at::kLong);  // [N, T]
    const int64_t N = ids.size(0), T = ids.size(1), prompt = std::max<int64_t>(f.attrs.at("prefill").get<int64_t>(), 5);
    State state = model->make_state(N);
    state.reserve(T);
    ModelInput input;
    input.input_ids = ids.narrow(1, 0, prompt);
    input.routing = {std::make_shared<Routing>(N, prompt, c.mixers().front())};
    input.state = &state;
    (void)model->hidden(input);
    std::string why;
    const auto decoder = make_fused_decoder(*model, state, T, &why);
    ASSERT_NE(decoder, nullptr) << why;
    std::vector<at::Tensor> logits;
    for (int64_t t = prompt; t < T; ++t) {
      const at::Tensor column = ids.select(1, t).to(at::kInt).contiguous();
      const std::vector<int32_t> next(column.const_data_ptr<int32_t>(), column.const_data_ptr<int32_t>() + N);
      logits.push_back(decoder->step(next, {std::make_shared<Routing>(N, 1, c.mixers().front())}).cpu());
    }
    EXPECT_LT(test::norm_error(at::stack(logits, 1), f.at("logits").narrow(1, prompt, T - prompt)), 0.05);
  }
  EXPECT_GT(models, 8);
}

class CapturedDecoderCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  }
};

// Biases and what is zero at first say something.
void stir(const LanguageModel& model) {
  for (size_t i = 0; i < model.specs().size(); ++i) {
    at::Tensor p = model.parameters()[i];
    if (model.specs()[i].init == Init::kZeros || model.specs()[i].init == Init::kOnes) p.add_(at::randn_like(p) * 0.1);
  }
}

struct CapturedRun {
  StateOptions state = {};
  int64_t prompt = 37, steps = 6;
};

// Sequences of different lengths in modes of their own, which change from token to token; in steps other than each `every`-th one all are in their layers' first.
void expect_generic(const ModelConfig& config, int64_t N, int64_t every = 1, const CapturedRun& run = {}) {
  config.validate();
  const at::NoGradGuard no_grad;
  at::manual_seed(3);
  LanguageModel model(config, at::kBFloat16);
  model.initialize(1);
  stir(model);
  model.to(at::kCUDA);
  std::vector<std::string> mixers;
  for (const auto& names : config.layer_mixers) {
    for (const auto& name : names) {
      if (std::find(mixers.begin(), mixers.end(), name) == mixers.end()) mixers.push_back(name);
    }
  }
  const int64_t kPrompt = run.prompt, kSteps = run.steps;
  State generic = model.make_state(N, run.state), own = model.make_state(N, run.state);
  generic.reserve(kPrompt + N + kSteps), own.reserve(kPrompt + N + kSteps);
  ModelInput prompt;
  std::vector<int32_t> bounds{0};
  for (int64_t n = 0; n < N; ++n) bounds.push_back(bounds.back() + static_cast<int32_t>(kPrompt + (n * 5) % N));
  prompt.input_ids = at::randint(config.vocab_size, {1, bounds.back()}, at::kLong);
  prompt.cu_seqlens = at::tensor(bounds, at::kInt);
  prompt.routing = {std::make_shared<Routing>(1, bounds.back(), mixers[0])};
  for (State* s : {&generic, &own}) {
    prompt.state = s;
    (void)model.hidden(prompt);
  }
  std::string why;
  const auto decoder = make_fused_decoder(model, own, kPrompt + N + kSteps, &why, /*hidden=*/true);
  ASSERT_NE(decoder, nullptr) << why;
  const auto slots = LanguageModel::slots(config, at::kBFloat16);
  for (int64_t t = 0; t < kSteps; ++t) {
    std::vector<RoutedSpan> spans;
    std::vector<int32_t> ids;
    for (int64_t n = 0; n < N; ++n) {
      spans.push_back({static_cast<int32_t>(n), 0, 1, static_cast<int32_t>(t % every == 0 ? (n + t) % static_cast<int64_t>(mixers.size()) : 0)});
      ids.push_back(static_cast<int32_t>((31 * n + 7 * t) % config.vocab_size));
    }
    ModelInput input;
    input.input_ids = at::tensor(ids, at::kInt).to(at::kLong).view({N, 1});
    input.routing = {std::make_shared<Routing>(N, 1, mixers, spans)};
    input.state = &generic;
    const at::Tensor hidden = model.hidden(input), expected = model.logits(hidden).squeeze(1);
    ASSERT_TRUE(decoder->fits());
    const at::Tensor logits = decoder->step(ids, input.routing);
    EXPECT_LT(test::norm_error(decoder->hidden(), hidden.squeeze(1)), 3e-2) << "step " << t;
    ASSERT_EQ(logits.sizes(), expected.sizes());
    EXPECT_LT(test::norm_error(logits, expected), 3e-2) << "step " << t;
    const at::Tensor likeliest = decoder->likeliest().to(at::kLong);
    EXPECT_TRUE(at::equal(likeliest, logits.to(at::kFloat).argmax(-1))) << "step " << t;
    // The same token, but where logits lie closer than the noise.
    const at::Tensor wide = expected.to(at::kFloat), behind = std::get<0>(wide.max(1)) - wide.gather(1, likeliest.unsqueeze(1)).squeeze(1);
    EXPECT_LT((behind / wide.std(1)).max().item<double>(), 0.1) << "step " << t;
    ASSERT_EQ(own.lengths(), generic.lengths());
    for (size_t i = 0; i < slots.size(); ++i) {
      for (const SlotSpec& slot : slots[i]) {
        const auto layer = static_cast<int64_t>(i);
        if (slot.kind != SlotKind::kPerToken) {
          EXPECT_LT(test::norm_error(own.layer(layer).tensor(slot.name), generic.layer(layer).tensor(slot.name)), 3e-2) << slot.name << " of layer " << i << ", step " << t;
          continue;
        }
        const std::vector<int64_t> begins = own.rows_from();
        ASSERT_EQ(begins, generic.rows_from());
        const at::Tensor a = own.rows(layer, slot.name, begins, own.lengths()), b = generic.rows(layer, slot.name, begins, own.lengths());
        for (int64_t n = 0; n < N; ++n) {
          const int64_t length = own.lengths()[static_cast<size_t>(n)] - begins[static_cast<size_t>(n)];
          EXPECT_LT(test::norm_error(a[n].narrow(0, 0, length), b[n].narrow(0, 0, length)), 3e-2) << slot.name << " of layer " << i << ", sequence " << n << ", step " << t;
        }
      }
    }
  }
}

TEST_F(CapturedDecoderCuda, HeadsOf64EqualGeneric) { expect_generic(captured_config({{"gated_delta_net", "attention"}}), 5); }
TEST_F(CapturedDecoderCuda, OneSequenceEqualsGeneric) { expect_generic(captured_config({{"gated_delta_net", "attention"}}), 1, 2); }
TEST_F(CapturedDecoderCuda, ManySequencesEqualGeneric) { expect_generic(captured_config({{"mamba2", "attention"}}), 64, 3); }
TEST_F(CapturedDecoderCuda, Mamba2OfHeads128EqualsGeneric) { expect_generic(captured_config({{"mamba2", "attention"}}, 2, 128), 3, 2); }
TEST_F(CapturedDecoderCuda, GatedDeltaOfHeads128EqualsGeneric) {
  ModelConfig c = captured_config({{"gated_delta_net", "attention"}}, 2, 128);
  c.layer.query_conv = true;
  expect_generic(c, 4, 3);
}
TEST_F(CapturedDecoderCuda, ThreeMixersEqualGeneric) { expect_generic(captured_config({{"gated_delta_net", "sliding_window", "attention"}, {"mamba2", "gated_delta_net", "attention"}}), 9); }
TEST_F(CapturedDecoderCuda, LayersOfDifferentMixersEqualGeneric) { expect_generic(captured_config({{"gated_delta_net"}, {"attention"}}), 12, 2); }
TEST_F(CapturedDecoderCuda, MeanOfMixersEqualsGeneric) {
  ModelConfig c = captured_config({{"gated_delta_net", "attention"}});
  c.layer.combine = "mean";
  expect_generic(c, 2);
}
TEST_F(CapturedDecoderCuda, TransformerEqualsGeneric) {
  ModelConfig c = captured_config({{"attention"}});
  c.layer.conv = c.layer.gate = c.layer.head_norm = false;
  expect_generic(c, 1);
  c.layer.num_heads = 8, c.layer.num_kv_heads = 2, c.layer.head_dim = 32, c.layer.rotary_dim = 16, c.tie_word_embeddings = false;  // heads that the general kernel alone knows
  expect_generic(c, 7);
}
TEST_F(CapturedDecoderCuda, LinearModelsEqualGeneric) {
  ModelConfig c = captured_config({{"gated_delta_net"}});
  c.layer.query_conv = true;
  expect_generic(c, 1);
  c.layer_mixers = {{"mamba2"}};
  expect_generic(c, 17);
}
TEST_F(CapturedDecoderCuda, KimiDeltaAttentionEqualsGeneric) {
  ModelConfig c = captured_config({{"kimi_delta_attention", "attention"}});
  c.layer.gate_activation = "sigmoid";
  expect_generic(c, 5);
  c.layer.head_dim = 48, c.layer.allow_neg_eigval = c.layer.query_conv = true;  // the plain step's kernel
  expect_generic(c, 2);
}
// What published models and odd sizes bring: biases, other taps, groups, another order of norm and gate, multipliers.
TEST_F(CapturedDecoderCuda, OtherLayersEqualGeneric) {
  ModelConfig c = captured_config({{"mamba2"}}, 4);
  c.vocab_size = 325, c.embedding_multiplier = 3, c.logits_scaling = 2;
  c.layer.intermediate_size = 0, c.layer.query_conv = c.layer.conv_bias = true, c.layer.num_kv_heads = 2, c.layer.num_value_heads = 4, c.layer.conv_kernel = 3;
  c.layer.gated_norm_order = "gate_first", c.layer.head_norm_groups = 2, c.layer.residual_multiplier = 0.5;
  expect_generic(c, 3);
  c = captured_config({{"gated_delta_net", "attention"}}, 4, 32);
  c.layer.num_kv_heads = 2, c.layer.intermediate_size = 210, c.layer.gate_activation = "sigmoid", c.layer.zero_centred_norm = true, c.layer.allow_neg_eigval = true, c.layer.conv_kernel = 5;
  expect_generic(c, 5);
  c.layer.share_query = true, c.layer.gate_activation = "silu", c.layer.gate = false, c.layer.conv_kernel = 4;
  expect_generic(c, 2, 2);
}

// What imported models bring: norms of queries and keys, by head or over all (the second in layers whose norms stand behind, beside others), wide heads turned in part, keys of their own.
TEST_F(CapturedDecoderCuda, QueryAndKeyNormsEqualGeneric) {
  ModelConfig c = captured_config({{"gated_delta_net", "attention"}}, 4);
  c.layer.qk_norm = true;
  expect_generic(c, 3, 2);
  c.layer.num_kv_heads = 2, c.layer.qk_norm_over = "all_heads";
  expect_generic(c, 5, 2);
  c = captured_config({{"attention"}}, 8, 256);
  c.layer.num_kv_heads = 1, c.layer.rotary_dim = 64, c.layer.gate_activation = "sigmoid", c.layer.qk_norm = c.layer.zero_centred_norm = true, c.layer.conv = c.layer.head_norm = false;
  expect_generic(c, 2);
  c = captured_config({{"sliding_window", "attention"}}, 2, 36);
  c.layer.qk_norm = true, c.layer.rope_theta = 0;
  expect_generic(c, 2);
}
TEST_F(CapturedDecoderCuda, NormsBehindEqualGeneric) {
  ModelConfig c = captured_config({{"mamba2", "attention"}});
  c.layer.norm_placement = "after", c.layer.residual_multiplier = 0.5;
  expect_generic(c, 9, 2);
  c = captured_config({{"gated_delta_net"}, {"attention"}}, 4);  // as OLMo's hybrids: behind in the layers of attention alone
  c.num_layers = 4, c.layer_mixers = {{"gated_delta_net"}, {"attention"}, {"attention"}, {"gated_delta_net"}};
  c.layer_overrides["attention"] = {{"norm_placement", "after"}, {"qk_norm", true}, {"qk_norm_over", "all_heads"}, {"conv", false}, {"gate", false}, {"head_norm", false}};
  expect_generic(c, 3);
}
TEST_F(CapturedDecoderCuda, KeysOfTheirOwnEqualGeneric) {
  ModelConfig c = captured_config({{"gated_delta_net", "sliding_window", "attention"}, {"mamba2", "attention"}});
  c.layer.share_kv = false;
  expect_generic(c, 4);
  c.layer.conv_bias = c.layer.query_conv = true;
  expect_generic(c, 1, 2);
}

// A bounded state, over many pages and several moves of a window's rows to the front of their memory: the captures stay.
TEST_F(CapturedDecoderCuda, BoundedStatesEqualGeneric) {
  const auto bounded = [](int64_t first, int64_t window, int64_t back = 0) { return CapturedRun{.state = {.bound = {first, window, back}, .page_tokens = 4}, .prompt = 37, .steps = 40}; };
  expect_generic(captured_config({{"gated_delta_net", "attention"}}), 3, 2, bounded(6, 13));
  expect_generic(captured_config({{"mamba2", "attention"}}), 1, 1, bounded(0, 11));
  expect_generic(captured_config({{"gated_delta_net", "sliding_window", "attention"}}), 2, 1, bounded(3, 16, 9));
  ModelConfig c = captured_config({{"attention"}}, 4);
  c.layer.num_kv_heads = 2, c.layer.window = 30;
  expect_generic(c, 9, 1, bounded(21, 40));  // some texts are shorter than the bound at first
  c = captured_config({{"gated_delta_net", "attention"}}, 4, 48);
  c.layer.num_kv_heads = 2, c.layer.qk_norm = true, c.layer.qk_norm_over = "all_heads", c.layer.norm_placement = "after";
  expect_generic(c, 2, 2, bounded(6, 13));
  // The shape that the persistent kernel and the fused chain know goes through this one.
  expect_generic(captured_config({{"gated_delta_net", "attention"}}, 2, 128), 2, 2, {.state = {.bound = {4, 64}}, .prompt = 90, .steps = 20});
}

// A step that runs what the one before found likeliest is the step that is told so.
TEST_F(CapturedDecoderCuda, FeedsBack) {
  const at::NoGradGuard no_grad;
  LanguageModel model(captured_config({{"mamba2", "attention"}}), at::kBFloat16);
  model.initialize(1);
  model.to(at::kCUDA);
  State told = model.make_state(3), fed = model.make_state(3);
  told.reserve(8), fed.reserve(8);
  const auto a = make_fused_decoder(model, told, 8), b = make_fused_decoder(model, fed, 8);
  ASSERT_TRUE(a && b);
  b->feed_back(true, 300);
  a->feed_back(false, 300);
  const std::vector<std::shared_ptr<const Routing>> linear = {std::make_shared<Routing>(3, 1, "mamba2")}, attention = {std::make_shared<Routing>(3, 1, "attention")};
  std::vector<int32_t> ids = {5, 6, 7};
  for (int t = 0; t < 6; ++t) {
    const auto& routing = t % 2 == 0 ? linear : attention;
    const at::Tensor x = a->step(ids, routing).clone(), y = b->step(t == 0 ? ids : std::vector<int32_t>(), routing).clone();
    EXPECT_TRUE(at::equal(x, y)) << "step " << t;
    const at::Tensor next = a->likeliest().cpu();
    ids.assign(next.const_data_ptr<int32_t>(), next.const_data_ptr<int32_t>() + 3);
    EXPECT_LT(*std::max_element(ids.begin(), ids.end()), 300);
  }
}

TEST_F(CapturedDecoderCuda, GoesOnBehindTrimAndFork) {
  test::expect_goes_on_behind_trim_and_fork(captured_config({{"mamba2", "attention"}}));
  test::expect_goes_on_behind_trim_and_fork(captured_config({{"mamba2", "attention"}}), {.bound = {4, 12, 24}, .page_tokens = 4});
}

// Decoders of one model share its packed weights, until these are written.
TEST_F(CapturedDecoderCuda, WeightsArePackedOnce) {
  const at::NoGradGuard no_grad;
  LanguageModel model(captured_config({{"mamba2"}}), at::kBFloat16);
  model.initialize(1);
  model.to(at::kCUDA);
  State a = model.make_state(1), b = model.make_state(1), c = model.make_state(1);
  const std::vector<std::shared_ptr<const Routing>> routing = {std::make_shared<Routing>(1, 1, "mamba2")};
  const auto first = make_fused_decoder(model, a, 8), second = make_fused_decoder(model, b, 8);
  const at::Tensor x = first->step({5}, routing).clone(), y = second->step({5}, routing).clone();
  EXPECT_TRUE(at::equal(x, y));
  model.parameter("final_norm.weight").mul_(2);
  EXPECT_LT(test::norm_error(make_fused_decoder(model, c, 8)->step({5}, routing), x * 2), 1e-2);
}

TEST_F(CapturedDecoderCuda, SaysWhyThereIsNone) {
  LanguageModel model(captured_config({{"mamba2"}, {"attention"}}), at::kBFloat16);
  model.to(at::kCUDA);
  State ring = model.make_state(1, {.ring = 2}), many = model.make_state(65);
  std::string why;
  EXPECT_EQ(make_fused_decoder(model, ring, 8, &why), nullptr);
  EXPECT_EQ(why, "the state keeps a ring of convolution inputs");
  EXPECT_EQ(make_fused_decoder(model, many, 8, &why), nullptr);
  EXPECT_EQ(why, "65 sequences, expected at most 64");
}

// A few tokens from an empty state against the CPU's model: no kernel runs but those of captured decoding, so that compute-sanitizer sees these alone.
class CapturedSmallCuda : public CapturedDecoderCuda {
 protected:
  static void expect_cpu(const ModelConfig& config, int64_t N, const StateOptions& options = {}, int64_t steps = 5) {
    config.validate();
    const at::NoGradGuard no_grad;
    at::manual_seed(4);
    LanguageModel here(config, at::kBFloat16), there(config, at::kBFloat16);
    here.initialize(2), there.initialize(2);
    stir(here);
    for (size_t i = 0; i < here.parameters().size(); ++i) at::Tensor(there.parameters()[i]).copy_(here.parameters()[i]);
    there.to(at::kCUDA);
    State a = here.make_state(N, options), b = there.make_state(N, options);
    b.reserve(steps);
    std::string why;
    const auto decoder = make_fused_decoder(there, b, steps, &why);
    ASSERT_NE(decoder, nullptr) << why;
    const auto& mixers = config.layer_mixers[0];
    for (int64_t t = 0; t < steps; ++t) {
      std::vector<RoutedSpan> spans;
      std::vector<int32_t> ids;
      for (int64_t n = 0; n < N; ++n) {
        spans.push_back({static_cast<int32_t>(n), 0, 1, static_cast<int32_t>((n + t) % static_cast<int64_t>(mixers.size()))});
        ids.push_back(static_cast<int32_t>((31 * n + 7 * t) % config.vocab_size));
      }
      ModelInput input;
      input.input_ids = at::tensor(ids, at::kInt).to(at::kLong).view({N, 1});
      input.routing = {std::make_shared<Routing>(N, 1, mixers, spans)};
      input.state = &a;
      const at::Tensor expected = here.logits(here.hidden(input)).squeeze(1);
      EXPECT_LT(test::norm_error(decoder->step(ids, input.routing).cpu(), expected), 4e-2) << "step " << t;
    }
  }
};
TEST_F(CapturedSmallCuda, GatedDeltaNetAndAttention) { expect_cpu(captured_config({{"gated_delta_net", "attention"}}), 3); }
TEST_F(CapturedSmallCuda, Mamba2) { expect_cpu(captured_config({{"mamba2"}}), 2); }
TEST_F(CapturedSmallCuda, KimiDeltaAttention) { expect_cpu(captured_config({{"kimi_delta_attention"}}), 5); }
TEST_F(CapturedSmallCuda, ThreeMixers) { expect_cpu(captured_config({{"mamba2", "gated_delta_net", "sliding_window"}}), 1); }
TEST_F(CapturedSmallCuda, NormsAndKeysOfTheirOwn) {
  ModelConfig c = captured_config({{"gated_delta_net", "attention"}});
  c.layer.qk_norm = true, c.layer.qk_norm_over = "all_heads", c.layer.norm_placement = "after", c.layer.share_kv = false;
  expect_cpu(c, 2);
}
TEST_F(CapturedSmallCuda, BoundedStates) { expect_cpu(captured_config({{"gated_delta_net", "attention"}}), 2, {.bound = {2, 5}, .page_tokens = 2}, 16); }

}  // namespace
}  // namespace oryx
