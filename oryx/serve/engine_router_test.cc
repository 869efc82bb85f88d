// Requests whose schedules have routers: side by side with others each gives what it gives alone.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/random.h"
#include "oryx/generate/generator.h"
#include "oryx/model/test_support.h"
#include "oryx/router/test_support.h"
#include "oryx/serve/engine.h"
#include "tests/support/folder.h"

namespace oryx::serve {
namespace {

using ::testing::HasSubstr;

struct RoutedAnswer {
  Request request;
  std::vector<int32_t> ids;
  Ended ended;
};

class EngineRouters : public ::testing::Test {
 protected:
  void ask(const LanguageModel& m, Engine& engine, RoutedAnswer& a, std::vector<int32_t> prompt, const std::string& schedule, int64_t max_tokens, SamplingOptions sampling = {}) {
    a.request.prompt = std::move(prompt);
    a.request.schedule = std::make_shared<ModelSchedule>(m.config(), schedule);
    a.request.max_tokens = max_tokens;
    a.request.sampling = sampling;
    a.request.on_token = [&a](int32_t id) {
      a.ids.push_back(id);
      return true;
    };
    a.request.on_end = [&a](const Ended& e) { a.ended = e; };
    engine.submit(a.request);
  }
  // Tokens and share of `generate`.
  void expect_alone(const LanguageModel& m, const RoutedAnswer& a, int64_t piece, const StateOptions& state) {
    GenerateOptions o{.max_new_tokens = a.request.max_tokens, .prefill_piece = piece, .sampling = a.request.sampling, .state = state};
    const Generated out = generate(m, *a.request.schedule, a.request.prompt, o);
    EXPECT_EQ(a.ended.error, "");
    EXPECT_EQ(a.ids, out.ids) << a.request.schedule->text();
    if (a.ended.reused_tokens == 0) {
      EXPECT_NEAR(a.ended.attention_share, out.stats.attention_share, 1e-9) << a.request.schedule->text();
    }
  }
  std::vector<int32_t> prompt_of(CounterRng& rng, const std::vector<int32_t>& shared, size_t own) {
    std::vector<int32_t> ids(shared.begin(), shared.begin() + static_cast<int64_t>(rng.below(shared.size() + 1)));
    for (size_t i = 0; i < own; ++i) ids.push_back(static_cast<int32_t>(rng.below(61)));
    return ids;
  }
  test::TemporaryFolder folder_;
};

// Any interleaving of requests with routers of both kinds, other shares and controllers, and without.
TEST_F(EngineRouters, AnyInterleavingIsEachAlone) {
  for (const auto& mixers : {std::vector<std::string>{"gated_delta_net", "attention"}, {"mamba2", "attention"}}) {
    const auto m = test::make(test::small({mixers}));
    const std::string hidden = test::save_drawn_head(*m, true, folder_ / "h", 7), tokens = test::save_drawn_head(*m, false, folder_ / "t", 8);
    const std::vector<std::string> schedules{"linear,router(attention=0.3;" + hidden + ")",
                                             "linear,router(attention=0.5;" + tokens + ")",
                                             "linear,attention@-5:,router(attention=0.2;causal=1;window=12;" + hidden + ")",
                                             "linear,router(attention=0.4;window=6;" + tokens + ")@gen",
                                             "linear,router(attention=0.4;average=1;" + hidden + ")@gen",
                                             "linear",
                                             "attention",
                                             "linear,router(attention=0.3;" + hidden + ")@prompt,router(attention=0.5;" + tokens + ")@gen"};
    for (const char* kv : {"keep", "bounded:3+9"}) {
      SCOPED_TRACE(fmt::format("{} {}", mixers.front(), kv));
      CounterRng rng(17);
      EngineOptions o{.max_running = 5, .max_queue = 100, .piece = 16, .keep_every = 16, .state_budget = 1 << 24};
      set_kv(o.state, kv);
      Engine engine(*m, o);
      const auto shared = prompt_of(rng, {}, 40);
      std::vector<RoutedAnswer> answers(20);
      for (size_t i = 0; i < answers.size(); ++i) {
        SamplingOptions sampling;
        if (i % 2 == 1) sampling = {.temperature = 0.9, .seed = static_cast<int64_t>(i)};
        ask(*m, engine, answers[i], prompt_of(rng, shared, 1 + rng.below(30)), schedules[i % schedules.size()], 1 + static_cast<int64_t>(rng.below(14)), sampling);
        for (uint64_t n = rng.below(4); n > 0; --n) engine.step();
      }
      while (engine.step()) {
      }
      for (const RoutedAnswer& a : answers) expect_alone(*m, a, o.piece, o.state);
      EXPECT_GT(answers[0].ended.attention_share, 0.1);
      EXPECT_LT(answers[0].ended.attention_share, 0.6);
      EXPECT_GT(engine.stats().tokens_ahead, 0);
      EXPECT_GT(engine.stats().decode_rows, engine.stats().decode_passes);
    }
  }
}

// A prompt that begins with a kept one in the same modes is spared the second reading, not the first; a budget that holds one request at a time is enough.
TEST_F(EngineRouters, KeptPrefixesAndASmallBudget) {
  const auto m = test::make(test::small({{"gated_delta_net", "attention"}}));
  CounterRng rng(3);
  const auto prompt = prompt_of(rng, {}, 70);
  const std::string schedule = "linear,router(attention=0.3;" + test::save_drawn_head(*m, true, folder_ / "h") + ")";
  EngineOptions o{.max_running = 3, .piece = 16, .keep_every = 16, .state_budget = 1 << 24};
  const int64_t one = Engine(*m, o).predicted_bytes(76);
  for (const int64_t budget : {int64_t{1} << 24, one + one / 3}) {
    o.state_budget = budget;
    Engine engine(*m, o);
    std::vector<RoutedAnswer> answers(3);
    for (RoutedAnswer& a : answers) {
      ask(*m, engine, a, prompt, schedule, 6, {.temperature = 1, .seed = 9});
      if (budget > one * 2) {
        while (engine.step()) {
        }
      }
    }
    while (engine.step()) {
      EXPECT_LE(engine.stats().used_bytes(), budget);
    }
    for (const RoutedAnswer& a : answers) expect_alone(*m, a, o.piece, o.state);
    EXPECT_EQ(engine.stats().tokens_ahead, 3 * 70);
    if (budget > one * 2) {
      EXPECT_EQ(answers[2].ended.reused_tokens, 64);
    }
  }
}

TEST_F(EngineRouters, RefusesInOneLine) {
  const auto m = test::make(test::small({{"gated_delta_net", "attention"}})), other = test::make(test::small({{"mamba2", "attention"}}));
  const std::string schedule = "linear,router(attention=0.3;" + test::save_drawn_head(*other, true, folder_ / "h") + ")";
  const auto refused = [&](const LanguageModel& model, const char* kv, const char* line) {
    EngineOptions o{.piece = 8, .keep_every = 0, .state_budget = 1 << 24};
    set_kv(o.state, kv);
    Engine engine(model, o);
    RoutedAnswer a;
    try {
      ask(model, engine, a, std::vector<int32_t>(5, 1), schedule, 5);
      ADD_FAILURE() << line;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(line));
    }
  };
  refused(*m, "keep", "was trained for the model");
  refused(*other, "drop", "has a router, which may look back at any token, but this server drops keys and values");
}

}  // namespace
}  // namespace oryx::serve
