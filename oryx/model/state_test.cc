// Properties of the state under trim: going back and on is never having seen the rest, for random models, modes, splits
// and packings.
#include "oryx/state/state.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/error.h"
#include "oryx/model/inspect.h"
#include "oryx/model/state_test_support.h"
#include "oryx/model/test_support.h"
#include "tests/support/fixtures.h"

namespace oryx {
namespace {

using namespace test;

// Counts what a trim asks of the model.
struct Counted : Replay {
  explicit Counted(const LanguageModel& m) : model(m) {}
  int64_t refill_tokens() const override { return model.refill_tokens(); }
  void scan(State& one, int64_t begin, int64_t end) const override {
    scanned += end - begin;
    model.scan(one, begin, end);
  }
  void refill(State& one, int64_t end) const override {
    refilled += end - one.lengths()[0];
    model.refill(one, end);
  }
  const LanguageModel& model;
  mutable int64_t scanned = 0, refilled = 0;
};

class EveryState : public ::testing::TestWithParam<Case> {};

TEST_P(EveryState, TrimThenContinueIsNeverHavingSeenTheRest) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  const int64_t B = 2, T = 90, more = 7;
  for (const auto& options :
       {StateOptions{0, 0, true}, StateOptions{16, 0, true}, StateOptions{0, 4, true}, StateOptions{9, 3, true}}) {
    CounterRng rng(21 + options.checkpoint_every + options.ring);
    const at::Tensor ids = random_ids(rng, B, T, c.vocab_size);
    const auto modes = random_modes(rng, B, T, c.mixers().size());
    State state = m->make_state(B, options);
    feed(*m, state, ids, modes, T, rng);
    ASSERT_TRUE(state.replayable());
    // Down in several trims, each sequence to places of its own.
    std::vector<int64_t> to = {T, T};
    for (int round = 0; round < 3; ++round) {
      std::vector<int32_t> cu{0};
      std::vector<at::Tensor> parts;
      std::vector<std::vector<int32_t>> packed(1);
      for (int64_t n = 0; n < B; ++n) {
        int64_t& length = to[static_cast<size_t>(n)];
        length = round == 0 ? length - static_cast<int64_t>(rng.below(3))
                            : static_cast<int64_t>(rng.below(static_cast<uint64_t>(length)));
        state.trim(n, length, *m);
        EXPECT_EQ(state.lengths()[static_cast<size_t>(n)], length);
        State fresh = m->make_state(1, {0, 0, true});
        if (length > 0)
          run(*m, ids.narrow(0, n, 1).narrow(1, 0, length), routing(c, row_of(modes, n), 0, length), &fresh);
        expect_near(*m, state, n, fresh, 0);
        // Other tokens than those forgotten, in other modes.
        parts.push_back(ids.narrow(0, 1 - n, 1).narrow(1, 3, more));
        packed[0].insert(packed[0].end(), modes[static_cast<size_t>(1 - n)].begin() + 3,
                         modes[static_cast<size_t>(1 - n)].begin() + 3 + more);
        cu.push_back(cu.back() + static_cast<int32_t>(more));
      }
      const at::Tensor out =
          run(*m, at::cat(parts, 1), routing(c, packed, 0, B * more), &state, at::tensor(cu, at::kInt));
      for (int64_t n = 0; n < B; ++n) {
        const int64_t length = to[static_cast<size_t>(n)];
        State fresh = m->make_state(1, {0, 0, true});
        if (length > 0)
          run(*m, ids.narrow(0, n, 1).narrow(1, 0, length), routing(c, row_of(modes, n), 0, length), &fresh);
        const at::Tensor alone =
            run(*m, parts[static_cast<size_t>(n)], routing(c, packed, n * more, (n + 1) * more), &fresh);
        EXPECT_LT(fixture_error(out.narrow(1, n * more, more), alone), kTolerance)
            << "round " << round << " to " << length;
        state.trim(n, length, *m);
      }
    }
  }
}

// Where no layer need keep rows for it, a rejected draft costs a copy and is the old state bit for bit.
TEST_P(EveryState, TheRingIsExact) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(22);
  const int64_t R = 4, prompt = 20, T = 40;
  const at::Tensor ids = random_ids(rng, 1, T, c.vocab_size);
  const auto modes = random_modes(rng, 1, T, c.mixers().size());
  State state = m->make_state(1, {0, R, false});
  run(*m, ids.narrow(1, 0, prompt), routing(c, modes, 0, prompt), &state);
  for (int64_t back = 1; back <= R; ++back) {
    const auto before = fixed_slots(*m, state, 0);
    const int64_t length = state.lengths()[0];
    for (int64_t t = length; t < length + back; ++t) run(*m, ids.narrow(1, t, 1), routing(c, modes, t, t + 1), &state);
    const Counted model(*m);
    state.trim(0, length, model);
    EXPECT_EQ(state.lengths()[0], length);
    EXPECT_EQ(model.scanned + model.refilled, 0);
    expect_equal(fixed_slots(*m, state, 0), before);
    run(*m, ids.narrow(1, length, 1), routing(c, modes, length, length + 1), &state);
  }
}

// A draft is verified in one call: the end of none of its tokens was kept, but their inputs were.
TEST_P(EveryState, PartOfAVerifiedDraftIsKeptWithoutARerun) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(23);
  const int64_t prompt = 33, draft = 6;
  const at::Tensor ids = random_ids(rng, 1, prompt + draft, c.vocab_size);
  const auto modes = random_modes(rng, 1, prompt + draft, c.mixers().size());
  for (int64_t kept = 0; kept < draft; ++kept) {
    State state = m->make_state(1, {0, draft, true}), fresh = m->make_state(1, {0, 0, true});
    run(*m, ids.narrow(1, 0, prompt), routing(c, modes, 0, prompt), &state);
    run(*m, ids.narrow(1, prompt, draft), routing(c, modes, prompt, prompt + draft), &state);
    const Counted model(*m);
    state.trim(0, prompt + kept, model);
    EXPECT_EQ(model.scanned, kept);
    EXPECT_EQ(model.refilled, 0);
    run(*m, ids.narrow(1, 0, prompt + kept), routing(c, modes, 0, prompt + kept), &fresh);
    expect_near(*m, state, 0, fresh, 0);
  }
}

TEST_P(EveryState, CheckpointsShortenTheScan) {
  const ModelConfig& c = GetParam().config;
  const auto m = make(c);
  CounterRng rng(24);
  const at::Tensor ids = random_ids(rng, 1, 64, c.vocab_size);
  const auto modes = random_modes(rng, 1, 64, c.mixers().size());
  State state = m->make_state(1, {16, 0, true});
  for (int64_t at = 0; at < 64; at += 8) run(*m, ids.narrow(1, at, 8), routing(c, modes, at, at + 8), &state);
  const StateBytes bytes = state.bytes();
  EXPECT_EQ(bytes.checkpoints, 4 * (bytes.recurrent + bytes.tails));
  const Counted model(*m);
  state.trim(0, 60, model);
  EXPECT_LE(model.scanned, 12);
  EXPECT_EQ(model.refilled, std::min<int64_t>(60, m->refill_tokens()));
  state.trim(0, 48, model);
  EXPECT_LE(model.scanned, 12) << "a checkpoint stands there";
}

INSTANTIATE_TEST_SUITE_P(Models, EveryState, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

TEST(StateTrim, WithoutRowsOnlyMarksAreReached) {
  const ModelConfig c = small({{"gated_delta_net"}});
  const auto m = make(c);
  CounterRng rng(25);
  const at::Tensor ids = random_ids(rng, 1, 40, c.vocab_size);
  const auto modes = random_modes(rng, 1, 40, 1);
  State state = m->make_state(1, {16, 0, false});
  for (int64_t at = 0; at < 40; at += 10) run(*m, ids.narrow(1, at, 10), routing(c, modes, at, at + 10), &state);
  EXPECT_FALSE(state.replayable());
  EXPECT_EQ(state.bytes().tokens, 0);
  const auto before = fixed_slots(*m, state, 0);
  try {
    state.trim(0, 33, *m);
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(),
                 "cannot trim to 33 of 40 tokens: a layer keeps no rows to replay, so that only checkpoints can be "
                 "reached, the nearest one below at 20; "
                 "checkpoint more often, or keep rows (keep_rows)");
  }
  expect_equal(fixed_slots(*m, state, 0), before);
  EXPECT_EQ(state.reachable(0, 33), 20);
  EXPECT_EQ(state.reachable(0, 19), 0);
  EXPECT_THROW(state.trim(0, 41, *m), Error);
  EXPECT_THROW(state.trim(0, -1, *m), Error);
  state.trim(0, 20, *m);
  State fresh = m->make_state(1);
  run(*m, ids.narrow(1, 0, 20), routing(c, modes, 0, 20), &fresh);
  expect_near(*m, state, 0, fresh, 0);
  state.trim(0, 0, *m);
  for (const auto& [name, x] : fixed_slots(*m, state, 0)) EXPECT_EQ(x.abs().max().item<float>(), 0) << name;
}

// A prompt read in attention in one call, then generation in linear mode: nothing is looked back at, and the state does not grow.
TEST(StateRows, DroppedRowsAreConstantMemoryAndAnErrorWhenLookedBackAt) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  CounterRng rng(26);
  const at::Tensor ids = random_ids(rng, 1, 60, c.vocab_size);
  std::vector<std::vector<int32_t>> modes(1, std::vector<int32_t>(40, 1));
  modes[0].resize(60, 0);
  State kept = m->make_state(1), dropped = m->make_state(1, {0, 0, false, true});
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 40}, {40, 41}, {41, 60}}) {
    const at::Tensor expected = run(*m, ids.narrow(1, begin, end - begin), routing(c, modes, begin, end), &kept);
    EXPECT_LT(fixture_error(run(*m, ids.narrow(1, begin, end - begin), routing(c, modes, begin, end), &dropped), expected), kTolerance);
    EXPECT_EQ(dropped.bytes().tokens, 0);
    EXPECT_EQ(dropped.bytes().total(), state_bytes(c, end, at::kFloat, dropped.options()).total());
  }
  EXPECT_FALSE(dropped.replayable());
  const auto before = fixed_slots(*m, dropped, 0);
  try {
    run(*m, ids.narrow(1, 0, 5), routing(c, modes, 0, 5), &dropped);
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), ::testing::HasSubstr("5 tokens are to run in 'attention' behind 60 tokens whose keys and values were dropped (drop_rows)"));
  }
  expect_equal(fixed_slots(*m, dropped, 0), before);
}

// Parts as predicted, whatever is kept.
TEST(StateRows, BytesAreAsPredicted) {
  for (const auto& test : cases()) {
    const auto m = make(test.config);
    CounterRng rng(27);
    const at::Tensor ids = random_ids(rng, 1, 64, test.config.vocab_size);
    const auto modes = random_modes(rng, 1, 64, test.config.mixers().size());
    for (const auto& options : {StateOptions{}, StateOptions{16, 0, true}, StateOptions{32, 3, false}}) {
      State state = m->make_state(1, options);
      for (int64_t at = 0; at < 64; at += 16) run(*m, ids.narrow(1, at, 16), routing(test.config, modes, at, at + 16), &state);
      const StateBytes measured = state.bytes(), predicted = state_bytes(test.config, 64, at::kFloat, options);
      EXPECT_EQ(measured.recurrent, predicted.recurrent) << test.name;
      EXPECT_EQ(measured.tails, predicted.tails) << test.name;
      EXPECT_EQ(measured.tokens, predicted.tokens) << test.name;
      EXPECT_EQ(measured.checkpoints, predicted.checkpoints) << test.name;
      EXPECT_EQ(measured.ring, predicted.ring) << test.name;
    }
  }
}

// Every mixer's state advances over the same keys and values whatever the modes: only the layers above see another stream.
TEST(StateRows, ASpanInAttentionLeavesTheStateOfALinearRun) {
  for (const char* linear : {"gated_delta_net", "kimi_delta_attention", "mamba2"}) {
    ModelConfig c = small({{linear, "attention"}});
    c.num_layers = 1;
    const auto m = make(c);
    CounterRng rng(28);
    const at::Tensor ids = random_ids(rng, 1, 70, c.vocab_size);
    std::vector<std::vector<int32_t>> modes(1, std::vector<int32_t>(70, 0)), attention = modes;
    std::fill(attention[0].begin() + 10, attention[0].begin() + 60, 1);
    State a = m->make_state(1), b = m->make_state(1);
    const at::Tensor x = run(*m, ids, routing(c, modes, 0, 70), &a), y = run(*m, ids, routing(c, attention, 0, 70), &b);
    expect_near(*m, a, 0, b, 0);
    EXPECT_GT(fixture_error(y, x), 1e-3);
  }
}

}  // namespace
}  // namespace oryx
