// A router while a text is read and written: decisions token by token are those of the same features, however the text comes.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/generate/facts.h"
#include "oryx/generate/generator.h"
#include "oryx/generate/session.h"
#include "oryx/model/routed_cost.h"
#include "oryx/router/features.h"
#include "tests/support/folder.h"
#include "tests/support/small_model.h"

namespace oryx {
namespace {

std::unique_ptr<LanguageModel> routed_model() {
  ModelConfig c = test::small_model();
  c.num_layers = 2;
  auto m = std::make_unique<LanguageModel>(c);
  m->initialize(3);
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < m->specs().size(); ++i) {
    if (m->specs()[i].shape.size() == 2 && m->specs()[i].part != "convolution") at::Tensor(m->parameters()[i]).mul_(5);
  }
  return m;
}

GainHead routed_head(const LanguageModel& model, bool reads_hidden) {
  const int64_t F = 2 * model.config().layer.hidden_size + TokenHistory::kScalars;
  CounterRng rng(7);
  const auto draw = [&](std::vector<int64_t> shape) {
    at::Tensor x = at::empty(shape, at::kFloat);
    for (int64_t i = 0; i < x.numel(); ++i) x.mutable_data_ptr<float>()[i] = static_cast<float>(rng.normal());
    return x;
  };
  GainHead h;
  h.mean = at::zeros({F});
  h.scale = at::ones({F});
  h.w0 = draw({F});
  h.w1 = draw({3, F});
  h.b1 = draw({3});
  h.w2 = draw({3});
  h.reads_hidden = reads_hidden;
  h.model = router_identity(model);
  h.quantiles = {-40, 0, 40};
  return h;
}

std::vector<int32_t> routed_ids(size_t n) {
  CounterRng rng(12);
  std::vector<int32_t> ids(n);
  for (auto& id : ids) id = static_cast<int32_t>(rng.below(40));
  return ids;
}

TEST(RouterDecode, DecidesAsOverTheWholeText) {
  const test::TemporaryFolder folder;
  const auto m = routed_model();
  const auto ids = routed_ids(40);
  constexpr int64_t kPrompt = 22, kAll = 40;
  for (const bool reads_hidden : {true, false}) {
    GainHead head = routed_head(*m, reads_hidden);
    const std::vector<int64_t> wide(ids.begin(), ids.end());
    const std::vector<int32_t> bounds{0, kAll};
    std::vector<float> usual = router_gains(*m, head, at::tensor(wide, at::kLong).unsqueeze(0), bounds);
    std::sort(usual.begin(), usual.end());
    head.quantiles = {usual.front(), usual[kAll / 2], usual.back()};
    save_head(head, folder / "r");
    const ModelSchedule schedule(m->config(), "linear,router(attention=0.5;file=" + (folder / "r").string() + ")");
    const std::span<const int32_t> all(ids), prompt = all.first(kPrompt);
    const auto session = [&](int64_t piece) { return Session(*m, schedule, {.prompt_length = kPrompt, .tokens = kAll, .piece = piece, .facts = gather_facts(*m, schedule, prompt)}); };
    // Token by token, and all at once in pieces.
    Session one = session(7), other = session(64);
    (void)one.extend(prompt);
    at::Tensor logits;
    for (int64_t t = kPrompt; t < kAll; ++t) logits = one.step(ids[static_cast<size_t>(t)]);
    const at::NoGradGuard no_grad;
    const at::Tensor last = m->logits(other.extend(ids))[0];
    EXPECT_LT((last - logits).abs().max().item<double>(), 1e-3);
    EXPECT_EQ(one.attention_share(), other.attention_share());
    const std::vector<float>& gains = one.facts()->gains.begin()->second;
    ASSERT_EQ(gains.size(), static_cast<size_t>(kAll));
    // The same decisions, over the whole text at once: the same text.
    ModePiece piece{.row = 0, .column = 0, .length = kAll, .start = 0, .context = {}};
    piece.context.prompt_length = kPrompt;
    piece.context.facts = one.facts();
    ModelInput input;
    input.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).unsqueeze(0);
    input.routing = schedule.route({piece}, 1, kAll);
    const at::Tensor hidden = m->hidden(input)[0];
    EXPECT_LT((m->logits(hidden[kAll - 1]) - logits).abs().max().item<double>(), 1e-3);
    EXPECT_NEAR(attention_share(m->config(), input.routing), one.attention_share(), 1e-9);
    // Of that text's own hidden states the head predicts the gains that were decided by.
    const at::Tensor predicted = load_head(folder / "r")->predict(router_features(*m, reads_hidden, wide, bounds, hidden));
    for (int64_t t = kPrompt; t < kAll; ++t) {
      EXPECT_NEAR(predicted[t].item<float>(), gains[static_cast<size_t>(t)], 1e-2) << t;
    }
    EXPECT_GT(one.attention_share(), 0.3);
    EXPECT_LT(one.attention_share(), 0.9);
    // As `generate` has it.
    GenerateOptions o;
    o.max_new_tokens = 12;
    const Generated text = generate(*m, schedule, prompt, o);
    EXPECT_EQ(text.ids.size(), 12u);
    EXPECT_GT(text.stats.attention_share, 0.15);
    EXPECT_EQ(first_pass_flops(m->config(), schedule, 20) > 1e5, reads_hidden) << "tokens alone take no reading";
  }
}

TEST(RouterDecode, AnotherModelsRouterIsRefused) {
  const test::TemporaryFolder folder;
  const auto m = routed_model();
  GainHead h = routed_head(*m, true);
  h.model = "0123456789abcdef";
  save_head(h, folder / "r");
  const ModelSchedule schedule(m->config(), "linear,router(attention=0.5;file=" + (folder / "r").string() + ")");
  try {
    (void)generate(*m, schedule, routed_ids(5), {});
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), ::testing::HasSubstr("was trained for the model 0123456789abcdef, this one is"));
  }
}

}  // namespace
}  // namespace oryx
