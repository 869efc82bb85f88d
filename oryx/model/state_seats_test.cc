// States whose rows stand in one pool of pages, and whose sequences are places that are taken and left.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "oryx/common/error.h"
#include "oryx/model/inspect.h"
#include "oryx/model/state_test_support.h"
#include "oryx/state/page_pool.h"

namespace oryx {
namespace {

using namespace test;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(PagePool, GivesPagesSideBySideAndTakesThemOneByOne) {
  PagePool pool(10);
  const auto a = pool.take(3), b = pool.take(2), c = pool.take(5);
  EXPECT_THAT(a, ElementsAre(0, 1, 2));
  EXPECT_THAT(b, ElementsAre(3, 4));
  EXPECT_EQ(pool.free(), 0);
  try {
    (void)pool.take(1);
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("1 pages of rows are wanted, but of the state's 10 only 0 are free"));
  }
  for (const int64_t page : {1, 0, 2, 4, 7, 8}) pool.give_back(page);
  EXPECT_EQ(pool.free(), 6);
  EXPECT_THAT(pool.take(2), ElementsAre(7, 8));      // the smallest stretch that holds them
  EXPECT_THAT(pool.take(4), ElementsAre(0, 1, 2, 4));  // none does: from the largest on
  EXPECT_THROW(pool.give_back(10), std::exception);
  pool.give_back(3);
  EXPECT_THROW(pool.give_back(3), std::exception);
}

// Any order of takes and returns: pages are never in two hands, and all come back as one stretch.
TEST(PagePool, AnyOrderKeepsPagesApart) {
  PagePool pool(64);
  CounterRng rng(3);
  std::vector<int64_t> held;
  std::set<int64_t> seen;
  for (int turn = 0; turn < 500; ++turn) {
    if (rng.below(2) == 0) {
      const auto count = static_cast<int64_t>(rng.below(9));
      if (count > pool.free()) continue;
      for (const int64_t page : pool.take(count)) {
        EXPECT_TRUE(seen.insert(page).second);
        held.push_back(page);
      }
    } else {
      for (uint64_t n = rng.below(7); n > 0 && !held.empty(); --n) {
        const size_t at = rng.below(held.size());
        pool.give_back(held[at]);
        seen.erase(held[at]);
        held.erase(held.begin() + static_cast<int64_t>(at));
      }
    }
    EXPECT_EQ(pool.free(), 64 - static_cast<int64_t>(held.size()));
  }
  for (const int64_t page : held) pool.give_back(page);
  const auto all = pool.take(64);
  for (int64_t i = 0; i < 64; ++i) EXPECT_EQ(all[static_cast<size_t>(i)], i);
}

class EverySeat : public ::testing::TestWithParam<Case> {};

// Sequences sit down, run with their neighbours, are copied out and leave: each is as if it had been alone, in the same bits.
void expect_seated_alone(const ModelConfig& c, const RowWindow& bound) {
  const auto m = make(c);
  CounterRng rng(41);
  StateOptions options, plain_options;
  options.page_tokens = 8, options.row_pages = 64;
  options.bound = plain_options.bound = bound;
  const State root = m->make_state(1, options);
  State seats = root.fork({0, 0, 0});
  const auto run_one = [&](State& state, const at::Tensor& ids, const std::vector<std::vector<int32_t>>& modes) {
    return run(*m, ids, routing(c, modes, 0, ids.size(1)), &state);
  };
  std::vector<State> alone;
  const auto seat = [&](int64_t place, int64_t length) {
    const at::Tensor ids = random_ids(rng, 1, length, c.vocab_size);
    const auto modes = random_modes(rng, 1, length, c.mixers().size());
    State one = root.fork({0}), plain = m->make_state(1, plain_options);
    one.reserve_behind(length + 20);
    run_one(one, ids, modes);
    run_one(plain, ids, modes);
    std::vector<at::Tensor> where;
    for (int64_t i = 0; i < c.num_layers; ++i) where.push_back(seats.layer(i).has("k_conv") ? seats.layer(i).tensor("k_conv") : at::Tensor());
    seats.seat(place, std::move(one));
    for (int64_t i = 0; i < c.num_layers; ++i) {
      if (where[static_cast<size_t>(i)].defined()) {
        EXPECT_EQ(seats.layer(i).tensor("k_conv").data_ptr(), where[static_cast<size_t>(i)].data_ptr());
      }
    }
    alone.push_back(std::move(plain));
  };
  seat(0, 13), seat(1, 8), seat(2, 30);
  const auto step = [&](State& together, const std::vector<size_t>& who) {
    const auto N = static_cast<int64_t>(who.size());
    const at::Tensor ids = random_ids(rng, N, 1, c.vocab_size);
    const auto modes = random_modes(rng, N, 1, c.mixers().size());
    const at::Tensor got = run_one(together, ids, modes);
    for (int64_t n = 0; n < N; ++n) {
      const at::Tensor expected = run_one(alone[who[static_cast<size_t>(n)]], ids.narrow(0, n, 1), row_of(modes, n));
      EXPECT_TRUE(at::equal(got[n], expected[0])) << n;
    }
  };
  step(seats, {0, 1, 2});
  State copy = seats.fork({1});
  const int64_t version = seats.pages_version();
  State out = seats.unseat(1);  // it goes on elsewhere
  expect_equal(fixed_slots(*m, copy, 0), fixed_slots(*m, out, 0));
  copy = root.fork({0});
  EXPECT_NE(seats.pages_version(), version);
  EXPECT_THAT(seats.lengths(), ElementsAre(14, 0, 31));
  step(out, {1});
  seat(1, 5);
  alone[1] = std::move(alone[3]);
  for (int i = 0; i < 12; ++i) step(seats, {0, 1, 2});
  if (root.row_pool().page_bytes > 0) {
    std::set<int32_t> pages;
    size_t count = 0;
    for (int64_t n = 0; n < 3; ++n) {
      for (const auto& page : seats.numbered_pages(n)) pages.insert(page.number), ++count;
    }
    EXPECT_EQ(pages.size(), count);
  }
  out = root.fork({0});
  for (int64_t n = 0; n < 2; ++n) seats.clear(n);
  (void)seats.unseat(2);
  EXPECT_EQ(root.free_pages(), root.row_pool().page_bytes > 0 ? 64 : 0);
}

TEST_P(EverySeat, SeatedSequencesAreEachAlone) { expect_seated_alone(GetParam().config, {}); }
TEST_P(EverySeat, SeatedBoundedSequencesAreEachAlone) { expect_seated_alone(GetParam().config, {3, 11, 0}); }

INSTANTIATE_TEST_SUITE_P(Models, EverySeat, ::testing::ValuesIn(cases()), [](const auto& info) { return info.param.name; });

// Forks share the pages of a pool, whoever writes gets its own, and what does not fit is refused with nothing changed.
TEST(StateSeats, APoolIsOneForAllForks) {
  const auto m = make(small({{"gated_delta_net", "attention"}}));
  StateOptions options;
  options.page_tokens = 8, options.row_pages = 8;
  CounterRng rng(5);
  const State root = m->make_state(1, options);
  const auto extend = [&](State& state, int64_t tokens) {
    const int64_t N = state.sequences();
    run(*m, random_ids(rng, N, tokens, 61), routing(m->config(), random_modes(rng, N, tokens, 2), 0, tokens), &state);
  };
  State a = root.fork({0});
  extend(a, 20);
  EXPECT_EQ(root.free_pages(), 5);
  State b = a.fork({0});
  EXPECT_EQ(root.free_pages(), 4);  // the partly filled one is a copy
  const at::Tensor before = a.rows(0, "keys", 20).clone();
  extend(b, 4);
  EXPECT_EQ(root.free_pages(), 4);
  extend(b, 1);
  EXPECT_EQ(root.free_pages(), 3);
  EXPECT_TRUE(at::equal(a.rows(0, "keys", 20), before));
  EXPECT_TRUE(at::equal(b.rows(0, "keys", 20), before));
  try {
    extend(a, 40);
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("pages of rows are wanted, but of the state's 8 only 3 are free"));
  }
  EXPECT_EQ(root.free_pages(), 3);
  extend(a, 28);
  EXPECT_EQ(root.free_pages(), 0);
  EXPECT_TRUE(at::equal(a.rows(0, "keys", 20), before));
  a = root.fork({0});
  EXPECT_EQ(root.free_pages(), 4);  // b goes on with two of its pages
}

// Under a bound a sequence has from its reservation on the pages that it will have at most, and no others; a fork takes its own.
TEST(StateSeats, ABoundedSequenceHasItsPagesOfAPool) {
  const auto m = make(small({{"gated_delta_net", "attention"}}));
  StateOptions options;
  options.page_tokens = 8, options.bound = {2, 8, 0};
  State plain = m->make_state(1, options);
  options.row_pages = 12;
  const State root = m->make_state(1, options);
  State a = root.fork({0});
  a.reserve_behind(100);
  EXPECT_EQ(root.free_pages(), 7);  // one of the first tokens, a window's twice, and one more at either border
  CounterRng rng(6);
  for (const int64_t tokens : {5, 30, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 20}) {
    const at::Tensor ids = random_ids(rng, 1, tokens, 61);
    const auto modes = routing(m->config(), random_modes(rng, 1, tokens, 2), 0, tokens);
    EXPECT_TRUE(at::equal(run(*m, ids, modes, &a), run(*m, ids, modes, &plain)));
    EXPECT_EQ(root.free_pages(), 7);
  }
  const std::vector<int64_t> begins = a.rows_from(), ends = a.lengths();
  EXPECT_TRUE(at::equal(a.rows(0, "keys", begins, ends), plain.rows(0, "keys", begins, ends)));
  std::set<int32_t> pages;
  for (const auto& page : a.numbered_pages(0)) EXPECT_TRUE(pages.insert(page.number).second);
  EXPECT_LE(pages.size(), 5u);
  {
    State b = a.fork({0});
    b.reserve_behind(100);
    EXPECT_EQ(root.free_pages(), 2);
    a.reserve_behind(100);  // of the pages that it shares, one each of first and last tokens, it may need its own
    EXPECT_EQ(root.free_pages(), 0);
  }
  EXPECT_EQ(root.free_pages(), 5);
}

}  // namespace
}  // namespace oryx
