// Rows kept by choice beside the first and the last ones: which ones, and the contract of a state under it.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "oryx/common/error.h"
#include "oryx/model/inspect.h"
#include "oryx/model/state_file.h"
#include "oryx/model/state_test_support.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using namespace test;
using ::testing::HasSubstr;

constexpr int64_t kKeptFirst = 2, kKeptWindow = 6;

StateOptions kept_options(const std::string& rule, int64_t back = 0, int64_t every = 0, int64_t ring = 0) {
  StateOptions o;
  set_kv(o, fmt::format("{},first={},window={}", rule, kKeptFirst, kKeptWindow));
  o.bound.back = back;
  o.checkpoint_every = every;
  o.ring = ring;
  o.page_tokens = 4;
  return o;
}

std::vector<Case> kept_cases() {
  std::vector<Case> all;
  for (const char* name : {"oryx_gdn", "oryx_mamba2", "oryx_kda", "intra_layer", "window_own_query", "own_kv", "qk_norm_untied"}) {
    for (const Case& c : cases()) {
      if (c.name == name) all.push_back(c);
    }
  }
  return all;
}

// Positions that layer i keeps of sequence n, those that only a trim may want left out.
std::vector<int64_t> positions_of(const State& state, int64_t i, int64_t n) {
  std::vector<int64_t> all;
  for (const KeptRow& row : state.kept().kept(i, n)) {
    if (row.until == KeptRow::kAlive) all.push_back(row.position);
  }
  return all;
}

class EveryKept : public ::testing::TestWithParam<Case> {};

TEST_P(EveryKept, KeepingAllIsKeepingEverything) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(300);
  const int64_t N = 2, T = 50;
  const at::Tensor ids = random_ids(rng, N, T, c.vocab_size);
  const auto modes = random_modes(rng, N, T, c.mixers().size());
  State plain = m->make_state(N);
  const at::Tensor expected = run(*m, ids, routing(c, modes, 0, T), &plain);
  for (const int64_t step : {T, int64_t{17}, int64_t{1}}) {
    State state = m->make_state(N, kept_options("surprise:share=100%"));
    std::vector<at::Tensor> out;
    for (int64_t at = 0; at < T; at += step) {
      const int64_t n = std::min(step, T - at);
      out.push_back(run(*m, ids.narrow(1, at, n), routing(c, modes, at, at + n), &state));
    }
    EXPECT_LT(fixture_error(at::cat(out, 1), expected), kTolerance) << "pieces of " << step;
  }
}

// Whole, in random pieces, token by token and packed with another: the same rows are kept, and the outputs are the same.
TEST_P(EveryKept, AnySplitKeepsTheSameRows) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  for (const char* rule : {"surprise:budget=5", "surprise:share=20%", "surprise:threshold=1.0", "random:budget=7", "write:budget=4,threshold=0.01"}) {
    CounterRng rng(310);
    const int64_t T = 48;
    const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size), other = random_ids(rng, 1, 33, c.vocab_size);
    const auto modes = random_modes(rng, 1, T, c.mixers().size()), other_modes = random_modes(rng, 1, 33, c.mixers().size());
    State whole = m->make_state(1, kept_options(rule));
    const at::Tensor expected = run(*m, ids, routing(c, modes, 0, T), &whole);
    State single = m->make_state(1, kept_options(rule)), pieces = m->make_state(1, kept_options(rule)), packed = m->make_state(2, kept_options(rule));
    std::vector<at::Tensor> one, some;
    for (int64_t t = 0; t < T; ++t) one.push_back(run(*m, ids.narrow(1, t, 1), routing(c, modes, t, t + 1), &single));
    for (int64_t at = 0; at < T;) {
      const int64_t n = std::min<int64_t>(T - at, 1 + static_cast<int64_t>(rng.below(25)));
      some.push_back(run(*m, ids.narrow(1, at, n), routing(c, modes, at, at + n), &pieces));
      at += n;
    }
    auto both = other_modes;
    both[0].insert(both[0].end(), modes[0].begin(), modes[0].end());
    const at::Tensor row = run(*m, at::cat({other, ids}, 1), routing(c, both, 0, 33 + T), &packed, at::tensor({0, 33, 33 + static_cast<int>(T)}, at::kInt));
    EXPECT_LT(fixture_error(at::cat(one, 1), expected), kTolerance) << rule;
    EXPECT_LT(fixture_error(at::cat(some, 1), expected), kTolerance) << rule;
    EXPECT_LT(fixture_error(row.narrow(1, 33, T), expected), kTolerance) << rule;
    for (int64_t i = 0; i < c.num_layers; ++i) {
      const auto rows = positions_of(whole, i, 0);
      EXPECT_EQ(positions_of(single, i, 0), rows) << rule << " layer " << i;
      EXPECT_EQ(positions_of(pieces, i, 0), rows) << rule << " layer " << i;
      EXPECT_EQ(positions_of(packed, i, 1), rows) << rule << " layer " << i;
    }
  }
}

// A budget holds the most surprising of the tokens that have left the window, all the time; bytes are as predicted.
TEST_P(EveryKept, ABudgetIsTheMostSurprising) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  const int64_t T = 40, B = 6;
  CounterRng rng(320);
  const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size);
  const auto modes = random_modes(rng, 1, T, c.mixers().size());
  const StateOptions options = kept_options("surprise:budget=6"), all_options = kept_options("surprise:share=100%");
  State state = m->make_state(1, options), all = m->make_state(1, all_options);
  int evicted = 0;
  for (int64_t t = 0; t < T; ++t) {
    const auto piece = routing(c, modes, t, t + 1);
    const auto before = positions_of(state, 0, 0);
    run(*m, ids.narrow(1, t, 1), piece, &state);
    run(*m, ids.narrow(1, t, 1), piece, &all);
    // The first layer's scores do not hang on what attention saw.
    std::vector<std::pair<float, int64_t>> scores;
    for (const KeptRow& row : all.kept().kept(0, 0)) scores.emplace_back(-row.score, row.position);
    EXPECT_EQ(static_cast<int64_t>(scores.size()), std::max<int64_t>(0, t + 1 - kKeptWindow - kKeptFirst));
    std::sort(scores.begin(), scores.end());
    std::set<int64_t> best;
    for (size_t k = 0; k < std::min<size_t>(scores.size(), B); ++k) best.insert(scores[k].second);
    const auto kept = positions_of(state, 0, 0);
    EXPECT_EQ(std::set<int64_t>(kept.begin(), kept.end()), best) << t;
    for (const int64_t p : before) evicted += best.count(p) == 0 ? 1 : 0;
    for (int64_t i = 0; i < c.num_layers; ++i) EXPECT_EQ(state.kept().kept(i, 0).size(), best.size());
    EXPECT_EQ(state.bytes().tokens, state_bytes(c, t + 1, at::kFloat, options).tokens) << t;
    EXPECT_EQ(all.bytes().tokens, state_bytes(c, t + 1, at::kFloat, all_options).tokens) << t;
    EXPECT_LE(state.kept().reserved_bytes(), B * state.kept().bytes() / std::max<int64_t>(1, static_cast<int64_t>(best.size())));
  }
  EXPECT_GT(evicted, 0);
}

// Where it can be reached, a position is as if the rest had never been seen, kept rows included; else one line says so.
TEST_P(EveryKept, TrimIsExactOrSaysWhereItIs) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  int reached = 0, refused = 0, far = 0;
  for (const StateOptions& options : {kept_options("surprise:budget=5", 24, 6), kept_options("write:budget=5"), kept_options("surprise:threshold=0.9", 20, 5),
                                      kept_options("surprise:share=30%", 0, 0, 4), kept_options("random:budget=8", 12, 4, 3)}) {
    CounterRng rng(330);
    const int64_t T = 64;
    const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size), more = random_ids(rng, 1, 11, c.vocab_size);
    const auto modes = random_modes(rng, 1, T, c.mixers().size()), more_modes = random_modes(rng, 1, 11, c.mixers().size());
    State state = m->make_state(1, options);
    feed(*m, state, ids, modes, T - 5, rng);
    for (int64_t t = T - 5; t < T; ++t) run(*m, ids.narrow(1, t, 1), routing(c, modes, t, t + 1), &state);
    for (int64_t length = T - 1; length >= 0; length -= 1 + static_cast<int64_t>(rng.below(9))) {
      State fork = state.fork({0});
      const int64_t nearest = fork.reachable(0, length);
      if (nearest < length) {
        ++refused;
        try {
          fork.trim(0, length, *m);
          ADD_FAILURE() << length;
        } catch (const Error& e) {
          EXPECT_THAT(e.what(), HasSubstr(fmt::format("cannot trim to {} of {} tokens", length, T)));
          EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
        }
        EXPECT_EQ(fork.lengths()[0], T);
        continue;
      }
      ++reached;
      far += length > 10 ? 1 : 0;
      fork.trim(0, length, *m);
      StateOptions plain = options;
      plain.ring = plain.checkpoint_every = 0;
      State fresh = m->make_state(1, plain);
      if (length > 0) run(*m, ids.narrow(1, 0, length), routing(c, modes, 0, length), &fresh);
      expect_near(*m, fork, 0, fresh, 0);
      for (int64_t i = 0; i < c.num_layers; ++i) EXPECT_EQ(positions_of(fork, i, 0), positions_of(fresh, i, 0)) << "trim to " << length;
      const at::Tensor expected = run(*m, more, routing(c, more_modes, 0, 11), &fresh);
      EXPECT_LT(fixture_error(run(*m, more, routing(c, more_modes, 0, 11), &fork), expected), kTolerance) << "trim to " << length;
      for (int64_t i = 0; i < c.num_layers; ++i) EXPECT_EQ(positions_of(fork, i, 0), positions_of(fresh, i, 0)) << "behind a trim to " << length;
    }
  }
  EXPECT_GT(reached, c.layer.share_kv ? 5 : 0);
  EXPECT_GT(refused, 2);
  // Without shared rows nothing replays the recurrence, and only checkpoints are reached.
  EXPECT_GT(far, c.layer.share_kv ? 4 : -1);
}

TEST_P(EveryKept, ForksSnapshotsAndFilesGoOnAlike) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  const TemporaryFolder folder;
  const auto path = folder.path() / "session.safetensors";
  CounterRng rng(340);
  const StateOptions options = kept_options("surprise:budget=6", 10, 5);
  const at::Tensor ids = random_ids(rng, 2, 50, c.vocab_size), more = random_ids(rng, 2, 20, c.vocab_size);
  const auto modes = random_modes(rng, 2, 50, c.mixers().size()), more_modes = random_modes(rng, 2, 20, c.mixers().size());
  State state = m->make_state(2, options);
  feed(*m, state, ids, modes, 50, rng);
  const State snapshot = state.snapshot();
  save_state(*m, state, path);
  State loaded = load_state(*m, path), swapped = state.fork({1, 0});
  EXPECT_EQ(kv_text(loaded.options()), kv_text(options));
  EXPECT_EQ(loaded.bytes().tokens, state.bytes().tokens);
  EXPECT_EQ(loaded.reachable(0, 47), state.reachable(0, 47));
  const at::Tensor expected = run(*m, more, routing(c, more_modes, 0, 20), &state);
  // Kept rows stand in another order: the same sum, otherwise rounded.
  EXPECT_LT(fixture_error(run(*m, more, routing(c, more_modes, 0, 20), &loaded), expected), kTolerance);
  const at::Tensor other = run(*m, more.flip(0), routing(c, {more_modes[1], more_modes[0]}, 0, 20), &swapped);
  EXPECT_LT(fixture_error(other.flip(0), expected), kTolerance);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    EXPECT_EQ(positions_of(loaded, i, 1), positions_of(state, i, 1));
    EXPECT_EQ(positions_of(swapped, i, 0), positions_of(state, i, 1));
  }
  state.restore(snapshot);
  EXPECT_TRUE(at::equal(run(*m, more, routing(c, more_modes, 0, 20), &state), expected));
}

INSTANTIATE_TEST_SUITE_P(Models, EveryKept, ::testing::ValuesIn(kept_cases()), [](const auto& info) { return info.param.name; });

std::string kv_error(const std::string& text) {
  try {
    StateOptions o;
    set_kv(o, text);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(StateKept, AsText) {
  for (const char* text : {"surprise:budget=256,first=4,window=64", "surprise:share=10%,first=0,window=16", "random:threshold=0.5,seed=3,first=4,window=64",
                           "surprise:budget=7,share=2.5%,threshold=-1,first=1,window=1", "bounded:4+1024", "keep", "drop"}) {
    StateOptions o;
    set_kv(o, text);
    EXPECT_EQ(kv_text(o), text);
  }
  StateOptions o;
  set_kv(o, "surprise:share=0.1");
  EXPECT_EQ(kv_text(o), "surprise:share=10%,first=4,window=64");
  EXPECT_EQ(o.kept.limit(30), 3);
  EXPECT_EQ(o.kept.limit(31), 4);
  for (const char* text : {"surprize:budget=4", "surprise:budget=0", "surprise:budget=-3", "surprise:share=120%", "surprise:share=0", "surprise:budget", "surprise:rows=3",
                           "surprise:budget=3,window=0", "surprise:threshold=x"}) {
    EXPECT_THAT(kv_error(text), HasSubstr("expected keep, drop or bounded:F+W")) << text;
  }
  EXPECT_THAT(kv_error("surprise:budget=x"), HasSubstr("rows kept by a policy (random, surprise, write)"));
  EXPECT_THAT(kv_error("surprise:"), HasSubstr("how many is not said"));
  EXPECT_THAT(kv_error("surprise:window=8"), HasSubstr("how many is not said"));
}

TEST(StateKept, RefusesWhatCannotBe) {
  const auto error_of_state = [](const LanguageModel& m, const StateOptions& o) -> std::string {
    try {
      (void)m.make_state(1, o);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  const auto attention = make(small({{"gated_delta_net"}, {"attention"}}));
  EXPECT_THAT(error_of_state(*attention, kept_options("surprise:budget=4")), HasSubstr("a layer's mixers are attention, none of which predicts values"));
  EXPECT_EQ(error_of_state(*attention, kept_options("random:budget=4")), "");
  StateOptions alone = kept_options("surprise:budget=4");
  alone.bound = {};
  EXPECT_THAT(error_of_state(*make(small({{"mamba2", "attention"}})), alone), HasSubstr("stand beside those of a window"));
}

// A call under a budget of bytes that its kept rows may not fit into is refused before anything has changed.
TEST(StateKept, TheBudgetOfBytesIsAskedFirst) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  CounterRng rng(350);
  const at::Tensor ids = random_ids(rng, 1, 200, c.vocab_size);
  const auto modes = random_modes(rng, 1, 200, 2);
  StateOptions options = kept_options("surprise:threshold=-1");
  State free = m->make_state(1, options);
  run(*m, ids.narrow(1, 0, 40), routing(c, modes, 0, 40), &free);
  options.budget = free.reserved_bytes().total() + 4096;
  State tight = m->make_state(1, options);
  run(*m, ids.narrow(1, 0, 20), routing(c, modes, 0, 20), &tight);
  const auto before = fixed_slots(*m, tight, 0);
  EXPECT_THROW(run(*m, ids.narrow(1, 20, 180), routing(c, modes, 20, 200), &tight), Error);
  EXPECT_EQ(tight.lengths()[0], 20);
  expect_equal(fixed_slots(*m, tight, 0), before);
}

// A model whose weights are damaged ends in a line, not in rows chosen by nothing.
TEST(StateKept, ScoresAreFinite) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  {
    at::NoGradGuard no_grad;
    m->parameter("layers.0.mixer.v_proj.weight").data().fill_(std::numeric_limits<float>::infinity());
  }
  CounterRng rng(360);
  State state = m->make_state(1, kept_options("surprise:budget=4"));
  const auto modes = random_modes(rng, 1, 40, 2);
  try {
    run(*m, random_ids(rng, 1, 40, c.vocab_size), routing(c, modes, 0, 40), &state);
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("the score of token 2 in layer 0 by 'surprise' is"));
  }
}

}  // namespace
}  // namespace oryx
