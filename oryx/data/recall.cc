#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/random.h"
#include "oryx/data/packing.h"
#include "oryx/data/synthetic.h"

namespace oryx {

namespace {

// The first `count` of [0, n) in random order.
std::vector<int64_t> choose(CounterRng& rng, int64_t n, int64_t count) {
  std::vector<int64_t> all(n);
  std::iota(all.begin(), all.end(), 0);
  for (int64_t i = 0; i < count; ++i) std::swap(all[i], all[i + static_cast<int64_t>(rng.below(n - i))]);
  all.resize(count);
  return all;
}

// How much filler stands before each pair and before the queries: `filler` tokens thrown into pairs + 1 gaps.
std::vector<int64_t> gaps(CounterRng& rng, int64_t pairs, int64_t filler) {
  std::vector<int64_t> counts(pairs + 1, 0);
  for (int64_t i = 0; i < filler; ++i) ++counts[rng.below(pairs + 1)];
  return counts;
}

}  // namespace

void check(const RecallOptions& o) {
  if (o.pairs < 1 || o.queries < 1)
    fail("recall: {} pairs and {} queries, expected at least one of each", o.pairs, o.queries);
  if (o.value_symbols < 2)
    fail("recall: {} value symbols leave nothing to recall, expected at least 2", o.value_symbols);
  if (o.pairs > o.key_symbols)
    fail("recall: {} pairs need as many keys, but there are {} key symbols", o.pairs, o.key_symbols);
  const int64_t least = 2 * (o.pairs + o.queries);
  if (o.length != 0 && o.length < least) {
    fail("recall: length {} is too short for {} pairs and {} queries, expected at least {}", o.length, o.pairs,
         o.queries, least);
  }
  if (o.tokens() > least && o.filler_symbols < 1)
    fail("recall: length {} needs filler symbols, there are none", o.length);
}

RecallExample recall_example(const RecallOptions& o, uint64_t seed, uint64_t index) {
  check(o);
  CounterRng rng(seed, index);
  const std::vector<int64_t> keys = choose(rng, o.key_symbols, o.pairs);
  std::vector<int64_t> values(o.pairs);
  for (auto& v : values) v = o.key_symbols + static_cast<int64_t>(rng.below(o.value_symbols));
  const std::vector<int64_t> filler = gaps(rng, o.pairs, o.tokens() - 2 * (o.pairs + o.queries));

  RecallExample e;
  e.ids.reserve(o.tokens());
  const auto fill = [&](int64_t count) {
    const int64_t first = o.key_symbols + o.value_symbols;
    for (; count > 0; --count) e.ids.push_back(first + static_cast<int64_t>(rng.below(o.filler_symbols)));
  };
  for (int64_t i = 0; i < o.pairs; ++i) {
    fill(filler[i]);
    e.ids.insert(e.ids.end(), {keys[i], values[i]});
  }
  fill(filler[o.pairs]);
  e.targets.assign(o.tokens(), kIgnoreTarget);
  std::vector<int64_t> round;
  for (int64_t i = 0; i < o.queries; ++i) {
    if (i % o.pairs == 0) round = choose(rng, o.pairs, o.pairs);
    const int64_t pair = round[i % o.pairs];
    e.query_positions.push_back(static_cast<int32_t>(e.ids.size()));
    e.targets[e.ids.size()] = values[pair];
    e.ids.insert(e.ids.end(), {keys[pair], values[pair]});
  }
  return e;
}

RecallBatch recall_batch(const RecallOptions& o, uint64_t seed, uint64_t first_index, int64_t batch_size) {
  check(o);
  if (const double tokens = static_cast<double>(batch_size) * static_cast<double>(o.tokens()); tokens > 1 << 24) {
    expect_memory(32 * tokens, fmt::format("recall: a batch of {} sequences of {} tokens", batch_size, o.tokens()));
  }
  RecallBatch batch{at::empty({batch_size, o.tokens()}, at::kLong), at::empty({batch_size, o.tokens()}, at::kLong),
                    at::empty({batch_size, o.queries}, at::kInt)};
  for (int64_t b = 0; b < batch_size; ++b) {
    const RecallExample e = recall_example(o, seed, first_index + static_cast<uint64_t>(b));
    std::copy(e.ids.begin(), e.ids.end(), batch.input_ids.mutable_data_ptr<int64_t>() + b * o.tokens());
    std::copy(e.targets.begin(), e.targets.end(), batch.targets.mutable_data_ptr<int64_t>() + b * o.tokens());
    std::copy(e.query_positions.begin(), e.query_positions.end(),
              batch.query_positions.mutable_data_ptr<int32_t>() + b * o.queries);
  }
  return batch;
}

}  // namespace oryx
