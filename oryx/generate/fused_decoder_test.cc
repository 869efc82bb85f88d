#include "oryx/generate/fused_decoder.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "oryx/generate/session.h"
#include "oryx/generate/test_support.h"

namespace oryx {
namespace {

ModelConfig decoder_config(int64_t hidden, int64_t heads, int64_t intermediate) {
  ModelConfig c;
  c.vocab_size = 320, c.num_layers = 2;
  c.layer.hidden_size = hidden, c.layer.num_heads = heads, c.layer.head_dim = 128, c.layer.intermediate_size = intermediate;
  c.validate();
  return c;
}

TEST(FusedDecoder, SaysWhyThereIsNone) {
  const LanguageModel model(decoder_config(256, 2, 256), at::kBFloat16);
  State state = model.make_state(1);
  std::string why;
  EXPECT_EQ(make_fused_decoder(model, state, 8, &why), nullptr);
  EXPECT_EQ(why, "the model is not on a GPU");
}

// Where there is none, a session's step is the generic one.
TEST(FusedDecoder, StepEqualsExtend) {
  const at::NoGradGuard no_grad;
  LanguageModel model(decoder_config(256, 2, 256));
  model.initialize(1);
  const ModelSchedule schedule(model.config(), "linear,attention@7:9");
  Session a(model, schedule, {.prompt_length = 4, .tokens = 12, .fused = true}), b(model, schedule, {.prompt_length = 4, .tokens = 12, .fused = false});
  const std::vector<int32_t> ids = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8};
  (void)a.extend(std::span(ids).first(4)), (void)b.extend(std::span(ids).first(4));
  for (size_t t = 4; t < ids.size(); ++t) {
    EXPECT_TRUE(at::equal(a.step(ids[t]), model.logits(b.extend(std::span(ids).subspan(t, 1))).squeeze(0)));
  }
  EXPECT_EQ(a.length(), b.length());
  EXPECT_EQ(a.attention_share(), b.attention_share());
}

class FusedDecoderCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  }
};

// Sequences of different modes, which change from token to token, against the generic way from the same state. In steps other than each `every`-th one nobody attends.
void compare(const ModelConfig& config, int64_t N, int64_t every = 1, const StateOptions& options = {}, int64_t kPrompt = 37, int64_t kSteps = 6) {
  const at::NoGradGuard no_grad;
  LanguageModel model(config, at::kBFloat16);
  model.initialize(1);
  model.to(at::kCUDA);
  State generic = model.make_state(N, options), own = model.make_state(N, options);
  generic.reserve(kPrompt + kSteps), own.reserve(kPrompt + kSteps);
  ModelInput prompt;
  prompt.input_ids = at::randint(config.vocab_size, {N, kPrompt}, at::kLong);
  prompt.routing = {std::make_shared<Routing>(N, kPrompt, "gated_delta_net")};
  for (State* s : {&generic, &own}) {
    prompt.state = s;
    (void)model.hidden(prompt);
  }
  std::string why;
  const auto fused = make_fused_decoder(model, own, kPrompt + kSteps, &why);
  ASSERT_NE(fused, nullptr) << why;
  for (int64_t t = 0; t < kSteps; ++t) {
    std::vector<RoutedSpan> spans;
    std::vector<int32_t> ids;
    for (int64_t n = 0; n < N; ++n) {
      spans.push_back({static_cast<int32_t>(n), 0, 1, static_cast<int32_t>(t % every == 0 ? (n + t) % 2 : 0)});
      ids.push_back(static_cast<int32_t>((31 * n + 7 * t) % config.vocab_size));
    }
    ModelInput input;
    input.input_ids = at::tensor(ids, at::kInt).to(at::kLong).view({N, 1});
    input.routing = {std::make_shared<Routing>(N, 1, std::vector<std::string>{"gated_delta_net", "attention"}, spans)};
    input.state = &generic;
    const at::Tensor expected = model.logits(model.hidden(input)).squeeze(1);
    ASSERT_TRUE(fused->fits());
    const at::Tensor logits = fused->step(ids, input.routing);
    EXPECT_LT(test::norm_error(logits, expected), 3e-2) << "step " << t;
    EXPECT_TRUE(at::equal(fused->likeliest().to(at::kLong), logits.to(at::kFloat).argmax(-1))) << "step " << t;
    for (int64_t i = 0; i < config.num_layers; ++i) {
      for (const char* slot : {"gated_delta_net.S", "k_conv", "v_conv"}) {
        EXPECT_LT(test::norm_error(own.layer(i).tensor(slot), generic.layer(i).tensor(slot)), 3e-2) << slot << " of layer " << i << ", step " << t;
      }
      for (const char* slot : {"keys", "values", "gated_delta_net.g", "gated_delta_net.beta", "mode"}) {
        EXPECT_LT(test::norm_error(own.rows(i, slot, own.rows_from(), own.lengths()), generic.rows(i, slot, own.rows_from(), own.lengths())), 3e-2) << slot << " of layer " << i << ", step " << t;
      }
    }
    EXPECT_TRUE(at::equal(own.rows(config.num_layers, "ids", own.rows_from(), own.lengths()), generic.rows(config.num_layers, "ids", own.rows_from(), own.lengths())));
    EXPECT_EQ(own.lengths(), generic.lengths());
  }
}

TEST_F(FusedDecoderCuda, BatchEqualsGeneric) { compare(decoder_config(256, 2, 288), 5); }
TEST_F(FusedDecoderCuda, WideBatchEqualsGeneric) { compare(decoder_config(384, 3, 256), 64); }
TEST_F(FusedDecoderCuda, WideBatchInLinearModeEqualsGeneric) { compare(decoder_config(384, 3, 256), 33, 100); }
TEST_F(FusedDecoderCuda, FewInLinearModeEqualGeneric) { compare(decoder_config(512, 4, 544), 8, 3); }
TEST_F(FusedDecoderCuda, FewOfTheProductsShapeEqualGeneric) { compare(decoder_config(2048, 16, 5440), 3, 2); }
TEST_F(FusedDecoderCuda, OneSequenceEqualsGeneric) { compare(decoder_config(256, 2, 256), 1); }
TEST_F(FusedDecoderCuda, PersistentKernelEqualsGeneric) { compare(decoder_config(2048, 16, 5440), 1); }

// The same over bounded states, whose windows move over their pages' borders and to the front of their region.
TEST_F(FusedDecoderCuda, BoundedBatchEqualsGeneric) { compare(decoder_config(384, 3, 256), 9, 2, {.bound = {6, 13}, .page_tokens = 4}, 37, 40); }
TEST_F(FusedDecoderCuda, BoundedPersistentKernelEqualsGeneric) {
  compare(decoder_config(2048, 16, 5440), 1, 1, {.bound = {40, 150}}, 300, 200);
  compare(decoder_config(2048, 16, 5440), 1, 1, {.bound = {0, 70}, .page_tokens = 16}, 60, 40);
}

TEST_F(FusedDecoderCuda, GoesOnBehindTrimAndFork) { test::expect_goes_on_behind_trim_and_fork(decoder_config(256, 2, 256)); }

}  // namespace
}  // namespace oryx
