// Texts that have places of a decoder of slots: the engine's part with one that runs the model itself, and the whole on a GPU.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "oryx/common/random.h"
#include "oryx/generate/generator.h"
#include "oryx/generate/session.h"
#include "oryx/model/inspect.h"
#include "oryx/model/test_support.h"
#include "oryx/router/test_support.h"
#include "oryx/serve/engine.h"
#include "oryx/serve/test_support.h"
#include "tests/support/folder.h"

namespace oryx::serve {
namespace {

using test::alone, test::random_prompt, test::request_of, test::Text;
using ::testing::HasSubstr;

// Runs each row's sequence by itself, through the model. Results are asked for once, and late ones are the same.
class PlainSlots : public SlotDecoder {
 public:
  PlainSlots(const LanguageModel& model, int64_t& steps) : model_(model), steps_(steps) {}
  void attach(State& slots) override {
    state_ = &slots;
    given_.assign(static_cast<size_t>(slots.sequences()), -1);
  }
  Pending step(std::span<const Row> rows) override {
    ++steps_;
    if (fails_at_ == steps_) throw Error("the device is gone");
    auto results = std::make_shared<Results>();
    for (const Row& row : rows) {
      int32_t& last = given_.at(static_cast<size_t>(row.slot));
      const int32_t id = row.id == kGiven ? last : row.id;
      EXPECT_GE(id, 0);
      ModelInput input;
      input.input_ids = at::full({1, 1}, id, at::kLong);
      for (int64_t i = 0; i < model_.config().num_layers; ++i) {
        const auto& names = model_.layer(i).mixer_names();
        input.routing.push_back(std::make_shared<Routing>(1, 1, names.at(row.modes[i])));
      }
      State one = state_->unseat(row.slot);
      input.state = &one;
      const at::Tensor logits = model_.logits(model_.hidden(input).view({1, -1}))[0];
      state_->seat(row.slot, std::move(one));
      last = static_cast<int32_t>(sample_token(row.below > 0 ? logits.narrow(0, 0, row.below) : logits, row.sampling != nullptr ? *row.sampling : SamplingOptions(),
                                               static_cast<uint64_t>(state_->lengths()[static_cast<size_t>(row.slot)])));
      results->tokens.push_back(row.slot == damaged_ ? -1 : last);
      results->logits.push_back(row.logits ? logits.clone() : at::Tensor());
    }
    return [results] { return std::move(*results); };
  }

  int64_t fails_at_ = -1, damaged_ = -1;

 private:
  const LanguageModel& model_;
  int64_t& steps_;
  State* state_ = nullptr;
  std::vector<int32_t> given_;
};

Engine::Decoders plain_slots(int64_t& steps, int64_t fails_at = -1, int64_t damaged = -1) {
  return [&steps, fails_at, damaged](const LanguageModel& m, const StateOptions&, std::string*) {
    auto slots = std::make_unique<PlainSlots>(m, steps);
    slots->fails_at_ = fails_at, slots->damaged_ = damaged;
    return slots;
  };
}

const std::vector<std::string> kSlotSchedules = {"linear", "attention", "linear,attention@-5:", "attention@prompt,linear@gen", "random(attention=0.5;chunk=4)"};

// Requests of all kinds that come and go at random rounds, launched a step ahead: each is what generate() makes of it alone.
void expect_any_interleaving_alone(const std::set<std::string>& names, const std::string& kv) {
  for (const auto& c : test::cases()) {
    if (names.count(c.name) == 0) continue;
    SCOPED_TRACE(c.name + " " + kv);
    const auto m = test::make(c.config);
    CounterRng rng(17);
    int64_t steps = 0;
    EngineOptions o{.max_running = 5, .max_queue = 100, .piece = 16, .keep_every = 16, .state_budget = 1 << 24};
    set_kv(o.state, kv);
    Engine engine(*m, o, plain_slots(steps));
    ASSERT_TRUE(engine.fused());
    const auto shared = random_prompt(rng, 61, 40);
    std::vector<Text> answers(16);
    std::vector<Request> requests;
    std::vector<int64_t> ids;
    for (size_t i = 0; i < answers.size(); ++i) {
      std::vector<int32_t> prompt(shared.begin(), shared.begin() + static_cast<int64_t>(rng.below(41)));
      const auto own = random_prompt(rng, 61, 1 + rng.below(30));
      prompt.insert(prompt.end(), own.begin(), own.end());
      SamplingOptions sampling;
      if (i % 3 == 1) sampling = {.temperature = 0.9, .top_p = 0.95, .seed = static_cast<int64_t>(i)};
      const bool choice = c.config.mixers().size() > 1 && c.config.layer_mixers.size() == 1;
      requests.push_back(request_of(*m, prompt, choice ? kSlotSchedules[i % kSlotSchedules.size()] : "linear", 1 + static_cast<int64_t>(rng.below(20)), answers[i], sampling));
      ids.push_back(engine.submit(requests.back()));
      if (i == 9) engine.cancel(ids[8]);
      for (uint64_t n = rng.below(4); n > 0; --n) engine.step();
      EXPECT_LE(engine.stats().used_bytes(), o.state_budget);
    }
    while (engine.step()) {
    }
    for (size_t i = 0; i < answers.size(); ++i) {
      ASSERT_TRUE(answers[i].ended.has_value()) << i;
      EXPECT_EQ(answers[i].ended->error, "") << i;
      const auto alone = test::alone(*m, requests[i], o.piece, o.state);
      if (answers[i].ended->outcome == Outcome::kCancelled) {
        EXPECT_EQ(answers[i].ids, std::vector<int32_t>(alone.begin(), alone.begin() + static_cast<int64_t>(answers[i].ids.size())));
        continue;
      }
      EXPECT_EQ(answers[i].ids, alone) << i << " " << requests[i].schedule->text();
    }
    const EngineStats s = engine.stats();
    EXPECT_GT(s.prefix_hits, 0);
    EXPECT_GT(s.decode_rows, s.decode_passes);
    EXPECT_EQ(s.decode_passes, steps);
    EXPECT_EQ(s.running, 0);
  }
}

TEST(ServeSlots, AnyInterleavingIsEachAlone) { expect_any_interleaving_alone({"oryx_gdn", "oryx_mamba2", "transformer", "inter_layer"}, "keep"); }
TEST(ServeSlots, AnyInterleavingOfBoundedTextsIsEachAlone) { expect_any_interleaving_alone({"oryx_gdn", "inter_layer"}, "bounded:3+9"); }

// Beside slots: texts with routers are written as ever, and whose log-probabilities are wanted gets those of the texts that are not in slots.
TEST(ServeSlots, RoutersAndScoresBesideThem) {
  const test::TemporaryFolder folder;
  const auto m = test::make(test::small({{"gated_delta_net", "attention"}}));
  const std::string file = test::save_drawn_head(*m, true, folder / "h");
  CounterRng rng(23);
  const auto prompt = random_prompt(rng, 61, 40);
  const std::vector<std::string> schedules{"linear,attention@gen", "linear,router(attention=0.3;" + file + ")", "attention", "linear,router(attention=0.5;window=8;" + file + ")@gen"};
  const EngineOptions o{.max_running = 4, .piece = 16, .keep_every = 16, .state_budget = 1 << 24};
  std::vector<std::vector<TokenScores>> scores[2];
  int64_t steps = 0;
  for (const bool slotted : {true, false}) {
    Engine engine(*m, o, slotted ? plain_slots(steps) : [](const LanguageModel&, const StateOptions&, std::string*) { return std::unique_ptr<SlotDecoder>(); });
    std::vector<Text> answers(schedules.size());
    std::vector<Request> requests;
    auto& all = scores[slotted ? 0 : 1];
    all.resize(schedules.size());
    for (size_t i = 0; i < schedules.size(); ++i) {
      requests.push_back(request_of(*m, prompt, schedules[i], 12, answers[i], {.temperature = i % 2 == 0 ? 0.0 : 0.9, .seed = 3}));
      requests.back().top_logprobs = 2;
      requests.back().vocab_size = 59;
      requests.back().on_scores = [&all, i](TokenScores s) { all[i].push_back(std::move(s)); };
      engine.submit(requests.back());
    }
    while (engine.step()) {
    }
    for (size_t i = 0; i < schedules.size(); ++i) {
      EXPECT_EQ(answers[i].ended->error, "");
      GenerateOptions g{.max_new_tokens = 12, .prefill_piece = o.piece, .vocab_size = 59, .sampling = requests[i].sampling};
      EXPECT_EQ(answers[i].ids, generate(*m, *requests[i].schedule, prompt, g).ids) << schedules[i];
      ASSERT_EQ(all[i].size(), 12u);
      for (size_t t = 0; t < 12; ++t) EXPECT_EQ(all[i][t].id, answers[i].ids[t]);
    }
  }
  EXPECT_GT(steps, 10);
  for (size_t i = 0; i < schedules.size(); ++i) {
    for (size_t t = 0; t < 12; ++t) EXPECT_NEAR(scores[0][i][t].logprob, scores[1][i][t].logprob, 1e-5);
  }
}

// Ends that are not foreseen while a step is under way: an eos, a callback, a cancellation. The bytes and pages come back; what is said of the text counts no token of a wasted step.
TEST(ServeSlots, EndsWhileAStepIsUnderWay) {
  const auto m = test::make(test::small({{"gated_delta_net", "attention"}}));
  CounterRng rng(21);
  int64_t steps = 0;
  const EngineOptions o{.max_running = 3, .piece = 16, .keep_every = 0, .state_budget = 1 << 24};
  Engine engine(*m, o, plain_slots(steps));
  Text whole, until, stopped, cancelled;
  const auto prompt = random_prompt(rng, 61, 20);
  engine.submit(request_of(*m, prompt, "linear,attention@gen", 30, whole));
  while (engine.step()) {
  }
  EXPECT_EQ(whole.ended->attention_share, 29.0 / 49);
  Request r = request_of(*m, prompt, "linear,attention@gen", 30, until);
  r.eos_id = whole.ids[6];
  const auto end = std::find(whole.ids.begin(), whole.ids.end(), r.eos_id);
  engine.submit(r);
  r = request_of(*m, prompt, "linear", 30, stopped);
  r.on_token = [&](int32_t id) {
    stopped.ids.push_back(id);
    return stopped.ids.size() < 4;
  };
  engine.submit(r);
  const int64_t id = engine.submit(request_of(*m, prompt, "attention", 30, cancelled));
  while (cancelled.ids.size() < 5) engine.step();
  engine.cancel(id);
  while (engine.step()) {
  }
  EXPECT_EQ(until.ids, std::vector<int32_t>(whole.ids.begin(), end));
  EXPECT_EQ(until.ended->outcome, Outcome::kEos);
  EXPECT_EQ(until.ended->new_tokens, static_cast<int64_t>(until.ids.size()) + 1);
  EXPECT_EQ(stopped.ended->outcome, Outcome::kStopped);
  EXPECT_EQ(stopped.ids.size(), 4u);
  EXPECT_EQ(cancelled.ended->outcome, Outcome::kCancelled);
  EXPECT_EQ(cancelled.ids.size(), 5u);
  const EngineStats s = engine.stats();
  EXPECT_EQ(s.row_bytes, 0);
  EXPECT_EQ(s.running, 0);
  Text last;  // and the places are as good as new
  const Request again = request_of(*m, prompt, "attention", 12, last);
  engine.submit(again);
  while (engine.step()) {
  }
  EXPECT_EQ(last.ids, alone(*m, again, 16));
}

TEST(ServeSlots, AFailureEndsItsTextsAndNoOthers) {
  const auto m = test::make(test::small({{"gated_delta_net", "attention"}}));
  CounterRng rng(22);
  int64_t steps = 0;
  const EngineOptions o{.max_running = 2, .piece = 16, .keep_every = 0, .state_budget = 1 << 24};
  Engine broken(*m, o, plain_slots(steps, 4));
  Text a, b, c;
  broken.submit(request_of(*m, random_prompt(rng, 61, 9), "linear", 10, a));
  broken.submit(request_of(*m, random_prompt(rng, 61, 9), "attention", 10, b));
  broken.submit(request_of(*m, random_prompt(rng, 61, 9), "attention", 10, c));
  while (broken.step()) {
  }
  EXPECT_THAT(a.ended->error, HasSubstr("the device is gone"));
  EXPECT_THAT(b.ended->error, HasSubstr("the device is gone"));
  EXPECT_EQ(c.ended->outcome, Outcome::kLength);
  EXPECT_EQ(broken.stats().row_bytes, 0);
  steps = 0;
  Engine damaged(*m, o, plain_slots(steps, -1, 1));
  Text d, e;
  damaged.submit(request_of(*m, random_prompt(rng, 61, 9), "linear", 10, d));
  damaged.submit(request_of(*m, random_prompt(rng, 61, 9), "linear", 10, e));
  while (damaged.step()) {
  }
  EXPECT_EQ(d.ended->outcome, Outcome::kLength);
  EXPECT_EQ(e.ended->outcome, Outcome::kFailed);
  EXPECT_THAT(e.ended->error, HasSubstr("a logit is NaN or infinite"));
}

// The budget is divided before anything runs; requests wait for pages, and what could never run is refused.
TEST(ServeSlots, TheBudgetIsDivided) {
  const auto m = test::make(test::small({{"gated_delta_net", "attention"}}));
  CounterRng rng(23);
  int64_t steps = 0;
  const auto fixed = state_bytes(m->config(), 0, at::kFloat).total(), row = state_bytes(m->config(), 1, at::kFloat).total() - fixed;
  for (const int64_t keep : {0, 32}) {
    const EngineOptions o{.max_running = 4, .max_queue = 100, .piece = 16, .keep_every = keep, .state_budget = 12 * fixed + 600 * row};
    Engine engine(*m, o, plain_slots(steps));
    std::vector<Text> answers(10);
    std::vector<Request> requests;
    for (Text& answer : answers) {
      requests.push_back(request_of(*m, random_prompt(rng, 61, 70), "linear,attention@gen", 20, answer));
      engine.submit(requests.back());
    }
    while (engine.step()) EXPECT_LE(engine.stats().used_bytes(), o.state_budget);
    for (size_t i = 0; i < answers.size(); ++i) EXPECT_EQ(answers[i].ids, alone(*m, requests[i], 16)) << i;
    EXPECT_EQ(engine.stats().row_bytes > 0, keep > 0);
    Text never;
    try {
      engine.submit(request_of(*m, {1}, "linear", 5000, never));
      FAIL();
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr("of keys and values, but the pool for them is"));
    }
  }
  Engine fewer(*m, {.max_running = 100, .piece = 16, .keep_every = 0, .state_budget = 16 * fixed + 600 * row}, plain_slots(steps));
  EXPECT_LT(fewer.options().max_running, 100);
  EXPECT_GE(fewer.options().max_running, 3);
  EXPECT_THROW(Engine(*m, {.state_budget = 4 * fixed}, plain_slots(steps)), Error);
  // Without rows all of it is for recurrent states.
  EngineOptions dropped{.max_running = 2, .piece = 16, .keep_every = 16, .state_budget = 40 * fixed};
  set_kv(dropped.state, "drop");
  Engine engine(*m, dropped, plain_slots(steps));
  Text answer;
  engine.submit(request_of(*m, random_prompt(rng, 61, 70), "linear", 9, answer));
  while (engine.step()) {
  }
  EXPECT_EQ(answer.ended->error, "");
  EXPECT_EQ(answer.ids.size(), 9u);
  EXPECT_EQ(engine.stats().prefixes, 4);
}

// ---- on a GPU

class ServeSlotsCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  }
};

std::unique_ptr<LanguageModel> gpu_model(int64_t hidden, int64_t heads, int64_t intermediate, int64_t layers = 3) {
  ModelConfig c;
  c.vocab_size = 320, c.num_layers = layers;
  c.layer.hidden_size = hidden, c.layer.num_heads = heads, c.layer.head_dim = 128, c.layer.intermediate_size = intermediate;
  c.validate();
  auto m = std::make_unique<LanguageModel>(c, at::kBFloat16);
  m->initialize(1);
  m->to(at::kCUDA);
  return m;
}

// How far the logit of each of the answer's tokens lies below the highest one, at most, by the model operator by operator; in standard deviations of the logits.
double greedy_gap(const LanguageModel& m, const Request& r, const std::vector<int32_t>& ids, int64_t piece, const StateOptions& state = {}) {
  const at::NoGradGuard no_grad;
  const auto prompt = static_cast<int64_t>(r.prompt.size());
  Session session(m, *r.schedule, {.prompt_length = prompt, .tokens = prompt + r.max_tokens, .piece = piece, .seed = static_cast<uint64_t>(r.sampling.seed), .state = state, .fused = false});
  at::Tensor logits = m.logits(session.extend(r.prompt)).squeeze(0).to(at::kFloat).cpu();
  double gap = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    gap = std::max(gap, static_cast<double>(((logits.max() - logits[ids[i]]) / logits.std()).item<float>()));
    if (i + 1 < ids.size()) logits = session.step(ids[i]).to(at::kFloat).cpu();
  }
  return gap;
}

// Texts in all modes that come and go, more than a launch takes: each is greedy up to bfloat16's rounding, and those in linear modes are, to the token, what they are alone.
void expect_each_alone(const LanguageModel& m, int64_t most, const std::string& kv = "keep") {
  CounterRng rng(7);
  EngineOptions o{.max_running = most, .max_queue = 200, .piece = 64, .keep_every = 64, .state_budget = int64_t{1} << 31};
  set_kv(o.state, kv);
  Engine engine(m, o), alone(m, o);
  ASSERT_TRUE(engine.fused());
  const auto shared = random_prompt(rng, 320, 150);
  std::vector<Text> answers(static_cast<size_t>(most) + 30);
  std::vector<Request> requests;
  for (size_t i = 0; i < answers.size(); ++i) {
    std::vector<int32_t> prompt(shared.begin(), shared.begin() + static_cast<int64_t>(rng.below(151)));
    const auto own = random_prompt(rng, 320, 1 + rng.below(60));
    prompt.insert(prompt.end(), own.begin(), own.end());
    SamplingOptions sampling;
    if (i % 4 == 1) sampling = {.temperature = 0.9, .top_p = 0.95, .seed = static_cast<int64_t>(i)};
    requests.push_back(request_of(m, prompt, kSlotSchedules[i % kSlotSchedules.size()], 1 + static_cast<int64_t>(rng.below(90)), answers[i], sampling));
    engine.submit(requests.back());
    for (uint64_t n = rng.below(4); n > 0 && i > 20; --n) engine.step();
  }
  while (engine.step()) {
  }
  double worst = 0;
  for (size_t i = 0; i < answers.size(); ++i) {
    ASSERT_TRUE(answers[i].ended.has_value()) << i;
    ASSERT_EQ(answers[i].ended->error, "") << i;
    ASSERT_EQ(static_cast<int64_t>(answers[i].ids.size()), requests[i].max_tokens);
    if (requests[i].sampling.temperature == 0 && i % 3 == 0) worst = std::max(worst, greedy_gap(m, requests[i], answers[i].ids, o.piece, o.state));
    if (requests[i].schedule->text() != "linear") continue;
    Text one;
    alone.submit(request_of(m, requests[i].prompt, "linear", requests[i].max_tokens, one, requests[i].sampling));
    while (alone.step()) {
    }
    EXPECT_EQ(answers[i].ids, one.ids) << i;
  }
  // A logit's bfloat16 rounding and that of what it was made of.
  EXPECT_LT(worst, 0.1);
  EXPECT_GT(engine.stats().prefix_hits, 0);
}

TEST_F(ServeSlotsCuda, AnyInterleavingIsEachAlone) {
  for (const auto& [hidden, heads, intermediate, most] : {std::tuple{256, 2, 288, 7}, {384, 3, 256, 70}, {512, 4, 544, 20}}) {
    SCOPED_TRACE(hidden);
    expect_each_alone(*gpu_model(hidden, heads, intermediate), most);
  }
}
// Windows' pages take turns in the table, more than once round.
TEST_F(ServeSlotsCuda, BoundedTextsAreEachAlone) {
  expect_each_alone(*gpu_model(384, 3, 256), 70, "bounded:5+40");
  ModelConfig c;
  c.vocab_size = 330, c.num_layers = 2, c.layer_mixers = {{"mamba2", "attention"}};
  c.layer.hidden_size = 192, c.layer.num_heads = 4, c.layer.num_kv_heads = 2, c.layer.head_dim = 64, c.layer.intermediate_size = 224, c.layer.qk_norm = true;
  c.validate();
  LanguageModel m(c, at::kBFloat16);
  m.initialize(1);
  m.to(at::kCUDA);
  expect_each_alone(m, 9, "bounded:0+33");
}

// The same of models that captured decoding's chain takes: heads of 64, other recurrences, several in a layer.
TEST_F(ServeSlotsCuda, OtherModelsAreEachAlone) {
  using Lists = std::vector<std::vector<std::string>>;
  for (const auto& [mixers, most] : {std::pair<Lists, int64_t>{{{"gated_delta_net", "attention"}}, 70}, {{{"mamba2", "attention"}}, 12}, {{{"kimi_delta_attention", "sliding_window", "attention"}}, 5}}) {
    SCOPED_TRACE(mixers[0][0]);
    ModelConfig c;
    c.vocab_size = 330, c.num_layers = 2, c.layer_mixers = mixers;
    c.layer.hidden_size = 192, c.layer.num_heads = 3, c.layer.head_dim = 64, c.layer.intermediate_size = 224, c.layer.query_conv = most == 12;
    c.validate();
    LanguageModel m(c, at::kBFloat16);
    m.initialize(1);
    m.to(at::kCUDA);
    expect_each_alone(m, most);
  }
}

// Where all mixers' outputs are averaged every token attends, whatever its mode.
TEST_F(ServeSlotsCuda, MeanOfMixersAttendsAlways) {
  ModelConfig c;
  c.vocab_size = 320, c.num_layers = 2, c.layer.combine = "mean";
  c.layer.hidden_size = 128, c.layer.num_heads = 2, c.layer.head_dim = 64, c.layer.intermediate_size = 128;
  c.validate();
  LanguageModel m(c, at::kBFloat16);
  m.initialize(1);
  m.to(at::kCUDA);
  CounterRng rng(11);
  Engine engine(m, {.max_running = 2, .piece = 64, .keep_every = 64, .state_budget = int64_t{1} << 29});
  ASSERT_TRUE(engine.fused());
  Text answer;
  const Request request = request_of(m, random_prompt(rng, 320, 20), "linear", 12, answer);
  engine.submit(request);
  while (engine.step()) {
  }
  ASSERT_EQ(answer.ended->error, "");
  EXPECT_NEAR(answer.ended->attention_share, 1, 1e-9);
  EXPECT_LT(greedy_gap(m, request, answer.ids, 64), 0.1);
}

// A text that is longer than all before makes room for itself: tables grow, captures are made anew.
TEST_F(ServeSlotsCuda, LongTextsGrowTheTables) {
  const auto m = gpu_model(256, 2, 256, 2);
  CounterRng rng(8);
  const EngineOptions o{.max_running = 3, .piece = 512, .keep_every = 0, .state_budget = int64_t{1} << 31};
  Engine engine(*m, o);
  std::vector<Text> answers(3);
  std::vector<Request> requests;
  for (const uint64_t length : {100, 2040, 4500}) {
    Text& answer = answers[requests.size()];
    requests.push_back(request_of(*m, random_prompt(rng, 320, length), "attention", 24, answer));
    engine.submit(requests.back());
    for (int n = 0; n < 3; ++n) engine.step();
  }
  while (engine.step()) {
  }
  for (size_t i = 0; i < answers.size(); ++i) {
    ASSERT_EQ(answers[i].ended->error, "") << i;
    EXPECT_LT(greedy_gap(*m, requests[i], answers[i].ids, o.piece), 0.1) << i;
  }
}

// Dropped rows, damaged weights, and a model that the decoder does not know, which is served as before.
TEST_F(ServeSlotsCuda, OtherWays) {
  const auto m = gpu_model(256, 2, 256, 2);
  CounterRng rng(9);
  EngineOptions o{.max_running = 3, .piece = 64, .keep_every = 64, .state_budget = int64_t{1} << 29};
  set_kv(o.state, "drop");
  Engine dropped(*m, o), kept(*m, {.max_running = 3, .piece = 64, .keep_every = 64, .state_budget = int64_t{1} << 29});
  Text a, b;
  const auto prompt = random_prompt(rng, 320, 100);
  dropped.submit(request_of(*m, prompt, "linear", 40, a));
  kept.submit(request_of(*m, prompt, "linear", 40, b));
  while (dropped.step() || kept.step()) {
  }
  ASSERT_EQ(a.ended->error, "");
  EXPECT_EQ(a.ids, b.ids);
  const_cast<at::Tensor&>(m->parameter("layers.1.norm1.weight")).fill_(std::numeric_limits<float>::quiet_NaN());
  Engine damaged(*m, {.max_running = 3, .piece = 64, .keep_every = 64, .state_budget = int64_t{1} << 29});
  Text c;
  damaged.submit(request_of(*m, prompt, "linear", 40, c));
  while (damaged.step()) {
  }
  EXPECT_EQ(c.ended->outcome, Outcome::kFailed);
  LanguageModel other(m->config(), at::kFloat);
  other.initialize(1);
  other.to(at::kCUDA);
  Engine generic(other, {.max_running = 3, .piece = 64, .keep_every = 64, .state_budget = int64_t{1} << 29});
  EXPECT_FALSE(generic.fused());
  Text d;
  generic.submit(request_of(other, prompt, "linear,attention@gen", 10, d));
  while (generic.step()) {
  }
  EXPECT_EQ(d.ended->error, "");
}

}  // namespace
}  // namespace oryx::serve
