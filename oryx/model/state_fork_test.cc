// Forks, snapshots, budgets and session files, for random models and modes.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "oryx/common/error.h"
#include "oryx/io/safetensors.h"
#include "oryx/model/inspect.h"
#include "oryx/model/state_file.h"
#include "oryx/model/state_test_support.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using namespace test;
using ::testing::AllOf;
using ::testing::HasSubstr;

class EveryFork : public ::testing::TestWithParam<Case> {};

TEST_P(EveryFork, ForksThatDivergeAreEachAlone) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(31);
  // Lengths at, before and behind a page's end.
  for (const int64_t prompt : {1, 31, 64, 75}) {
    const StateOptions options{20, 2, false};
    const at::Tensor ids = random_ids(rng, 1, prompt, c.vocab_size);
    const auto modes = random_modes(rng, 1, prompt, c.mixers().size());
    State parent = m->make_state(1, options);
    feed(*m, parent, ids, modes, prompt, rng);
    const auto before = fixed_slots(*m, parent, 0);
    State forks = parent.fork({0, 0, 0});
    // The parent goes on elsewhere; its forks do not see that.
    const int64_t more = 70;
    const at::Tensor tails = random_ids(rng, 4, more, c.vocab_size);
    const auto tail_modes = random_modes(rng, 4, more, c.mixers().size());
    auto continued = [&](State& state, int64_t row) {
      return run(*m, tails.narrow(0, row, 1), routing(c, row_of(tail_modes, row), 0, more), &state);
    };
    const at::Tensor parents = continued(parent, 3);
    expect_equal(fixed_slots(*m, forks, 1), before);
    const std::vector<std::vector<int32_t>> three(tail_modes.begin(), tail_modes.begin() + 3);
    std::vector<at::Tensor> pieces;
    State nested = forks.fork({1});
    for (int64_t at = 0; at < more; at += 10) {
      const std::vector<std::vector<int32_t>>& all = three;
      std::vector<std::vector<int32_t>> piece;
      for (const auto& row : all) piece.emplace_back(row.begin() + at, row.begin() + at + 10);
      pieces.push_back(run(*m, tails.narrow(0, 0, 3).narrow(1, at, 10), routing(c, piece, 0, 10), &forks));
    }
    const at::Tensor together = at::cat(pieces, 1);
    for (int64_t row = 0; row < 4; ++row) {
      State alone = m->make_state(1, options);
      run(*m, ids, routing(c, modes, 0, prompt), &alone);
      const at::Tensor expected = continued(alone, row);
      EXPECT_LT(fixture_error(row < 3 ? together[row].unsqueeze(0) : parents, expected), kTolerance) << "fork " << row << " at " << prompt;
      if (row != 1) continue;
      EXPECT_LT(fixture_error(continued(nested, 1), expected), kTolerance) << "a fork of a fork";
    }
  }
}

TEST_P(EveryFork, ForksTrimAndWriteIntoWhatTheyShared) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(32);
  const int64_t T = 100;
  const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size), other = random_ids(rng, 1, T, c.vocab_size);
  const auto modes = random_modes(rng, 1, T, c.mixers().size());
  State state = m->make_state(1, {0, 0, true});
  run(*m, ids, routing(c, modes, 0, T), &state);
  State fork = state.fork({0});
  fork.trim(0, 40, *m);
  const at::Tensor forked = run(*m, other.narrow(1, 40, 50), routing(c, modes, 40, 90), &fork);
  state.trim(0, 50, *m);
  const at::Tensor own = run(*m, ids.narrow(1, 50, 50), routing(c, modes, 50, T), &state);
  State alone = m->make_state(1);
  const at::Tensor whole = run(*m, ids, routing(c, modes, 0, T), &alone);
  EXPECT_LT(fixture_error(own, whole.narrow(1, 50, 50)), kTolerance);
  State second = m->make_state(1);
  run(*m, ids.narrow(1, 0, 40), routing(c, modes, 0, 40), &second);
  EXPECT_LT(fixture_error(forked, run(*m, other.narrow(1, 40, 50), routing(c, modes, 40, 90), &second)), kTolerance);
}

TEST_P(EveryFork, RestoreIsTheSnapshotBitForBit) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(33);
  const int64_t T = 60;
  const at::Tensor ids = random_ids(rng, 2, T, c.vocab_size);
  const auto modes = random_modes(rng, 2, T, c.mixers().size());
  State state = m->make_state(2, {0, 3, false});
  feed(*m, state, ids, modes, 40, rng);
  const State snapshot = state.snapshot();
  const at::Tensor first = run(*m, ids.narrow(1, 40, 20), routing(c, modes, 40, T), &state);
  for (int i = 0; i < 2; ++i) {
    state.restore(snapshot);
    EXPECT_EQ(state.lengths(), (std::vector<int64_t>{40, 40}));
    EXPECT_TRUE(at::equal(run(*m, ids.narrow(1, 40, 20), routing(c, modes, 40, T), &state), first));
  }
}

TEST_P(EveryFork, SaveLoadContinueIsContinue) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(34);
  const TemporaryFolder folder;
  const auto path = folder.path() / "session.safetensors";
  const int64_t T = 80;
  const at::Tensor ids = random_ids(rng, 2, T, c.vocab_size);
  const auto modes = random_modes(rng, 2, T, c.mixers().size());
  State state = m->make_state(2, {16, 2, true});
  feed(*m, state, ids, modes, 50, rng);
  state.trim(1, 37, *m);
  save_state(*m, state, path);
  State loaded = load_state(*m, path);
  EXPECT_EQ(loaded.lengths(), state.lengths());
  EXPECT_EQ(loaded.checkpoints(), state.checkpoints());
  EXPECT_FALSE(loaded.checkpoints()[0].empty());
  for (int64_t n = 0; n < 2; ++n) expect_equal(fixed_slots(*m, loaded, n), fixed_slots(*m, state, n));
  auto continued = [&](State& s) {
    const std::vector<std::vector<int32_t>> packed = {modes[0]};
    return run(*m, ids.narrow(0, 0, 1).narrow(1, 0, 40), routing(c, packed, 0, 40), &s, at::tensor({0, 20, 40}, at::kInt));
  };
  EXPECT_TRUE(at::equal(continued(loaded), continued(state)));
  for (State* s : {&loaded, &state}) {
    s->trim(0, 21, *m);
    s->trim(1, 1, *m);
  }
  EXPECT_LT(fixture_error(continued(loaded), continued(state)), kTolerance);
}

INSTANTIATE_TEST_SUITE_P(Models, EveryFork, ::testing::ValuesIn(cases()), [](const auto& info) { return info.param.name; });

template <typename F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "";
}

TEST(StateFork, FullPagesAreHeldOnce) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  CounterRng rng(35);
  const int64_t T = 2 * RowStore::kPageTokens + 5;
  State state = m->make_state(1);
  run(*m, random_ids(rng, 1, T, c.vocab_size), routing(c, random_modes(rng, 1, T, 2), 0, T), &state);
  const State forks = state.fork({0, 0, 0});
  const int64_t row = state_bytes(c, 1).tokens;
  EXPECT_EQ(state.bytes().tokens, T * row);
  EXPECT_EQ(forks.bytes().tokens, (2 * RowStore::kPageTokens + 3 * 5) * row);
  EXPECT_EQ(forks.bytes().recurrent, 3 * state.bytes().recurrent);
}

TEST(StateFork, TheBudgetIsOneForAllForks) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  CounterRng rng(36);
  const StateBytes each = state_bytes(c, RowStore::kPageTokens);
  StateOptions options;
  options.budget = 3 * (each.recurrent + each.tails) + 2 * each.tokens;
  State state = m->make_state(1, options);
  state.reserve(RowStore::kPageTokens);
  const at::Tensor ids = random_ids(rng, 1, 200, c.vocab_size);
  const auto modes = random_modes(rng, 1, 200, 2);
  run(*m, ids.narrow(1, 0, 20), routing(c, modes, 0, 20), &state);
  {
    const State one = state.fork({0});  // recurrent, tails and a copy of the page
    const std::string error = error_of([&] { (void)state.fork({0}); });
    EXPECT_THAT(error, HasSubstr("the state's budget is "));
    EXPECT_THAT(error, HasSubstr("drop a fork or a snapshot, trim, or raise the budget"));
  }
  const State again = state.fork({0});  // what was dropped is free again
  // A call that does not fit changes nothing.
  const auto before = fixed_slots(*m, state, 0);
  EXPECT_THAT(error_of([&] { run(*m, ids, routing(c, modes, 0, 200), &state); }), HasSubstr("budget"));
  EXPECT_EQ(state.lengths()[0], 20);
  expect_equal(fixed_slots(*m, state, 0), before);
  run(*m, ids.narrow(1, 20, 12), routing(c, modes, 20, 32), &state);
  EXPECT_THAT(error_of([&] {
                StateOptions little;
                little.budget = 100;
                (void)m->make_state(1, little);
              }),
              HasSubstr("budget"));
}

// Rows in pages of some tokens, recurrent states and tails in pages of one position each: two sizes, one budget that both draw on.
TEST(StateFork, RowsAndRecurrentStatesHavePoolsOfTheirOwn) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  CounterRng rng(38);
  const int64_t T = 24;
  const StateBytes each = state_bytes(c, 1);
  for (const int64_t page : {4, 8}) {
    StateOptions options;
    options.page_tokens = page;
    options.checkpoint_every = 8;
    // Just what these tokens, their state and three checkpoints take.
    options.budget = 4 * (each.recurrent + each.tails) + T * each.tokens;
    State state = m->make_state(1, options);
    EXPECT_EQ(state.row_pool().page_bytes, page * each.tokens);
    EXPECT_EQ(state.fixed_pool().page_bytes, each.recurrent + each.tails);
    EXPECT_EQ(state.fixed_pool().pages, 0);
    state.reserve(T);
    EXPECT_EQ(state.row_pool().pages, T / page);
    const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size);
    const auto modes = random_modes(rng, 1, T, 2);
    for (int64_t at = 0; at < T; at += 8) run(*m, ids.narrow(1, at, 8), routing(c, modes, at, at + 8), &state);
    EXPECT_EQ(state.row_pool().pages, T / page);
    EXPECT_EQ(state.fixed_pool().pages, 3);
    EXPECT_EQ(state.reserved_bytes().total(), options.budget);
    EXPECT_THAT(error_of([&] { (void)state.fork({0}); }), HasSubstr("budget"));
    state.thin_checkpoints(0);
    const State fork = state.fork({0});  // what the checkpoints held serves the fork
    EXPECT_EQ(fork.lengths()[0], T);
  }
}

TEST(StateFile, RefusesAnotherModelAndDamage) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  CounterRng rng(37);
  const TemporaryFolder folder;
  const auto path = folder.path() / "session.safetensors";
  State state = m->make_state(1);
  run(*m, random_ids(rng, 1, 40, c.vocab_size), routing(c, random_modes(rng, 1, 40, 2), 0, 40), &state);
  save_state(*m, state, path);
  EXPECT_EQ(load_state(*m, path).lengths()[0], 40);

  const auto other = make(c);
  {
    at::NoGradGuard no_grad;
    at::Tensor last = other->parameters().back();
    last.view({-1})[0].add_(1);
  }
  const auto refused = [&](const LanguageModel& model) { return error_of([&] { (void)load_state(model, path); }); };
  EXPECT_THAT(refused(*other), AllOf(HasSubstr("is the session of another model"), HasSubstr("the configs are the same, the weights differ")));
  ModelConfig longer = c;
  longer.layer.window = 10;
  EXPECT_THAT(refused(*make(longer)), AllOf(HasSubstr("is the session of another model"), HasSubstr("the configs differ")));
  const LanguageModel half(c, at::kBFloat16);
  EXPECT_THAT(refused(half), AllOf(HasSubstr("is the session of another model"), HasSubstr("it was saved in Float, this one computes in BFloat16")));

  // Files with the right fingerprint and the wrong content.
  const SafetensorsReader file(path);
  auto rewritten = [&](auto change) {
    NamedTensors tensors;
    for (const auto& [name, info] : file.tensors()) tensors.emplace_back(name, file.load(name));
    auto metadata = file.metadata();
    change(tensors, metadata);
    write_safetensors(folder.path() / "bad.safetensors", tensors, metadata);
    return error_of([&] { (void)load_state(*m, folder.path() / "bad.safetensors"); });
  };
  EXPECT_THAT(rewritten([](auto& t, auto&) { t.pop_back(); }), HasSubstr("is missing"));
  EXPECT_THAT(rewritten([](auto&, auto& meta) { meta["lengths"] = "1000000000"; }), HasSubstr("not of 1000000000 tokens"));
  EXPECT_THAT(rewritten([](auto&, auto& meta) { meta["lengths"] = "40,x"; }), HasSubstr("expected integers"));
  EXPECT_THAT(rewritten([](auto&, auto& meta) { meta["checkpoints"] = "41"; }), HasSubstr("a checkpoint at 41"));
  EXPECT_THAT(rewritten([](auto&, auto& meta) { meta["format"] = "pt"; }), HasSubstr("expected 'oryx-state 1'"));
  EXPECT_THAT(rewritten([](auto&, auto& meta) { meta.erase("model"); }), HasSubstr("no 'model'"));
  EXPECT_THAT(rewritten([](auto& t, auto&) { t.front().second = t.front().second.to(at::kDouble); }), HasSubstr("expected"));
}

}  // namespace
}  // namespace oryx
