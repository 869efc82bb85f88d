// Bounded rows: constant memory, and the contract of a state under it.
#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/error.h"
#include "oryx/model/inspect.h"
#include "oryx/model/state_file.h"
#include "oryx/model/state_test_support.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using namespace test;
using ::testing::HasSubstr;

StateOptions bounded(int64_t first, int64_t window, int64_t back = 0, int64_t every = 0, int64_t ring = 0) {
  StateOptions o;
  o.bound = {first, window, back};
  o.checkpoint_every = every;
  o.ring = ring;
  o.page_tokens = 4;
  return o;
}

class EveryBound : public ::testing::TestWithParam<Case> {};

// What stands at `length` is what a state that never saw more holds, and goes on as that does.
void expect_as_fresh(const LanguageModel& m, State& state, const StateOptions& options, const at::Tensor& ids, const std::vector<std::vector<int32_t>>& modes,
                     int64_t length, const at::Tensor& more, const std::vector<std::vector<int32_t>>& more_modes, const std::string& where) {
  SCOPED_TRACE(where);
  StateOptions plain = options;
  plain.ring = plain.checkpoint_every = 0;
  State fresh = m.make_state(1, plain);
  if (length > 0) run(m, ids.narrow(1, 0, length), routing(m.config(), modes, 0, length), &fresh);
  expect_near(m, state, 0, fresh, 0);
  const int64_t T = more.size(1);
  const at::Tensor expected = run(m, more, routing(m.config(), more_modes, 0, T), &fresh);
  EXPECT_LT(fixture_error(run(m, more, routing(m.config(), more_modes, 0, T), &state), expected), kTolerance);
}

TEST_P(EveryBound, TrimIsExactOrSaysWhereItIs) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  int reached = 0, refused = 0;
  for (StateOptions options : {bounded(3, 7), bounded(0, 5, 20, 8), bounded(4, 16, 6, 3, 2), bounded(2, 9, 0, 0, 4), bounded(40, 8, 30, 10)}) {
    options.keep_rows = true;
    CounterRng rng(90 + options.ring + options.checkpoint_every);
    const int64_t T = 100;
    const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size), more = random_ids(rng, 1, 9, c.vocab_size);
    const auto modes = random_modes(rng, 1, T, c.mixers().size()), more_modes = random_modes(rng, 1, 9, c.mixers().size());
    State state = m->make_state(1, options);
    feed(*m, state, ids, modes, T, rng);
    for (int64_t length = T; length >= 0; length -= 1 + static_cast<int64_t>(rng.below(13))) {
      State fork = state.fork({0});
      const int64_t nearest = fork.reachable(0, length);
      EXPECT_LE(nearest, length);
      if (nearest == length) {
        fork.trim(0, length, *m);
        expect_as_fresh(*m, fork, options, ids, modes, length, more, more_modes, fmt::format("trim to {} with {}", length, options.bound.window));
        ++reached;
        continue;
      }
      ++refused;
      const auto before = fixed_slots(*m, fork, 0);
      try {
        fork.trim(0, length, *m);
        ADD_FAILURE() << "to " << length;
      } catch (const Error& e) {
        EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
        EXPECT_THAT(e.what(), HasSubstr(fmt::format("cannot trim to {} of {} tokens", length, T)));
        EXPECT_THAT(e.what(), HasSubstr(std::to_string(nearest)));
      }
      expect_equal(fixed_slots(*m, fork, 0), before);
      fork.trim(0, nearest, *m);
      EXPECT_EQ(fork.lengths()[0], nearest);
    }
    // The start and, where rows are enough to replay, every one of the first tokens.
    EXPECT_EQ(state.reachable(0, 0), 0);
  }
  EXPECT_GT(reached, 5);
  EXPECT_GT(refused, 3);
}

// A draft is dropped as it is without a bound: by a copy.
TEST_P(EveryBound, ARejectedDraftIsFree) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(91);
  const int64_t T = 80, R = 3;
  const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size);
  const auto modes = random_modes(rng, 1, T, c.mixers().size());
  const StateOptions options = bounded(2, 6, 0, 0, R);
  State state = m->make_state(1, options), straight = m->make_state(1, options);
  for (int64_t t = 0; t + R < T; ++t) {
    const auto before = fixed_slots(*m, state, 0);
    for (int64_t d = 0; d < R; ++d) run(*m, ids.narrow(1, t + d, 1), routing(c, modes, t + d, t + d + 1), &state);
    state.trim(0, t, *m);
    expect_equal(fixed_slots(*m, state, 0), before);
    const at::Tensor a = run(*m, ids.narrow(1, t, 1), routing(c, modes, t, t + 1), &state);
    EXPECT_TRUE(at::equal(a, run(*m, ids.narrow(1, t, 1), routing(c, modes, t, t + 1), &straight))) << t;
  }
}

// Tokens that come again stand where the rejected ones did, unless a fork still holds those.
TEST_P(EveryBound, ARejectedPageGivesItsPlaceBack) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(92);
  const at::Tensor ids = random_ids(rng, 1, 11, c.vocab_size);
  const auto modes = random_modes(rng, 1, 11, c.mixers().size());
  const auto go = [&](State& s, int64_t begin, int64_t end) { run(*m, ids.narrow(1, begin, end - begin), routing(c, modes, begin, end), &s); };
  const auto places = [](const State& s) {
    std::vector<int64_t> out;
    for (const auto& p : s.numbered_pages(0)) out.push_back(p.number);
    return out;
  };
  State state = m->make_state(1, bounded(8, 64, 0, 0, 6));
  go(state, 0, 7);
  go(state, 7, 11);
  const std::vector<int64_t> straight = places(state);
  if (straight.empty()) GTEST_SKIP() << "no rows are kept";
  ASSERT_EQ(straight.size(), 3U);
  state.trim(0, 7, *m);
  go(state, 7, 11);
  EXPECT_EQ(places(state), straight);
  State fork = state.fork({0});
  const auto before = fixed_slots(*m, fork, 0);
  state.trim(0, 7, *m);
  go(state, 7, 11);
  EXPECT_NE(places(state).back(), places(fork).back());
  expect_equal(fixed_slots(*m, fork, 0), before);
}

TEST_P(EveryBound, ForksSnapshotsAndFilesGoOnAlike) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  const TemporaryFolder folder;
  const auto path = folder.path() / "session.safetensors";
  for (const int64_t prompt : {5, 23, 64}) {
    CounterRng rng(92 + prompt);
    const StateOptions options = bounded(3, 10, 12, 5, 2);
    const int64_t more = 36;
    const at::Tensor ids = random_ids(rng, 2, prompt, c.vocab_size), tails = random_ids(rng, 2, more, c.vocab_size);
    const auto modes = random_modes(rng, 2, prompt, c.mixers().size()), tail_modes = random_modes(rng, 2, more, c.mixers().size());
    State state = m->make_state(2, options);
    feed(*m, state, ids, modes, prompt, rng);
    const auto continued = [&](State& s) {
      std::vector<at::Tensor> out;
      for (int64_t at = 0; at < more; at += 6) {
        std::vector<std::vector<int32_t>> piece;
        for (const auto& row : tail_modes) piece.emplace_back(row.begin() + at, row.begin() + at + 6);
        out.push_back(run(*m, tails.narrow(1, at, 6), routing(c, piece, 0, 6), &s));
      }
      return at::cat(out, 1);
    };
    const State snapshot = state.snapshot();
    save_state(*m, state, path);
    State loaded = load_state(*m, path), fork = state.fork({0, 1}), twins = state.fork({1, 1});
    EXPECT_EQ(loaded.lengths(), state.lengths());
    EXPECT_EQ(loaded.rows_from(), state.rows_from());
    EXPECT_EQ(loaded.checkpoints(), state.checkpoints());
    EXPECT_EQ(loaded.bytes().tokens, state.bytes().tokens);
    for (int64_t n = 0; n < 2; ++n) {
      for (int64_t p = prompt; p >= 0; --p) {
        const std::vector<int64_t> at = loaded.checkpoints()[static_cast<size_t>(n)];
        if (std::find(at.begin(), at.end(), p) == at.end()) continue;
        EXPECT_EQ(loaded.reachable(n, p), state.reachable(n, p));
      }
    }
    const at::Tensor expected = continued(state);
    EXPECT_TRUE(at::equal(continued(loaded), expected)) << prompt;
    EXPECT_TRUE(at::equal(continued(fork), expected)) << prompt;
    const at::Tensor both = continued(twins);
    EXPECT_LT(fixture_error(both[1], expected[1]), kTolerance) << prompt;
    state.restore(snapshot);
    EXPECT_EQ(state.lengths()[0], prompt);
    EXPECT_TRUE(at::equal(continued(state), expected)) << prompt;
    State again = snapshot.fork({0, 1});
    EXPECT_TRUE(at::equal(continued(again), expected)) << "the snapshot is as it was";
  }
}

TEST_P(EveryBound, MemoryIsConstantAndAsPredicted) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(93);
  for (StateOptions options : {bounded(3, 7), bounded(4, 9, 5, 3, 2)}) {
    const int64_t T = 240;
    const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size);
    const auto modes = random_modes(rng, 1, T, c.mixers().size());
    State state = m->make_state(1, options);
    const RowBound rows = state.row_bound();
    const int64_t row = state_bytes(c, 1, at::kFloat, bounded(3, 7)).tokens;
    int64_t reserved = 0;
    for (int64_t at = 0; at < T;) {
      const int64_t n = std::min<int64_t>(T - at, 1 + static_cast<int64_t>(rng.below(at % 3 == 0 ? 40 : 3)));
      run(*m, ids.narrow(1, at, n), routing(c, modes, at, at + n), &state);
      at += n;
      const StateBytes measured = state.bytes(), predicted = state_bytes(c, at, at::kFloat, options);
      EXPECT_EQ(measured.tokens, std::min(at, rows.first + rows.last) * row);
      EXPECT_EQ(measured.tokens, predicted.tokens);
      EXPECT_EQ(measured.recurrent, predicted.recurrent);
      EXPECT_LE(measured.checkpoints, predicted.checkpoints);
      if (at > 120) {
        if (reserved == 0) reserved = state.reserved_bytes().tokens;
        EXPECT_EQ(state.reserved_bytes().tokens, reserved) << "at " << at;
      }
    }
    EXPECT_LE(reserved, (rows.first + 2 * rows.last + 6 * options.page_tokens) * row);
    // With the whole under a budget that leaves no room for a copy of the rows; checkpoints come before others go.
    options.budget = state.reserved_bytes().total() + 3 * (state.bytes().recurrent + state.bytes().tails);
    State tight = m->make_state(1, options);
    tight.reserve(T);
    feed(*m, tight, ids, modes, T, rng);
    EXPECT_EQ(tight.lengths()[0], T);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, EveryBound, ::testing::ValuesIn(cases()), [](const auto& info) { return info.param.name; });

// Rows that move to the front of their region do so together: a copy of each page would be a launch of each on a GPU.
TEST(StateBound, PagesMoveTogether) {
  constexpr int64_t kPage = 4, kTokens = 600;
  RowStore store(1, std::make_shared<ByteBudget>(0), at::kCPU, kPage, {5, 64});
  const int64_t slot = store.add({"rows", SlotKind::kPerToken, {3}, at::kFloat});
  static thread_local int copies;
  copies = 0;
  int moves = 0;
  const auto handle = at::addThreadLocalCallback(at::RecordFunctionCallback([](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
    copies += std::string_view(f.name()) == "aten::copy_" ? 1 : 0;
    return nullptr;
  }));
  const auto row = [](int64_t t) { return (at::arange(3, at::kFloat) + static_cast<float>(3 * t)).view({1, 3}); };
  for (int64_t t = 0; t < kTokens; ++t) {
    const int before = copies;
    store.make_room({t}, {t + 1}, false);
    moves += copies - before;
    store.write(slot, 0, t, row(t));
    store.retire(0, t + 1);
    const int64_t from = std::max(store.from(0), int64_t{0});
    if (t % 7 != 0 || from == 0) continue;
    EXPECT_TRUE(at::equal(store.read(slot, {0}, {5}), at::arange(15, at::kFloat).view({1, 5, 3}))) << t;
    EXPECT_TRUE(at::equal(store.read(slot, {from}, {t + 1}), at::arange(3 * from, 3 * (t + 1), at::kFloat).view({1, -1, 3}))) << t;
  }
  at::removeCallback(handle);
  EXPECT_GT(moves, 0);
  EXPECT_LT(moves, 25);  // 600 tokens are 150 pages, and a region of 35 of them is used up eight times
}

TEST(StateBound, ShortSequencesAreAsWithoutIt) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  CounterRng rng(94);
  const at::Tensor ids = random_ids(rng, 1, 40, c.vocab_size);
  const auto modes = random_modes(rng, 1, 40, 2);
  State bound = m->make_state(1, bounded(10, 30)), kept = m->make_state(1);
  EXPECT_TRUE(at::equal(run(*m, ids, routing(c, modes, 0, 40), &bound), run(*m, ids, routing(c, modes, 0, 40), &kept)));
  EXPECT_TRUE(bound.replayable());
}

TEST(StateBound, RefusesWhatDoesNotFitTogether) {
  const auto m = make(small({{"gated_delta_net", "attention"}}));
  const auto error_of = [&](StateOptions o) -> std::string {
    try {
      (void)m->make_state(1, o);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(error_of(bounded(3, 0)), HasSubstr("expected a window of at least 1"));
  EXPECT_THAT(error_of(bounded(-1, 4)), HasSubstr("nothing negative"));
  StateOptions both = bounded(3, 4);
  both.drop_rows = true;
  EXPECT_THAT(error_of(both), HasSubstr("choose one"));
  StateOptions pages;
  pages.page_tokens = 0;
  EXPECT_THAT(error_of(pages), HasSubstr("pages of 0 tokens"));
}

// Layers whose convolutions differ in width, under a ring: each tail by its own length, and every byte predicted.
TEST(StateBound, LayersOfDifferentConvolutions) {
  ModelConfig c = small({{"gated_delta_net", "attention"}, {"mamba2"}});
  c.layer_overrides = Json::parse(R"({"mamba2": {"conv_kernel": 7, "head_dim": 8, "num_kv_heads": 4}})");
  c.validate();
  const auto m = make(c);
  CounterRng rng(95);
  const at::Tensor ids = random_ids(rng, 1, 60, c.vocab_size);
  const auto modes = random_modes(rng, 1, 60, c.mixers().size());
  StateOptions options;
  options.ring = 5;
  options.keep_rows = true;
  State state = m->make_state(1, options);
  feed(*m, state, ids, modes, 40, rng);
  for (int64_t t = 40; t < 60; ++t) run(*m, ids.narrow(1, t, 1), routing(c, modes, t, t + 1), &state);
  const StateBytes measured = state.bytes(), predicted = state_bytes(c, 60, at::kFloat, options);
  EXPECT_EQ(measured.ring, predicted.ring);
  EXPECT_EQ(measured.total(), predicted.total());
  for (const int64_t length : {57, 50, 21}) {
    State fork = state.fork({0}), fresh = m->make_state(1, options);
    fork.trim(0, length, *m);
    run(*m, ids.narrow(1, 0, length), routing(c, modes, 0, length), &fresh);
    expect_near(*m, fork, 0, fresh, 0);
  }
}

}  // namespace
}  // namespace oryx
