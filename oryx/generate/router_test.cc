// A router while a text is read and written: decisions token by token are those of the same features, however the text comes.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <optional>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/generate/facts.h"
#include "oryx/generate/generator.h"
#include "oryx/generate/session.h"
#include "oryx/io/safetensors.h"
#include "oryx/model/routed_cost.h"
#include "oryx/model/state_file.h"
#include "oryx/router/features.h"
#include "oryx/router/test_support.h"
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
    GainHead head = test::drawn_head(*m, reads_hidden);
    const std::vector<int64_t> wide(ids.begin(), ids.end());
    const std::vector<int32_t> bounds{0, kAll};
    std::vector<float> usual = router_gains(*m, std::make_shared<const GainHead>(head), at::tensor(wide, at::kLong).unsqueeze(0), bounds);
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

struct TextParts {
  std::vector<int32_t> ids;
  double attention_share = 0;
  std::vector<float> gains;
};

// Writes `total` tokens, left behind every part and gone on with from a file.
TextParts written_in(const LanguageModel& m, const ModelSchedule& schedule, std::span<const int32_t> prompt, const std::vector<int64_t>& parts, const std::filesystem::path& file,
                     const StateOptions& state) {
  TextParts all;
  for (size_t i = 0; i < parts.size(); ++i) {
    GenerateOptions o{.max_new_tokens = parts[i], .prefill_piece = 8, .sampling = {.temperature = 0.8, .seed = 4}, .state = state};
    std::optional<State> held;
    if (i > 0) {
      held.emplace(load_state(m, file, 0, &o.from_end));
      o.from = &*held;
    }
    o.at_end = [&](const State& s, const TextEnd& end) {
      save_state(m, s, file, end);
      all.gains = end.routers.gains.begin()->second;
    };
    const Generated out = generate(m, schedule, i == 0 ? prompt : std::span<const int32_t>(), o);
    all.ids.insert(all.ids.end(), out.ids.begin(), out.ids.end());
    all.attention_share = out.stats.attention_share;
  }
  return all;
}

TEST(RouterSession, SplitAnywhereIsWhole) {
  const test::TemporaryFolder folder;
  const auto m = routed_model();
  const auto ids = routed_ids(21);
  for (const bool reads_hidden : {true, false}) {
    const std::string file = test::save_drawn_head(*m, reads_hidden, folder / "r") + ")";
    for (const std::string& text : {"linear,router(attention=0.4;" + file, "linear,router(attention=0.3;causal=1;window=16;" + file, "linear,router(attention=0.3;average=1;" + file,
                                   "linear,router(attention=0.4;window=5;" + file + "@gen", "{\"layers\": {\"0\": \"router(attention=0.4;" + file + "\", \"1\": \"linear,router(attention=0.2;window=9;" + file + "\"}}"}) {
      SCOPED_TRACE(text);
      const ModelSchedule schedule(m->config(), text);
      for (const char* kv : {"keep", "bounded:3+9"}) {
        StateOptions state;
        set_kv(state, kv);
        const TextParts whole = written_in(*m, schedule, ids, {24}, folder / "s", state);
        EXPECT_EQ(whole.ids.size(), 24u);
        EXPECT_GT(whole.attention_share, 0.05);
        EXPECT_LT(whole.attention_share, 0.7);
        for (const std::vector<int64_t>& parts : {std::vector<int64_t>{1, 23}, {11, 13}, {5, 1, 7, 11}}) {
          const TextParts split = written_in(*m, schedule, ids, parts, folder / "s", state);
          EXPECT_EQ(split.ids, whole.ids);
          EXPECT_THAT(split.gains, ::testing::Pointwise(::testing::NanSensitiveFloatEq(), whole.gains));
          if (text.find("@gen") == std::string::npos) {
            EXPECT_DOUBLE_EQ(split.attention_share, whole.attention_share);
          }
        }
      }
    }
  }
}

// A prompt behind a saved text gets exactly its share too, by a reading of it from there.
TEST(RouterSession, GoesOnWithAPromptAndAnotherRouter) {
  const test::TemporaryFolder folder;
  const auto m = routed_model();
  const auto ids = routed_ids(20), more = routed_ids(30);
  const std::string hidden = test::save_drawn_head(*m, true, folder / "h") + ")", tokens = test::save_drawn_head(*m, false, folder / "t") + ")";
  const auto go_on = [&](const std::string& first, const std::string& second) {
    const ModelSchedule before(m->config(), first), behind(m->config(), second);
    written_in(*m, before, ids, {6}, folder / "s", {});
    GenerateOptions o{.max_new_tokens = 6};
    State held = load_state(*m, folder / "s", 0, &o.from_end);
    o.from = &held;
    TextRouters known;
    o.at_end = [&](const State&, const TextEnd& end) { known = end.routers; };
    const Generated out = generate(*m, behind, more, o);
    EXPECT_EQ(known.prompts, (std::vector<std::pair<int64_t, int64_t>>{{0, 20}, {26, 56}}));
    EXPECT_EQ(known.ids.size(), 62u);
    return std::pair(out.stats.attention_share, known);
  };
  for (const std::string& file : {hidden, tokens}) {
    const std::string before = "linear,router(attention=0.4;" + file, behind = "linear,router(attention=0.5;" + file;
    EXPECT_DOUBLE_EQ(go_on(before, behind + "@26:56").first * 62, 15);
    EXPECT_DOUBLE_EQ(go_on(before, behind + "@:20").first * 62, 10);
  }
  // Another router has predicted nothing of what ran before it came.
  const auto [share, known] = go_on("linear,router(attention=0.4;" + hidden, "linear,router(attention=0.5;" + tokens + "@:56");
  EXPECT_DOUBLE_EQ(share * 62, 15);
  const std::vector<float>& gains = known.gains.begin()->second;
  EXPECT_EQ(std::count_if(gains.begin(), gains.end(), [](float g) { return std::isnan(g); }), 26);
}

TEST(RouterSession, ATextWithoutARouterIsRefusedInOneLine) {
  const test::TemporaryFolder folder;
  const auto m = routed_model();
  const ModelSchedule linear(m->config(), "linear"), routed(m->config(), "linear,router(attention=0.4;" + test::save_drawn_head(*m, true, folder / "r") + ")"),
      surprised(m->config(), "linear,surprise(attention=0.1)");
  GenerateOptions o{.max_new_tokens = 3};
  o.at_end = [&](const State& s, const TextEnd& end) { save_state(*m, s, folder / "s", end); };
  (void)generate(*m, linear, routed_ids(9), o);
  for (const ModelSchedule* schedule : {&routed, &surprised}) {
    GenerateOptions next{.max_new_tokens = 3};
    State held = load_state(*m, folder / "s", 0, &next.from_end);
    next.from = &held;
    try {
      (void)generate(*m, *schedule, {}, next);
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), ::testing::HasSubstr(schedule == &routed ? "the session was saved under a schedule without one; begin a session under one with a router" : "wants to know the whole prompt"));
    }
  }
  // Damage of what a router goes on by.
  o.at_end = [&](const State& s, const TextEnd& end) { save_state(*m, s, folder / "s", end); };
  (void)generate(*m, routed, routed_ids(9), o);
  const auto damaged = [&](const std::string& name, const std::function<void(at::Tensor&)>& change) {
    const SafetensorsReader whole(folder / "s");
    NamedTensors tensors;
    for (const auto& [own, info] : whole.tensors()) {
      tensors.emplace_back(own, whole.load(own));
      if (own.starts_with(name)) change(tensors.back().second);
    }
    write_safetensors(folder / "bad", tensors, whole.metadata());
    TextEnd end;
    try {
      (void)load_state(*m, folder / "bad", 0, &end);
      return std::string("no error");
    } catch (const Error& e) {
      return std::string(e.what());
    }
  };
  EXPECT_EQ(damaged("router", [](at::Tensor&) {}), "no error");
  EXPECT_THAT(damaged("router.ids", [](at::Tensor& x) { x[2] = 1000; }), ::testing::HasSubstr("holds the token 1000"));
  EXPECT_THAT(damaged("router.ids", [](at::Tensor& x) { x = x.narrow(0, 0, 3).clone(); }), ::testing::HasSubstr("'router.ids' is I32 [3], expected I32 [12]"));
  EXPECT_THAT(damaged("router.hidden", [](at::Tensor& x) { x = x.to(at::kDouble); }), ::testing::HasSubstr("expected F32 [32]"));
  EXPECT_THAT(damaged("router.prompts", [](at::Tensor& x) { x[1] = 99; }), ::testing::HasSubstr("ranges of 12 tokens that rise"));
  EXPECT_THAT(damaged("router.gains", [](at::Tensor& x) { x[1] = INFINITY; }), ::testing::HasSubstr("a gain that is infinite"));
}

TEST(RouterDecode, AnotherModelsRouterIsRefused) {
  const test::TemporaryFolder folder;
  const auto m = routed_model();
  GainHead h = test::drawn_head(*m, true);
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
