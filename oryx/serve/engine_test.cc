// Requests that join and leave at any token give what each gives alone.
#include "oryx/serve/engine.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "oryx/common/random.h"
#include "oryx/generate/generator.h"
#include "oryx/model/test_support.h"

namespace oryx::serve {
namespace {

using ::testing::HasSubstr;

std::vector<int32_t> random_prompt(CounterRng& rng, int64_t vocab, size_t length) {
  std::vector<int32_t> ids(length);
  for (auto& id : ids) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab)));
  return ids;
}

struct Text {
  std::vector<int32_t> ids;
  std::optional<Ended> ended;
};

// A request that writes down what it gets.
Request request_of(const LanguageModel& m, std::vector<int32_t> prompt, const std::string& schedule, int64_t max_tokens, Text& text, SamplingOptions sampling = {}) {
  Request r;
  r.prompt = std::move(prompt);
  r.schedule = std::make_shared<ModelSchedule>(m.config(), schedule);
  r.max_tokens = max_tokens;
  r.sampling = sampling;
  r.on_token = [&text](int32_t id) {
    text.ids.push_back(id);
    return true;
  };
  r.on_end = [&text](const Ended& e) {
    EXPECT_FALSE(text.ended.has_value());
    text.ended = e;
  };
  return r;
}

void run_all(Engine& engine) {
  while (engine.step()) {
  }
}

std::vector<int32_t> alone(const LanguageModel& m, const Request& r, int64_t piece, const StateOptions& state = {}) {
  GenerateOptions o{.max_new_tokens = r.max_tokens, .prefill_piece = piece, .sampling = r.sampling};
  o.state = state;
  return generate(m, *r.schedule, r.prompt, o).ids;
}

const std::vector<std::string> kTextSchedules = {"linear", "attention", "linear,attention@-5:", "attention@prompt,linear@gen", "linear,attention@gen", "random(attention=0.5;chunk=4)",
                                                 "linear,attention@45:50"};

// Any interleaving: requests of all kinds, submitted at random rounds, with and without a kept beginning, are each what generate() makes of them alone.
TEST(ServeEngine, AnyInterleavingIsEachAlone) {
  for (const auto& c : test::cases()) {
    if (c.name != "oryx_gdn" && c.name != "oryx_mamba2" && c.name != "oryx_kda" && c.name != "transformer" && c.name != "inter_layer" && c.name != "intra_layer") continue;
    const auto m = test::make(c.config);
    for (const char* kv : {"keep", "bounded:3+9"}) {
      SCOPED_TRACE(fmt::format("{} {}", c.name, kv));
      CounterRng rng(7);
      EngineOptions o{.max_running = 5, .max_queue = 100, .piece = 16, .keep_every = 16, .state_budget = 1 << 24};
      set_kv(o.state, kv);
      Engine engine(*m, o);
      const auto shared = random_prompt(rng, c.config.vocab_size, 40);
      const bool choice = c.config.mixers().size() > 1 && c.config.layer.combine != "mean" && c.config.layer_mixers.size() == 1;
      std::vector<Text> texts(14);
      std::vector<Request> requests;
      for (size_t i = 0; i < texts.size(); ++i) {
        std::vector<int32_t> prompt(shared.begin(), shared.begin() + static_cast<int64_t>(rng.below(41)));
        const auto own = random_prompt(rng, c.config.vocab_size, 1 + rng.below(30));
        prompt.insert(prompt.end(), own.begin(), own.end());
        SamplingOptions sampling;
        if (i % 2 == 1) sampling = {.temperature = 0.9, .top_p = 0.95, .seed = static_cast<int64_t>(i)};
        requests.push_back(request_of(*m, prompt, choice ? kTextSchedules[i % kTextSchedules.size()] : "linear", 1 + static_cast<int64_t>(rng.below(12)), texts[i], sampling));
        engine.submit(requests.back());
        for (uint64_t n = rng.below(4); n > 0; --n) engine.step();
      }
      run_all(engine);
      for (size_t i = 0; i < texts.size(); ++i) {
        ASSERT_TRUE(texts[i].ended.has_value()) << i;
        EXPECT_EQ(texts[i].ended->error, "") << i;
        EXPECT_EQ(texts[i].ids, alone(*m, requests[i], o.piece, o.state)) << i << " " << requests[i].schedule->text();
      }
      EXPECT_GT(engine.stats().prefix_hits, 0);
      EXPECT_GT(engine.stats().decode_rows, engine.stats().decode_passes);
    }
  }
}

}  // namespace
}  // namespace oryx::serve
