// Requests that join and leave at any token give what each gives alone.
#include "oryx/serve/engine.h"
#include "oryx/serve/engine_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "oryx/common/random.h"
#include "oryx/generate/generator.h"
#include "oryx/model/inspect.h"
#include "oryx/model/test_support.h"
#include "oryx/serve/test_support.h"

namespace oryx::serve {
namespace {

using test::alone, test::random_prompt, test::request_of, test::Text;
using ::testing::HasSubstr;

void run_all(Engine& engine) {
  while (engine.step()) {
  }
}

const std::vector<std::string> kTextSchedules = {"linear",
                                                 "attention",
                                                 "linear,attention@-5:",
                                                 "attention@prompt,linear@gen",
                                                 "linear,attention@gen",
                                                 "random(attention=0.5;chunk=4)",
                                                 "linear,attention@45:50"};

// Any interleaving: requests of all kinds, submitted at random rounds, with and without a kept beginning, are each what
// generate() makes of them alone.
TEST(ServeEngine, AnyInterleavingIsEachAlone) {
  for (const auto& c : test::cases()) {
    if (c.name != "oryx_gdn" && c.name != "oryx_mamba2" && c.name != "oryx_kda" && c.name != "transformer" &&
        c.name != "inter_layer" && c.name != "intra_layer")
      continue;
    const auto m = test::make(c.config);
    for (const char* kv : {"keep", "bounded:3+9"}) {
      SCOPED_TRACE(fmt::format("{} {}", c.name, kv));
      CounterRng rng(7);
      EngineOptions o{.max_running = 5, .max_queue = 100, .piece = 16, .keep_every = 16, .state_budget = 1 << 24};
      set_kv(o.state, kv);
      Engine engine(*m, o);
      const auto shared = random_prompt(rng, c.config.vocab_size, 40);
      const bool choice =
          c.config.mixers().size() > 1 && c.config.layer.combine != "mean" && c.config.layer_mixers.size() == 1;
      std::vector<Text> texts(14);
      std::vector<Request> requests;
      for (size_t i = 0; i < texts.size(); ++i) {
        std::vector<int32_t> prompt(shared.begin(), shared.begin() + static_cast<int64_t>(rng.below(41)));
        const auto own = random_prompt(rng, c.config.vocab_size, 1 + rng.below(30));
        prompt.insert(prompt.end(), own.begin(), own.end());
        SamplingOptions sampling;
        if (i % 2 == 1) sampling = {.temperature = 0.9, .top_p = 0.95, .seed = static_cast<int64_t>(i)};
        requests.push_back(request_of(*m, prompt, choice ? kTextSchedules[i % kTextSchedules.size()] : "linear",
                                      1 + static_cast<int64_t>(rng.below(12)), texts[i], sampling));
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

// One token of each of several sequences: bit for bit the logits of each alone, also after they were regrouped.
TEST(ServeEngine, SideBySideIsBitForBitAlone) {
  const at::NoGradGuard no_grad;
  for (const auto& c : test::cases()) {
    SCOPED_TRACE(c.name);
    const auto m = test::make(c.config);
    CounterRng rng(12);
    const State root = m->make_state(1);
    const auto run = [&](State& state, const std::vector<int64_t>& ids, const std::vector<int32_t>& modes, int64_t T) {
      const auto N = state.sequences();
      std::vector<std::vector<int32_t>> rows;
      for (const int32_t mode : modes) rows.emplace_back(static_cast<size_t>(T), mode);
      return test::run(*m, at::tensor(ids, at::kLong).view({N, T}), test::routing(c.config, rows, 0, T), &state);
    };
    constexpr size_t N = 6;  // the last one joins later
    std::vector<State> alone, parts;
    std::vector<int32_t> modes;
    for (size_t n = 0; n < N; ++n) {
      const auto T = static_cast<int64_t>(3 + rng.below(30));
      std::vector<int64_t> ids;
      for (int64_t t = 0; t < T; ++t) ids.push_back(static_cast<int64_t>(rng.below(61)));
      modes.push_back(static_cast<int32_t>(rng.below(c.config.mixers().size())));
      State state = root.fork({0});
      run(state, ids, {modes.back()}, T);
      alone.push_back(state.fork({0}));
      parts.push_back(std::move(state));
    }
    std::vector<State::SequencePlace> places;
    std::vector<size_t> order;
    for (size_t n = 0; n + 1 < N; ++n) places.emplace_back(n, 0), order.push_back(n);
    State late = std::move(parts.back());
    parts.pop_back();
    std::vector<State> groups = State::regroup(std::move(parts), {places});
    const auto regroup = [&](std::vector<State::SequencePlace> to, int64_t spare) {
      std::vector<size_t> before = order;
      order.clear();
      for (const auto& [source, n] : to) order.push_back(source == 0 ? before[static_cast<size_t>(n)] : N - 1);
      std::vector<State> sources;
      sources.push_back(std::move(groups[0]));
      if (std::any_of(to.begin(), to.end(), [](const auto& p) { return p.first == 1; }))
        sources.push_back(std::move(late));
      const int64_t used = root.budget().used();
      groups = State::regroup(std::move(sources), {std::move(to)});
      EXPECT_EQ(groups[0].spare_sequences(), spare);
      EXPECT_LE(root.budget().used(), used);
    };
    for (int step = 0; step < 9; ++step) {
      std::vector<int64_t> ids;
      std::vector<int32_t> now;
      for (const size_t n : order) {
        ids.push_back(static_cast<int64_t>(rng.below(61)));
        now.push_back(modes[n]);
      }
      const at::Tensor together = run(groups[0], ids, now, 1);
      for (size_t j = 0; j < order.size(); ++j) {
        const at::Tensor one = run(alone[order[j]], {ids[j]}, {now[j]}, 1);
        EXPECT_TRUE(at::equal(together[static_cast<int64_t>(j)], one[0]))
            << "step " << step << ", sequence " << order[j] << ": "
            << (together[static_cast<int64_t>(j)] - one[0]).abs().max();
      }
      if (step == 2) regroup({{0, 4}, {0, 0}, {0, 3}, {0, 2}}, 0);  // one leaves, the others change places
      if (step == 3) regroup({{0, 0}, {0, 3}, {0, 2}}, 1);          // the last one fills a hole
      if (step == 4) regroup({{0, 0}, {0, 1}, {0, 2}, {1, 0}}, 0);  // one joins where there is room
      if (step == 5) regroup({{0, 0}, {0, 1}}, 2);
      if (step == 6) {
        const int64_t used = root.budget().used();
        groups[0].give_back_room();
        EXPECT_EQ(groups[0].spare_sequences(), 0);
        EXPECT_EQ(root.budget().used() < used, groups[0].bytes().recurrent + groups[0].bytes().tails > 0);
      }
    }
  }
}

std::unique_ptr<LanguageModel> oryx_model() { return test::make(test::small({{"gated_delta_net", "attention"}})); }

// A prompt that begins with a kept one starts there, and gives what a fresh engine gives; modes are part of what is
// equal.
TEST(ServeEngine, ReusesAPrefixInTheSameModesOnly) {
  const auto m = oryx_model();
  CounterRng rng(3);
  const auto prompt = random_prompt(rng, 61, 70);
  auto longer = prompt, other = prompt;
  longer.resize(100, 7);
  other[40] = (other[40] + 1) % 61;
  const EngineOptions o{.piece = 16, .keep_every = 16, .state_budget = 1 << 24};
  Engine engine(*m, o);
  const auto ask = [&](const std::vector<int32_t>& ids, const char* schedule, int64_t reused) {
    Text text;
    const Request r = request_of(*m, ids, schedule, 6, text, {.temperature = 1, .seed = 9});
    engine.submit(r);
    run_all(engine);
    EXPECT_EQ(text.ids, alone(*m, r, o.piece)) << schedule;
    EXPECT_EQ(text.ended->reused_tokens, reused) << schedule;
  };
  ask(prompt, "linear", 0);
  EXPECT_EQ(engine.stats().prefixes, 4);
  ask(prompt, "linear", 64);
  ask(longer, "linear", 64);
  ask(other, "linear", 32);
  ask(prompt, "attention", 0);
  ask(longer, "attention", 64);
  ask(longer, "linear,attention@-20:", 80);  // tokens 80 to 99 are in attention
  ask(longer, "linear,attention@-21:", 64);
  ask(longer, "linear,attention@50:", 48);
  ask({prompt.begin(), prompt.begin() + 64}, "linear", 48);  // the last token runs in any case
  const EngineStats s = engine.stats();
  EXPECT_EQ(s.prefix_hits + s.prefix_misses, 10);
  EXPECT_EQ(s.tokens_read + s.tokens_reused, 70 + 70 + 100 + 70 + 70 + 100 + 100 + 100 + 100 + 64);
}

// Bytes are as predicted, never above the budget, and all come back; what cannot fit is refused at once, what can later
// waits.
TEST(ServeEngine, TheBudgetHoldsAndEverythingComesBack) {
  const auto m = oryx_model();
  CounterRng rng(5);
  for (const char* kv : {"keep", "bounded:4+24"}) {
    SCOPED_TRACE(kv);
    EngineOptions o{.max_running = 6, .piece = 16, .keep_every = 32};
    set_kv(o.state, kv);
    o.state_budget = 1 << 30;
    const int64_t one = Engine(*m, o).predicted_bytes(100);
    o.state_budget = 3 * one;
    Engine engine(*m, o);
    std::vector<Text> texts(9);
    std::vector<Request> requests;
    int64_t most = 0;
    for (Text& text : texts) {
      requests.push_back(request_of(*m, random_prompt(rng, 61, 80), "attention@prompt,linear@gen", 20, text));
      engine.submit(requests.back());
    }
    while (engine.step()) {
      EXPECT_LE(engine.stats().used_bytes(), o.state_budget);
      most = std::max(most, engine.stats().running);
    }
    EXPECT_GE(most, 2);
    if (std::string(kv) == "keep") {
      EXPECT_LE(most, 3);  // under a bound what a request may need for a moment is kept free
    }
    for (size_t i = 0; i < texts.size(); ++i) {
      ASSERT_TRUE(texts[i].ended.has_value());
      EXPECT_EQ(texts[i].ended->error, "");
      EXPECT_EQ(texts[i].ids, alone(*m, requests[i], o.piece, o.state)) << i;
    }
    const EngineStats s = engine.stats();
    EXPECT_EQ(s.recurrent_bytes, 0);
    EXPECT_EQ(s.running, 0);
    EXPECT_EQ(s.prefix_bytes > 0, s.prefixes > 0);
    Text text;
    try {
      engine.submit(
          request_of(*m, random_prompt(rng, 61, 80), "linear", std::string(kv) == "keep" ? 400 : 2000000000, text));
      if (std::string(kv) == "keep") FAIL() << "a request that can never fit was taken";
      engine.close(true);
      run_all(engine);
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr("but the whole budget is"));
    }
  }
}

// Prompts that begin alike and come together are read once: each begins where one of the others has come to.
TEST(ServeEngine, PromptsThatComeTogetherAreReadOnce) {
  const auto m = oryx_model();
  CounterRng rng(13);
  const auto shared = random_prompt(rng, 61, 64);
  Engine engine(*m, {.max_running = 4, .piece = 16, .keep_every = 16, .state_budget = 1 << 24});
  std::vector<Text> texts(4);
  std::vector<Request> requests;
  for (Text& text : texts) {
    auto prompt = shared;
    const auto own = random_prompt(rng, 61, 5);
    prompt.insert(prompt.end(), own.begin(), own.end());
    requests.push_back(request_of(*m, prompt, "linear,attention@-5:", 6, text));
    engine.submit(requests.back());
  }
  run_all(engine);
  for (size_t i = 0; i < texts.size(); ++i) EXPECT_EQ(texts[i].ids, alone(*m, requests[i], 16)) << i;
  EXPECT_EQ(engine.stats().tokens_read, 64 + 4 * 5);
  EXPECT_EQ(engine.stats().tokens_reused, 3 * 64);
}

// Where no keys and values are kept a prefix costs its recurrent states and tails, however long it is.
TEST(ServeEngine, PrefixesOfLinearTextsAreSmall) {
  const auto m = oryx_model();
  CounterRng rng(14);
  EngineOptions o{.piece = 16, .keep_every = 32, .state_budget = 1 << 24};
  set_kv(o.state, "drop");
  Engine engine(*m, o);
  const auto prompt = random_prompt(rng, 61, 200);
  for (const int64_t reused : {0, 192}) {
    Text text;
    const Request r = request_of(*m, prompt, "linear", 5, text);
    engine.submit(r);
    run_all(engine);
    EXPECT_EQ(text.ids, alone(*m, r, o.piece, o.state));
    EXPECT_EQ(text.ended->reused_tokens, reused);
  }
  const EngineStats s = engine.stats();
  EXPECT_EQ(s.prefixes, 6);
  EXPECT_EQ(s.prefix_bytes, 6 * state_bytes(m->config(), 1000000, at::kFloat, o.state).total());
  EXPECT_EQ(s.row_bytes, 0);
}

TEST(ServeEngine, WithoutKeptPrefixesNothingStays) {
  const auto m = oryx_model();
  CounterRng rng(6);
  Engine engine(*m, {.max_running = 3, .piece = 8, .keep_every = 0, .state_budget = 1 << 24});
  std::vector<Text> texts(5);
  for (Text& text : texts) engine.submit(request_of(*m, random_prompt(rng, 61, 30), "linear,attention@-3:", 5, text));
  run_all(engine);
  EXPECT_EQ(engine.stats().used_bytes(), 0);
  EXPECT_EQ(engine.stats().prefix_hits, 0);
}

TEST(ServeEngine, CancelledRequestsEndAtOnceAndFreeTheirBytes) {
  const auto m = oryx_model();
  CounterRng rng(8);
  Engine engine(*m, {.max_running = 2, .piece = 8, .keep_every = 0, .state_budget = 1 << 24});
  std::vector<Text> texts(4);
  std::vector<int64_t> ids;
  std::vector<Request> requests;
  for (Text& text : texts) requests.push_back(request_of(*m, random_prompt(rng, 61, 40), "linear", 30, text));
  for (const Request& r : requests) ids.push_back(engine.submit(r));
  while (texts[0].ids.size() < 3) engine.step();
  engine.cancel(ids[0]);  // writes
  engine.cancel(ids[2]);  // waits
  engine.step();
  EXPECT_EQ(texts[0].ended->outcome, Outcome::kCancelled);
  EXPECT_EQ(texts[2].ended->outcome, Outcome::kCancelled);
  EXPECT_TRUE(texts[2].ids.empty());
  while (engine.stats().running < 2 || !texts[3].ids.empty()) engine.step();
  engine.cancel(ids[3]);  // reads
  engine.step();
  EXPECT_EQ(texts[3].ended->outcome, Outcome::kCancelled);
  run_all(engine);
  EXPECT_EQ(texts[1].ids, alone(*m, requests[1], 8));
  EXPECT_EQ(engine.stats().used_bytes(), 0);
  EXPECT_EQ(engine.stats().cancelled, 3);
  engine.cancel(ids[1]);  // has ended: nothing happens
  EXPECT_FALSE(engine.step());
}

// A text goes on by a token between any two pieces of a long prompt, and prompts are read in turns.
TEST(ServeEngine, ARunningTextWaitsForOnePieceAtMost) {
  const auto m = oryx_model();
  CounterRng rng(9);
  Engine engine(*m, {.max_running = 4, .piece = 8, .keep_every = 0, .state_budget = 1 << 24});
  Text text, long_text, short_text;
  engine.submit(request_of(*m, random_prompt(rng, 61, 5), "linear", 40, text));
  engine.step();
  engine.submit(request_of(*m, random_prompt(rng, 61, 200), "linear", 2, long_text));
  engine.submit(request_of(*m, random_prompt(rng, 61, 16), "linear", 2, short_text));
  while (!text.ended) {
    const size_t tokens = text.ids.size();
    const int64_t read = engine.stats().tokens_read;
    engine.step();
    EXPECT_EQ(text.ids.size(), tokens + 1);
    EXPECT_LE(engine.stats().tokens_read - read, 8);
    EXPECT_TRUE(short_text.ended || !long_text.ended) << "the long prompt was read first";
  }
  EXPECT_TRUE(short_text.ended.has_value());
  run_all(engine);
  EXPECT_EQ(long_text.ended->outcome, Outcome::kLength);
}

// Whoever looks back, one pass writes a token of each.
TEST(ServeEngine, TextsInAllModesAreWrittenInOnePass) {
  const auto m = oryx_model();
  CounterRng rng(15);
  Engine engine(*m, {.max_running = 4, .piece = 8, .keep_every = 0, .state_budget = 1 << 24});
  std::vector<Text> texts(4);
  std::vector<Request> requests;
  for (const char* schedule : {"linear", "attention", "linear,attention@gen", "random(attention=0.5;chunk=2)"}) {
    Text& text = texts[requests.size()];
    requests.push_back(request_of(*m, random_prompt(rng, 61, 8), schedule, 10, text));
    engine.submit(requests.back());
  }
  run_all(engine);
  for (size_t i = 0; i < texts.size(); ++i) EXPECT_EQ(texts[i].ids, alone(*m, requests[i], 8)) << i;
  EXPECT_EQ(engine.stats().decode_rows, 4 * 9);
  EXPECT_EQ(engine.stats().decode_passes, 9 + 3);  // one prompt a round was read first
}

TEST(ServeEngine, EndsByEosAndByTheCallback) {
  const auto m = oryx_model();
  CounterRng rng(10);
  const EngineOptions o{.piece = 8, .keep_every = 8, .state_budget = 1 << 24};
  Text text, again, stopped;
  Request r = request_of(*m, random_prompt(rng, 61, 20), "linear", 30, text, {.temperature = 1, .seed = 2});
  Engine engine(*m, o);
  engine.submit(r);
  run_all(engine);
  ASSERT_EQ(text.ids.size(), 30u);
  const auto eos = std::find_if(text.ids.begin() + 5, text.ids.end(), [&](int32_t id) {
    return std::find(text.ids.begin(), text.ids.begin() + 5, id) == text.ids.begin() + 5;
  });
  ASSERT_NE(eos, text.ids.end());
  Request until = request_of(*m, r.prompt, "linear", 30, again, r.sampling);
  until.eos_id = *eos;
  engine.submit(until);
  Request until_three = request_of(*m, r.prompt, "linear", 30, stopped, r.sampling);
  until_three.on_token = [&](int32_t id) {
    stopped.ids.push_back(id);
    return stopped.ids.size() < 3;
  };
  engine.submit(until_three);
  run_all(engine);
  EXPECT_EQ(again.ids, std::vector<int32_t>(text.ids.begin(), eos));
  EXPECT_EQ(again.ended->outcome, Outcome::kEos);
  EXPECT_EQ(again.ended->new_tokens, static_cast<int64_t>(again.ids.size()) + 1);
  EXPECT_EQ(stopped.ids, std::vector<int32_t>(text.ids.begin(), text.ids.begin() + 3));
  EXPECT_EQ(stopped.ended->outcome, Outcome::kStopped);
}

TEST(ServeEngine, RefusesInOneLine) {
  const auto m = oryx_model();
  EngineOptions o{.max_running = 1, .max_queue = 1, .piece = 8, .keep_every = 0, .state_budget = 1 << 24};
  set_kv(o.state, "drop");
  Engine engine(*m, o);
  Text text;
  const auto refused = [&](const Request& r, const char* line) {
    try {
      engine.submit(r);
      FAIL() << line;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(line));
    }
  };
  const std::vector<int32_t> prompt(20, 1);
  refused(request_of(*m, {}, "linear", 5, text), "the prompt is empty");
  refused(request_of(*m, {61}, "linear", 5, text), "token id 61 is outside of the model's vocabulary of 61");
  refused(request_of(*m, prompt, "linear", 0, text), "max_tokens is 0");
  refused(request_of(*m, prompt, "linear", 5, text, {.temperature = -1}), "temperature is -1");
  refused(request_of(*m, prompt, "attention", 5, text), "looks back at tokens whose keys and values this server drops");
  refused(request_of(*m, prompt, "linear,surprise(attention=0.1)", 5, text), "wants scores of the whole prompt");
  // Those that belong together are taken together, or none is.
  const Request fits = request_of(*m, prompt, "attention@:8,linear@8:", 5, text);
  EXPECT_THROW(engine.submit(std::vector<Request>(3, fits)), Busy);
  EXPECT_THROW(engine.submit(std::vector<Request>{fits, request_of(*m, {}, "linear", 5, text)}), Error);
  EXPECT_EQ(engine.stats().queued, 0);
  EXPECT_EQ(engine.submit(std::vector<Request>(2, fits)).size(), 2u);
  EXPECT_THROW(engine.submit(request_of(*m, prompt, "linear", 5, text)), Busy);
  EXPECT_EQ(engine.stats().refused, 12);
  const auto bad = [&](EngineOptions options, const char* line) {
    try {
      Engine never(*m, options);
      FAIL() << line;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(line));
    }
  };
  bad({.piece = 16, .keep_every = 24, .state_budget = 1 << 24},
      "keep_every is 24, expected 0 or a multiple of piece, 16");
  bad({.state_budget = 100}, "an empty one takes");
  EngineOptions chosen{.state_budget = 1 << 24};
  set_kv(chosen.state, "random:budget=8");
  bad(chosen, "are not served");
}

TEST(ServePace, ReadsWhatFitsBetweenTwoTokens) {
  using namespace std::chrono_literals;
  serve::Pace pace;
  serve::Clock::time_point now{};
  const auto step = [&](serve::Clock::duration after) {
    pace.launched();
    pace.came(now += after);
  };
  EXPECT_TRUE(pace.allows(100));  // nothing is known: one
  pace.read(100);
  EXPECT_FALSE(pace.allows(100));
  step(5s);    // from when is not known
  step(10ms);  // a step alone
  pace.read(100);
  step(30ms);  // 20 ms for 100 tokens
  const auto pieces = [&](double gap) {
    int n = 0;
    for (pace.begin_round(gap, 100); pace.allows(100); ++n) pace.spend(100);
    return n;
  };
  EXPECT_EQ(pieces(0.1), 4);
  EXPECT_EQ(pieces(0.1), 4);    // what was left does not add up to a fifth
  EXPECT_EQ(pieces(0.021), 1);  // it does to a first
  EXPECT_EQ(pieces(0.021), 0);
  EXPECT_EQ(pieces(0.021), 1);
  int rounds = 0;
  while (pieces(0.001) == 0) ASSERT_LT(++rounds, 1000);  // prompts are read even where steps alone take longer
  EXPECT_GT(rounds, 50);
}

// How much is read between two tokens changes no text.
TEST(ServeEngine, AGapChangesNoText) {
  const auto m = oryx_model();
  for (const double gap : {1e-6, 3600.0}) {
    CounterRng rng(3);
    Engine engine(*m, {.max_running = 4, .max_queue = 100, .piece = 8, .gap_seconds = gap, .keep_every = 16, .state_budget = 1 << 26});
    std::vector<Text> answers(8);
    std::vector<Request> requests;
    for (Text& answer : answers) {
      requests.push_back(request_of(*m, random_prompt(rng, 61, 1 + rng.below(60)), "linear,attention@-5:", 12, answer));
      engine.submit(requests.back());
    }
    while (engine.step()) {
    }
    for (size_t i = 0; i < answers.size(); ++i) EXPECT_EQ(answers[i].ids, alone(*m, requests[i], 8)) << i;
  }
}

// submit(), cancel() and stats() from other threads while one runs the model.
TEST(ServeEngine, IsFedFromManyThreads) {
  const auto m = oryx_model();
  const EngineOptions o{.max_running = 4, .max_queue = 100, .piece = 16, .keep_every = 16, .state_budget = 1 << 24};
  Engine engine(*m, o);
  std::vector<Text> texts(12);
  std::vector<Request> requests;
  CounterRng rng(11);
  for (Text& text : texts)
    requests.push_back(request_of(*m, random_prompt(rng, 61, 1 + rng.below(50)), "linear,attention@-4:", 8, text));
  std::thread model([&] { engine.run(); });
  std::vector<std::thread> clients;
  for (int k = 0; k < 3; ++k) {
    clients.emplace_back([&, k] {
      for (size_t i = static_cast<size_t>(k); i < requests.size(); i += 3) {
        const int64_t id = engine.submit(requests[i]);
        if (i % 4 == 3) engine.cancel(id);
        (void)engine.stats();
      }
    });
  }
  for (auto& c : clients) c.join();
  engine.close(false);
  model.join();
  for (size_t i = 0; i < texts.size(); ++i) {
    ASSERT_TRUE(texts[i].ended.has_value());
    if (texts[i].ended->outcome == Outcome::kCancelled) continue;
    EXPECT_EQ(texts[i].ids, alone(*m, requests[i], o.piece)) << i;
  }
}

}  // namespace
}  // namespace oryx::serve
