// Comparing states, for tests.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "oryx/model/test_support.h"
#include "tests/support/fixtures.h"

namespace oryx::test {

constexpr double kTolerance = 2e-5;  // float32, three small layers, different orders of summation

// Recurrent slots and tails of sequence n, by layer and name.
inline std::vector<std::pair<std::string, at::Tensor>> fixed_slots(const LanguageModel& m, const State& state, int64_t n) {
  std::vector<std::pair<std::string, at::Tensor>> all;
  const auto slots = LanguageModel::slots(m.config(), m.compute_dtype(), state.options());
  for (size_t i = 0; i < slots.size(); ++i) {
    for (const auto& slot : slots[i]) {
      if (slot.kind == SlotKind::kPerToken) continue;
      all.emplace_back("layer " + std::to_string(i) + " " + slot.name,
                       state.layer(static_cast<int64_t>(i)).tensor(slot.name)[n].clone());
    }
  }
  return all;
}

inline void expect_near(const LanguageModel& m, const State& a, int64_t n, const State& b, int64_t k) {
  const auto x = fixed_slots(m, a, n), y = fixed_slots(m, b, k);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_LT(fixture_error(x[i].second, y[i].second), kTolerance) << x[i].first;
}

inline void expect_equal(const std::vector<std::pair<std::string, at::Tensor>>& x,
                  const std::vector<std::pair<std::string, at::Tensor>>& y) {
  ASSERT_EQ(x.size(), y.size());
  for (size_t i = 0; i < x.size(); ++i) EXPECT_TRUE(at::equal(x[i].second, y[i].second)) << x[i].first;
}

// Tokens [begin, end) of every row, in pieces of random length.
inline void feed(const LanguageModel& m, State& state, const at::Tensor& ids, const std::vector<std::vector<int32_t>>& modes,
          int64_t end, CounterRng& rng) {
  for (int64_t at = state.lengths()[0]; at < end;) {
    const int64_t n = std::min<int64_t>(end - at, rng.below(2) == 0 ? 1 : 1 + static_cast<int64_t>(rng.below(40)));
    run(m, ids.narrow(1, at, n), routing(m.config(), modes, at, at + n), &state);
    at += n;
  }
}

inline std::vector<std::vector<int32_t>> row_of(const std::vector<std::vector<int32_t>>& modes, int64_t n) {
  return {modes[static_cast<size_t>(n)]};
}

}  // namespace oryx::test
