// Captured decoding against the generic way from the same state: logits, every slot of the state, texts. And, without a GPU, which models it knows.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "oryx/generate/captured_weights.h"
#include "oryx/generate/fused_decoder.h"
#include "oryx/generate/session.h"
#include "oryx/generate/test_support.h"

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
  ModelConfig c = captured_config({{"attention"}});
  c.layer.qk_norm = true;
  EXPECT_EQ(captured_refusal(c), "layer 0: qk_norm");
  c = captured_config({{"attention"}});
  c.layer.norm_placement = "after";
  EXPECT_EQ(captured_refusal(c), "layer 0: norm_placement after");
  c = captured_config({{"mamba2"}});
  c.layer.hidden_size = 200;
  EXPECT_EQ(captured_refusal(c), "layer 0: hidden_size 200, expected a multiple of 32");
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

// Sequences of different lengths in modes of their own, which change from token to token; in steps other than each `every`-th one all are in their layers' first.
void expect_generic(const ModelConfig& config, int64_t N, int64_t every = 1) {
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
  constexpr int64_t kPrompt = 37, kSteps = 6;
  State generic = model.make_state(N), own = model.make_state(N);
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
  const auto decoder = make_fused_decoder(model, own, kPrompt + N + kSteps, &why);
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
    const at::Tensor expected = model.logits(model.hidden(input)).squeeze(1);
    ASSERT_TRUE(decoder->fits());
    const at::Tensor logits = decoder->step(ids, input.routing);
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
        const std::vector<int64_t> begins(static_cast<size_t>(N), 0);
        const at::Tensor a = own.rows(layer, slot.name, begins, own.lengths()), b = generic.rows(layer, slot.name, begins, own.lengths());
        for (int64_t n = 0; n < N; ++n) {
          const int64_t length = own.lengths()[static_cast<size_t>(n)];
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
  c.layer.num_heads = 8, c.layer.num_kv_heads = 2, c.layer.head_dim = 32, c.layer.rotary_dim = 16, c.tie_word_embeddings = false;  // the plain kernel of decode attention
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

TEST_F(CapturedDecoderCuda, GoesOnBehindTrimAndFork) { test::expect_goes_on_behind_trim_and_fork(captured_config({{"mamba2", "attention"}})); }

TEST_F(CapturedDecoderCuda, SaysWhyThereIsNone) {
  ModelConfig c = captured_config({{"mamba2"}, {"attention"}});
  c.layer.qk_norm = true;
  LanguageModel model(c, at::kBFloat16);
  model.to(at::kCUDA);
  State state = model.make_state(1);
  std::string why;
  EXPECT_EQ(make_fused_decoder(model, state, 8, &why), nullptr);
  EXPECT_EQ(why, "layer 1: qk_norm");
  c.layer.qk_norm = false;
  LanguageModel plain(c, at::kBFloat16);
  plain.to(at::kCUDA);
  State bounded = plain.make_state(1, {.bound = {4, 16}}), many = plain.make_state(65);
  EXPECT_EQ(make_fused_decoder(plain, bounded, 8, &why), nullptr);
  EXPECT_EQ(why, "the state keeps some tokens' rows alone (a bounded one)");
  EXPECT_EQ(make_fused_decoder(plain, many, 8, &why), nullptr);
  EXPECT_EQ(why, "65 sequences, expected at most 64");
}

}  // namespace
}  // namespace oryx
