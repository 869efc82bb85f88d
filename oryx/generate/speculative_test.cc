// A draft changes nothing: the text, the logits behind it and the state are those of the text's own modes, bit for bit on the CPU in float32.
#include "oryx/generate/speculative.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <map>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/data/test_support.h"
#include "oryx/generate/generator.h"
#include "oryx/model/state_file.h"
#include "oryx/model/state_test_support.h"
#include "oryx/model/test_support.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using test::error_of;
using ::testing::HasSubstr;

std::vector<int32_t> drafted_prompt(int64_t length, int64_t vocab) {
  CounterRng rng(29);
  std::vector<int32_t> ids(static_cast<size_t>(length));
  for (auto& id : ids) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab)));
  return ids;
}

// What a text leaves behind: ids, the state's recurrent slots, tails and rows, the logits at its end.
struct Left {
  Generated out;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  TextEnd end;
};

Left write_text(const LanguageModel& m, const std::string& schedule, const std::vector<int32_t>& prompt, GenerateOptions o, const std::function<bool(int32_t)>& on_token = {}) {
  Left left;
  const ModelSchedule parsed(m.config(), schedule);
  o.at_end = [&](const State& state, const TextEnd& end) {
    for (const auto& [name, x] : state.tensors()) left.tensors.emplace_back(name, x.clone());
    left.end = end;
  };
  left.out = generate(m, parsed, prompt, o, on_token);
  return left;
}

void expect_same(const Left& a, const Left& b) {
  EXPECT_EQ(a.out.ids, b.out.ids);
  EXPECT_EQ(a.out.stop, b.out.stop);
  EXPECT_EQ(a.out.stats.new_tokens, b.out.stats.new_tokens);
  EXPECT_EQ(a.end.ids, b.end.ids);
  EXPECT_TRUE(at::equal(a.end.logits, b.end.logits));
  test::expect_equal(a.tensors, b.tensors);
  EXPECT_EQ(a.out.stats.state.total(), b.out.stats.state.total());
  EXPECT_NEAR(a.out.stats.attention_share, b.out.stats.attention_share, 1e-12);
}

class EveryDraft : public ::testing::TestWithParam<test::Case> {};

// Several tokens in one pass as steps are those tokens one after the other, and every place between them can be gone back to: bit for bit, with rows or without.
TEST_P(EveryDraft, StepsInOnePassAreStepsBitForBit) {
  const ModelConfig& c = GetParam().config;
  const auto m = test::make(c);
  const at::NoGradGuard no_grad;
  CounterRng rng(41);
  const int64_t prompt = 21, few = 6, more = 3;
  const at::Tensor ids = test::random_ids(rng, 1, prompt + few + more, c.vocab_size);
  auto modes = test::random_modes(rng, 1, prompt + few + more, c.mixers().size());
  for (const StateOptions& options : {StateOptions{}, StateOptions{.ring = 3}, StateOptions{.bound = {2, 7, 8}}}) {
    for (int64_t kept = 1; kept <= few; kept += 2) {
      State one = m->make_state(1, options), together = m->make_state(1, options);
      for (State* s : {&one, &together}) test::run(*m, ids.narrow(1, 0, prompt), test::routing(c, modes, 0, prompt), s);
      std::vector<at::Tensor> expected;
      for (int64_t t = 0; t < kept; ++t) expected.push_back(test::run(*m, ids.narrow(1, prompt + t, 1), test::routing(c, modes, prompt + t, prompt + t + 1), &one));
      ModelInput in;
      in.input_ids = ids.narrow(1, prompt, few);
      in.routing = {test::routing(c, modes, prompt, prompt + few)};
      in.state = &together;
      in.as_steps = true;
      together.hold_steps(few);
      const at::Tensor logits = m->logits(m->hidden(in));
      EXPECT_TRUE(at::equal(logits.narrow(1, 0, kept), at::cat(expected, 1)));
      together.back(prompt + kept);
      test::expect_equal(test::fixed_slots(*m, together, 0), test::fixed_slots(*m, one, 0));
      // And on from there, with other tokens than those that were forgotten.
      for (int64_t t = 0; t < more; ++t) {
        const at::Tensor next = ids.narrow(1, prompt + few + t, 1);
        const auto by = test::routing(c, modes, prompt + few + t, prompt + few + t + 1);
        EXPECT_TRUE(at::equal(test::run(*m, next, by, &together), test::run(*m, next, by, &one)));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, EveryDraft, ::testing::ValuesIn(test::cases()), [](const auto& info) { return info.param.name; });

// Greedy and sampled, whoever drafts for whom.
TEST(Speculative, TheTextIsTheUndraftedOneBitForBit) {
  struct Pair {
    std::vector<std::vector<std::string>> mixers;
    std::string schedule, draft;
  };
  for (const Pair& p : {Pair{{{"gated_delta_net", "attention"}}, "attention", "linear"}, Pair{{{"mamba2", "attention"}}, "linear,attention@gen", "linear"},
                        Pair{{{"kimi_delta_attention", "attention"}}, "attention", "linear"}, Pair{{{"gated_delta_net", "attention"}}, "attention@prompt,linear@gen", "attention"},
                        Pair{{{"gated_delta_net", "attention"}}, "random(attention=0.5;chunk=3)", "linear"}, Pair{{{"gated_delta_net", "sliding_window", "attention"}}, "attention", "sliding_window"},
                        Pair{{{"kimi_delta_attention", "mamba2"}}, "mamba2", "linear"}, Pair{{{"gated_delta_net", "attention"}}, R"({"layers": {"0": "attention", "*": "linear,attention@-9:"}})", "linear"}}) {
    const ModelConfig c = test::small(p.mixers);
    const auto m = test::make(c);
    const auto prompt = drafted_prompt(23, c.vocab_size);
    for (const double temperature : {0.0, 1.1, 1.3}) {
      GenerateOptions o{.max_new_tokens = 20, .prefill_piece = 16, .vocab_size = 59, .sampling = {.temperature = temperature, .top_p = 0.95, .seed = 5, .race = temperature > 1.2}};
      const Left alone = write_text(*m, p.schedule, prompt, o);
      for (const auto& [tokens, adapt] : {std::pair<int64_t, bool>{3, false}, {15, false}, {8, true}}) {
        SCOPED_TRACE(fmt::format("{} by {} at {}, {} tokens", p.schedule, p.draft, temperature, tokens));
        o.draft = {p.draft, tokens, adapt};
        const Left drafted = write_text(*m, p.schedule, prompt, o);
        expect_same(drafted, alone);
        const DraftStats& d = drafted.out.stats.draft;
        EXPECT_TRUE(adapt || d.passes > 0);
        EXPECT_LE(d.accepted, d.tested);
        EXPECT_LE(d.tested, d.drafted);
      }
    }
  }
}

// A model whose modes say the same accepts all, one whose modes never agree none: the text is the same at both ends.
TEST(Speculative, AcceptsEverythingOrNothing) {
  const ModelConfig c = test::small({{"gated_delta_net", "attention"}});
  const auto m = test::make(c);
  const ModelSchedule attention(c, "attention"), linear(c, "linear");
  const auto prompt = drafted_prompt(20, c.vocab_size);
  const at::NoGradGuard no_grad;
  const auto likeliest = [](const at::Tensor& logits) { return static_cast<int32_t>(sample_token(logits, {}, 0)); };
  Session alone(*m, attention, {.prompt_length = 20, .tokens = 60});
  std::vector<at::Tensor> rows{m->logits(alone.extend(prompt)).squeeze(0)};
  std::vector<int32_t> text;
  for (int t = 0; t < 30; ++t) {
    text.push_back(likeliest(rows.back()));
    rows.push_back(alone.step(text.back()));
  }
  for (const bool agree : {true, false}) {
    Session session(*m, attention, {.prompt_length = 20, .tokens = 60});
    (void)session.extend(prompt);
    // The drafter knows the text, or says another token.
    const auto draw = [&](const at::Tensor&, int64_t position) {
      const auto at = static_cast<size_t>(position - 20);
      return at < text.size() ? (text[at] + (agree ? 0 : 1)) % 61 : 0;
    };
    DraftedSession drafted(session, drafts_drawn(linear, draw), {"linear", 4, false}, &linear);
    for (size_t t = 0; t < 30; ++t) EXPECT_TRUE(at::equal(drafted.step(text[t], 30 - static_cast<int64_t>(t)), rows[t + 1])) << t;
    drafted.settle();
    EXPECT_EQ(session.length(), 50);
    test::expect_equal(test::fixed_slots(*m, session.state(), 0), test::fixed_slots(*m, alone.state(), 0));
    const DraftStats& d = drafted.stats();
    if (agree) {
      EXPECT_EQ(d.accepted, d.drafted);
      EXPECT_EQ(d.passes, 6);
      EXPECT_EQ(d.tokens_a_pass(), 5);
    } else {
      EXPECT_EQ(d.accepted, 0);
      EXPECT_EQ(d.passes, 29);  // nothing is drafted behind the last but one
      EXPECT_EQ(d.alone, 1);
    }
  }
}

// Every way in which a text ends, wherever among the drafts that is.
TEST(Speculative, EndsWhereTheUndraftedTextEnds) {
  const ModelConfig c = test::small({{"gated_delta_net", "attention"}});
  const auto m = test::make(c);
  const auto prompt = drafted_prompt(18, c.vocab_size);
  // Random models repeat themselves when greedy: sampled texts hold a token's first appearance at any place.
  GenerateOptions o{.max_new_tokens = 24, .sampling = {.temperature = 1.5, .seed = 3}};
  const Left whole = write_text(*m, "attention", prompt, o);
  for (size_t at = 0; at < 12; ++at) {
    SCOPED_TRACE(at);
    const auto both = [&](GenerateOptions options, const std::function<std::function<bool(int32_t)>()>& callback) {
      const Left alone = write_text(*m, "attention", prompt, options, callback());
      options.draft = {"linear", 5, false};
      const Left drafted = write_text(*m, "attention", prompt, options, callback());
      expect_same(drafted, alone);
      return drafted.out.stop;
    };
    const auto nothing = [] { return std::function<bool(int32_t)>(); };
    GenerateOptions eos = o;
    eos.eos_id = whole.out.ids[at];
    EXPECT_EQ(both(eos, nothing), StopReason::kEos);
    GenerateOptions length = o;
    length.max_new_tokens = static_cast<int64_t>(at) + 1;
    EXPECT_EQ(both(length, nothing), StopReason::kLength);
    const auto stop = [&] { return [n = size_t{0}, at](int32_t) mutable { return n++ != at; }; };
    EXPECT_EQ(both(o, stop), StopReason::kCallback);
  }
}

// Left and gone on from, drafted or not in either half, is the text that was never left.
TEST(Speculative, SessionsAreLeftAndGoneOnFrom) {
  const ModelConfig c = test::small({{"gated_delta_net", "attention"}});
  const auto m = test::make(c);
  const ModelSchedule schedule(c, "attention");
  const auto prompt = drafted_prompt(22, c.vocab_size);
  for (const char* kv : {"keep", "bounded:3+9"}) {
    GenerateOptions once{.max_new_tokens = 21, .prefill_piece = 16};
    set_kv(once.state, kv);
    const std::vector<int32_t> whole = generate(*m, schedule, prompt, once).ids;
    for (const bool first : {true, false}) {
      SCOPED_TRACE(fmt::format("{} drafted first {}", kv, first));
      const test::TemporaryFolder folder;
      const auto file = folder / "session.safetensors";
      GenerateOptions o = once;
      o.max_new_tokens = 10;
      if (first) o.draft = {"linear", 3, false};
      o.at_end = [&](const State& state, const TextEnd& end) { save_state(*m, state, file, end); };
      std::vector<int32_t> ids = generate(*m, schedule, prompt, o).ids;
      TextEnd end;
      State state = load_state(*m, file, 0, &end);
      GenerateOptions on{.max_new_tokens = 11, .from = &state, .from_end = end};
      // A window that was saved without room for drafts goes on without.
      if (first || std::string(kv) == "keep") on.draft = {"linear", 3, false};
      const Generated rest = generate(*m, schedule, {}, on);
      ids.insert(ids.end(), rest.ids.begin(), rest.ids.end());
      EXPECT_EQ(ids, whole);
      EXPECT_EQ(rest.stats.draft.passes > 0, on.draft.on());
    }
  }
}

// A text whose own mode is linear and whose rows are dropped can be drafted by another linear mixer.
TEST(Speculative, WorksWithoutRows) {
  const ModelConfig c = test::small({{"gated_delta_net", "mamba2", "attention"}});
  const auto m = test::make(c);
  const auto prompt = drafted_prompt(19, c.vocab_size);
  GenerateOptions o{.max_new_tokens = 20};
  o.state.drop_rows = true;
  const Left alone = write_text(*m, "attention@prompt,gated_delta_net@gen", prompt, o);
  o.draft = {"mamba2", 4, false};
  const Left drafted = write_text(*m, "attention@prompt,gated_delta_net@gen", prompt, o);
  expect_same(drafted, alone);
  EXPECT_GT(drafted.out.stats.draft.passes, 0);
}

// The tokens that many seeds draw at one place follow the softmax of the text's own logits there, whatever drafted them.
TEST(Speculative, DrawsFollowTheTextsOwnDistribution) {
  ModelConfig c = test::small({{"gated_delta_net", "attention"}});
  c.vocab_size = 6;
  c.num_layers = 1;
  const auto m = test::make(c);
  const auto prompt = drafted_prompt(9, c.vocab_size);
  const at::NoGradGuard no_grad;
  const ModelSchedule attention(c, "attention");
  constexpr int kSeeds = 600;
  constexpr double kTemperature = 2;
  Session read(*m, attention, {.prompt_length = 9, .tokens = 12});
  const TextEnd end{.logits = m->logits(read.extend(prompt)).squeeze(0), .ids = prompt, .routers = {}};
  // By what the first drawn token was: how often each came behind it.
  std::map<int32_t, std::array<int, 6>> counts;
  DraftStats sum;
  for (int seed = 0; seed < kSeeds; ++seed) {
    State state = read.state().fork({0});
    const GenerateOptions o{.max_new_tokens = 3, .sampling = {.temperature = kTemperature, .seed = seed, .race = true}, .draft = {"linear", 2, false}, .from = &state, .from_end = end};
    const Generated out = generate(*m, attention, {}, o);
    ++counts[out.ids[0]][static_cast<size_t>(out.ids[1])];
    sum.accepted += out.stats.draft.accepted;
    sum.tested += out.stats.draft.tested;
  }
  EXPECT_GT(sum.acceptance(), 0.2);
  EXPECT_LT(sum.acceptance(), 0.98) << "the modes must differ for this to say anything";
  double chi = 0;
  int freedom = 0;
  for (const auto& [first, seen] : counts) {
    Session session(*m, attention, {.prompt_length = 9, .tokens = 12}, read.state().fork({0}));
    const at::Tensor p = (session.step(first).to(at::kDouble) / kTemperature).softmax(0);
    int total = 0;
    for (const int n : seen) total += n;
    if (total < 50) continue;
    double rare = 0, rare_seen = 0;  // together
    for (int64_t i = 0; i < 6; ++i) {
      const double expected = p[i].item<double>() * total;
      if (expected < 5) {
        rare += expected, rare_seen += seen[static_cast<size_t>(i)];
        continue;
      }
      chi += std::pow(seen[static_cast<size_t>(i)] - expected, 2) / expected;
      ++freedom;
    }
    if (rare >= 1) chi += std::pow(rare_seen - rare, 2) / rare, ++freedom;
    --freedom;
  }
  ASSERT_GT(freedom, 3);
  EXPECT_LT(chi, freedom + 4 * std::sqrt(2.0 * freedom));
}

TEST(Speculative, DraftsAsManyAsPay) {
  DraftLength length(8, true);
  EXPECT_EQ(length.next(100), 0) << "the first token runs alone";
  length.passed(1, 500);
  EXPECT_EQ(length.next(100), 0) << "what is made once does not count";
  length.passed(1, 10);
  EXPECT_EQ(length.next(100), 4);
  EXPECT_EQ(length.next(2), 2);
  for (const double first : {300.0, 1.0}) length.drafted(first);
  for (const double first : {300.0, 11.0}) length.passed(5, first);
  for (int i = 0; i < 200; ++i) length.tested(true);
  EXPECT_EQ(length.next(100), 8) << "all are accepted";
  int64_t alone = 0;
  for (int i = 0; i < 100; ++i) alone += length.next(100) == 0 ? 1 : 0;
  EXPECT_GE(alone, 1) << "now and then a token runs alone";
  length.passed(1, 10);
  for (int i = 0; i < 200; ++i) length.tested(false);
  EXPECT_EQ(length.next(100), 0) << "none is";
  for (int i = 0; i < 200; ++i) length.tested(i % 2 == 0);
  const int64_t half = length.next(100);
  EXPECT_GE(half, 1);
  EXPECT_LE(half, 4);
  for (int i = 0; i < 50; ++i) length.drafted(10);
  EXPECT_EQ(length.next(100), 0) << "a draft costs what the token does";
  int64_t tried = 0;
  for (int i = 0; i < 60; ++i) tried += length.next(100) > 0 ? 1 : 0;
  EXPECT_EQ(tried, 1) << "now and then one is tried";
  for (int i = 0; i < 1000; ++i) tried += length.next(100) > 0 ? 1 : 0;
  EXPECT_GE(tried, 3);
  EXPECT_LE(tried, 6) << "less and less often where it does not pay";
  for (int i = 0; i < 5; ++i) length.drafted(0.1);
  for (int i = 0; i < 200; ++i) length.tested(true);
  EXPECT_EQ(length.next(100), 8) << "drafts that became fast are soon believed";
  EXPECT_EQ(DraftLength(5, false).next(100), 5);
}

TEST(Speculative, RefusesInOneLine) {
  const ModelConfig c = test::small({{"gated_delta_net", "attention"}});
  const auto m = test::make(c);
  const ModelSchedule attention(c, "attention");
  const auto prompt = drafted_prompt(9, c.vocab_size);
  const auto message = [&](GenerateOptions o) { return error_of([&] { (void)generate(*m, attention, prompt, o); }); };
  EXPECT_THAT(message({.draft = {"linear", 16}}), HasSubstr("16 tokens to draft at once, expected 1 to 15"));
  EXPECT_THAT(message({.draft = {"linear", 0}}), HasSubstr("0 tokens to draft at once, expected 1 to 15"));
  EXPECT_THAT(message({.draft = {"surprise(attention=0.1)", 4}}), HasSubstr("expected a schedule of positions, as linear"));
  EXPECT_THAT(message({.draft = {"liner", 4}}), HasSubstr("Did you mean 'linear'?"));
  GenerateOptions kept{.draft = {"linear", 4}};
  set_kv(kept.state, "surprise:budget=6,first=2,window=9");
  EXPECT_THAT(message(kept), HasSubstr("draft with all rows (--kv keep)"));
  State state = m->make_state(1, {.bound = {2, 7, 0}});
  test::run(*m, at::arange(9).view({1, 9}), std::make_shared<Routing>(1, 9, "attention"), &state);
  GenerateOptions session{.draft = {"linear", 4}};
  session.from = &state;
  EXPECT_THAT(message(session), HasSubstr("begin the session with drafts of as many tokens"));
}

// ---- on a GPU: the captured pass

ModelConfig verified_config(std::vector<std::vector<std::string>> mixers) {
  ModelConfig c;
  c.vocab_size = 320, c.num_layers = 3;
  c.layer.hidden_size = 256, c.layer.num_heads = 2, c.layer.head_dim = 128, c.layer.intermediate_size = 512;
  c.layer_mixers = std::move(mixers);
  return c;
}

// Against the captured step, token by token: logits, and the state behind what is kept, in modes that change among the tokens; the same inputs give the same bits.
TEST(SpeculativeCuda, APassOverTokensIsTheirSteps) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  const at::NoGradGuard no_grad;
  for (const auto& mixers : {std::vector<std::vector<std::string>>{{"gated_delta_net", "attention"}}, {{"gated_delta_net"}, {"gated_delta_net", "attention"}}}) {
    const ModelConfig c = verified_config(mixers);
    LanguageModel m(c, at::kBFloat16);
    m.initialize(3);
    m.to(at::kCUDA);
    const auto ids = drafted_prompt(600, c.vocab_size);
    for (const char* text : {"attention", "linear", "linear,attention@20:43,attention@530:"}) {
      const ModelSchedule schedule(c, text);
      for (const int64_t length : {int64_t{1}, int64_t{40}, int64_t{529}}) {
        for (int64_t T = 2; T <= 8; ++T) {
          const int64_t kept = 1 + (T * 7 + length) % T;
          SCOPED_TRACE(fmt::format("{} layers of {} mixers, {}: {} of {} tokens behind {}", c.num_layers, mixers.size(), text, kept, T, length));
          const std::span<const int32_t> all(ids);
          Session one(m, schedule, {.prompt_length = length, .tokens = 600}), together(m, schedule, {.prompt_length = length, .tokens = 600}), again(m, schedule, {.prompt_length = length, .tokens = 600});
          for (Session* s : {&one, &together, &again}) (void)s->extend(all.first(static_cast<size_t>(length)));
          std::string why;
          State probe = one.state().fork({0});
          ASSERT_NE(make_draft_verifier(m, probe, 600, &why), nullptr) << why;
          const auto few = all.subspan(static_cast<size_t>(length), static_cast<size_t>(T));
          const at::Tensor logits = together.steps(few).clone();
          EXPECT_TRUE(at::equal(again.steps(few), logits)) << "the same inputs, other bits";
          for (int64_t t = 0; t < kept; ++t) {
            const at::Tensor expected = one.step(few[static_cast<size_t>(t)]).to(at::kFloat), got = logits[t].to(at::kFloat);
            EXPECT_LT(((got - expected).norm() / expected.norm()).item<float>(), 3e-2) << "token " << t;
          }
          together.keep(kept), again.keep(kept);
          EXPECT_EQ(together.length(), one.length());
          const auto a = test::fixed_slots(m, together.state(), 0), b = test::fixed_slots(m, one.state(), 0);
          for (size_t i = 0; i < a.size(); ++i) {
            const at::Tensor x = a[i].second.to(at::kFloat), y = b[i].second.to(at::kFloat);
            EXPECT_LT(((x - y).norm() / y.norm().clamp_min(1e-20)).item<float>(), 3e-2) << a[i].first;
          }
          // On from there, with other tokens than those that were forgotten.
          for (const int32_t id : {17, 5}) {
            const at::Tensor got = together.step(id).to(at::kFloat), expected = one.step(id).to(at::kFloat);
            EXPECT_LT(((got - expected).norm() / expected.norm()).item<float>(), 3e-2);
          }
        }
      }
    }
  }
}

// Behind nothing, so that no product of a library runs: for compute-sanitizer. Modes that change from token to token.
TEST(SpeculativeSmallCuda, PassesFromTheFirstToken) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  const at::NoGradGuard no_grad;
  const ModelConfig c = verified_config({{"gated_delta_net", "attention"}});
  LanguageModel m(c, at::kBFloat16);
  m.initialize(3);
  m.to(at::kCUDA);
  const ModelSchedule schedule(c, "linear,periodic(attention=1;every=2)");
  const auto ids = drafted_prompt(24, c.vocab_size);
  const std::span<const int32_t> all(ids);
  Session one(m, schedule, {.prompt_length = 24, .tokens = 40}), together(m, schedule, {.prompt_length = 24, .tokens = 40});
  for (size_t at = 0; at < 16;) {
    const size_t count = 3 + at % 6, kept = 1 + at % count;
    const at::Tensor logits = together.steps(all.subspan(at, count)).clone();
    together.keep(static_cast<int64_t>(kept));
    for (size_t t = 0; t < kept; ++t) {
      const at::Tensor expected = one.step(ids[at + t]).to(at::kFloat), got = logits[static_cast<int64_t>(t)].to(at::kFloat);
      EXPECT_LT(((got - expected).norm() / expected.norm()).item<float>(), 3e-2) << at << " + " << t;
    }
    at += kept;
  }
}

// The likeliest tokens, fed back on the device or one by one on the host, and the session where it was.
TEST(SpeculativeCuda, TheLikeliestAreThoseOfSteps) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  const at::NoGradGuard no_grad;
  const ModelConfig c = verified_config({{"gated_delta_net", "attention"}});
  LanguageModel m(c, at::kBFloat16);
  m.initialize(3);
  m.to(at::kCUDA);
  const ModelSchedule attention(c, "attention"), linear(c, "linear");
  const auto ids = drafted_prompt(40, c.vocab_size);
  Session session(m, attention, {.prompt_length = 40, .tokens = 60});
  (void)session.extend(ids);
  std::vector<int32_t> expected;
  session.hold();
  for (int i = 0; i < 6; ++i) expected.push_back(static_cast<int32_t>(session.draft(i == 0 ? 7 : expected.back(), linear).narrow(0, 0, 300).argmax().item<int64_t>()));
  session.back();
  const auto before = test::fixed_slots(m, session.state(), 0);
  session.hold();
  EXPECT_EQ(session.draft_likeliest(7, 6, linear, 300), expected);
  session.back();
  test::expect_equal(test::fixed_slots(m, session.state(), 0), before);
  EXPECT_EQ(session.length(), 40);
}

// A drafter that knows the text and one that never does, over the captured step and pass: the logits of the text alone.
TEST(SpeculativeCuda, DraftsChangeNothingButRounding) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  const at::NoGradGuard no_grad;
  // The second is none that the captured pass knows: its passes run operator by operator.
  ModelConfig generic = verified_config({{"mamba2", "attention"}});
  generic.layer.head_dim = 64;
  for (const ModelConfig& c : {verified_config({{"gated_delta_net", "attention"}}), generic}) {
    LanguageModel m(c, at::kBFloat16);
    m.initialize(3);
    m.to(at::kCUDA);
    const ModelSchedule attention(c, "attention"), linear(c, "linear");
    const auto ids = drafted_prompt(120, c.vocab_size);
    const std::span<const int32_t> all(ids);
    for (const double acceptance : {0.0, 0.6, 1.0}) {
      SCOPED_TRACE(fmt::format("{} {}", c.layer.head_dim, acceptance));
      Session alone(m, attention, {.prompt_length = 50, .tokens = 120}), session(m, attention, {.prompt_length = 50, .tokens = 120});
      for (Session* s : {&alone, &session}) (void)s->extend(all.first(50));
      const auto draw = [&](const at::Tensor&, int64_t position) {
        const bool right = CounterRng(7, static_cast<uint64_t>(position)).uniform() < acceptance;
        return position < 120 ? (ids[static_cast<size_t>(position)] + (right ? 0 : 1)) % 320 : 0;
      };
      DraftedSession drafted(session, drafts_drawn(linear, draw), {"linear", 7, false}, &linear);
      for (size_t t = 50; t < 100; ++t) {
        const at::Tensor got = drafted.step(ids[t], 100 - static_cast<int64_t>(t)).to(at::kFloat), expected = alone.step(ids[t]).cpu().to(at::kFloat);
        EXPECT_LT(((got - expected).norm() / expected.norm()).item<float>(), 3e-2) << acceptance << " token " << t;
      }
      drafted.settle();
      EXPECT_EQ(session.length(), 100);
      EXPECT_GT(drafted.stats().passes, 0);
    }
  }
}

}  // namespace
}  // namespace oryx
