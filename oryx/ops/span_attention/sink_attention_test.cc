// Attention over first keys, a window and keys between, against the formula over all keys with the mask written out in float64: on the CPU, and on a GPU where there is one.
#include "oryx/ops/span_attention/sink_attention.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <ostream>
#include <string>
#include <vector>

#include "oryx/common/random.h"

namespace oryx::ops {
namespace {

struct SinkSequences {
  const char* name;
  std::vector<int64_t> lengths, counts;  // tokens of each sequence, of which the last `counts` are queries; those of rows are all alike
  int64_t first, window, reach = 0;
  int64_t between = 0;  // so many of the tokens that are neither, each seen for a while
  bool packed = false;
  std::vector<int32_t> spans = {};
  int64_t Hq = 2, Hk = 2;
  friend std::ostream& operator<<(std::ostream& to, const SinkSequences& c) { return to << c.name; }
};

// The sequences with all their tokens, as rounded to the type that is tested, and what the operator is given of them.
struct SinkInputs {
  at::Tensor q, k, v;       // [sum of queries], [sum of tokens]
  std::vector<std::vector<std::array<int64_t, 3>>> between;  // by sequence: position, from, until
  SinkAttention given;
};

at::Tensor sink_ints(const std::vector<int64_t>& x) { return at::tensor(x, at::kLong).to(at::kInt); }
int64_t sink_sum(const std::vector<int64_t>& x) { return std::accumulate(x.begin(), x.end(), int64_t{0}); }

SinkInputs sink_inputs(const SinkSequences& c, int64_t D, at::ScalarType type, at::Device device) {
  CounterRng rng(17);
  const auto random = [&](int64_t rows, int64_t heads) { return at::randn({rows, heads, D}, at::kDouble).to(type); };
  const auto N = static_cast<int64_t>(c.lengths.size());
  const int64_t unwritten = std::numeric_limits<int16_t>::max();
  SinkInputs x{random(sink_sum(c.counts), c.Hq), random(sink_sum(c.lengths), c.Hk), random(sink_sum(c.lengths), c.Hk), {}, {}};
  std::vector<int64_t> starts, held, positions, cu{0}, cu_k{0};
  int64_t rows = 0, most = 0;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t length = c.lengths[n], count = c.counts[n], start = std::max<int64_t>(0, length - count - (c.window - 1));
    starts.push_back(start), held.push_back(length - start);
    rows = std::max(rows, held.back());
    cu.push_back(cu.back() + count), cu_k.push_back(cu_k.back() + held.back());
    for (int64_t t = length - count; t < length; ++t) positions.push_back(t);
    x.between.emplace_back();
    for (int64_t i = 0; i < c.between && c.first + i < length; ++i) {
      const int64_t s = c.first + static_cast<int64_t>(rng.below(static_cast<uint64_t>(length - c.first)));
      const bool twice = std::any_of(x.between.back().begin(), x.between.back().end(), [&](const auto& b) { return b[0] == s; });
      if (!twice) x.between.back().push_back({s, s + c.window, i % 3 == 0 ? unwritten : s + c.window + static_cast<int64_t>(rng.below(100))});
    }
    most = std::max(most, static_cast<int64_t>(x.between.back().size()));
  }
  // Behind a sequence's own rows the last ones hold NaN, the first ones zeros, those between anything finite that no query sees.
  const auto filled = [&](int64_t n, int64_t rows, double with) { return at::full({n, rows, c.Hk, D}, with, at::device(at::kCPU).dtype(type)); };
  SinkAttention& a = x.given;
  a.k = filled(N, rows + 3, std::numeric_limits<double>::quiet_NaN()), a.v = a.k.clone();
  a.sink_k = filled(N, c.first, 0), a.sink_v = filled(N, c.first, 0);
  KeysBetween b{filled(N, most, 1), filled(N, most, 1), at::zeros({N, most}, at::kInt), at::zeros({N, most}, at::kInt), at::zeros({N, most}, at::kInt)};
  int64_t at = 0;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t firsts = std::min(c.first, c.lengths[n]);
    for (const auto& [to, last, first, all] : {std::array{&b.k, &a.k, &a.sink_k, &x.k}, std::array{&b.v, &a.v, &a.sink_v, &x.v}}) {
      (*last)[n].narrow(0, 0, held[n]).copy_(all->narrow(0, at + starts[n], held[n]));
      (*first)[n].narrow(0, 0, firsts).copy_(all->narrow(0, at, firsts));
      for (size_t i = 0; i < x.between[n].size(); ++i) (*to)[n][static_cast<int64_t>(i)].copy_((*all)[at + x.between[n][i][0]]);
    }
    for (size_t i = 0; i < x.between[n].size(); ++i) {
      const auto& [s, from, until] = x.between[n][i];
      const auto row = static_cast<int64_t>(i);
      b.positions[n][row] = s, b.from[n][row] = from, b.until[n][row] = until;
    }
    at += c.lengths[n];
  }
  const auto there = [&](const at::Tensor& t) { return t.to(device); };
  a.positions = there(sink_ints(positions).view({c.packed ? 1 : N, -1}));
  a.q = there(x.q.view({c.packed ? 1 : N, -1, c.Hq, D}));
  if (c.packed) {
    std::vector<at::Tensor> ks, vs;
    for (int64_t n = 0; n < N; ++n) ks.push_back(a.k[n].narrow(0, 0, held[n])), vs.push_back(a.v[n].narrow(0, 0, held[n]));
    a.k = at::cat(ks).unsqueeze(0), a.v = at::cat(vs).unsqueeze(0);
    a.cu_seqlens = there(sink_ints(cu)), a.cu_seqlens_k = there(sink_ints(cu_k));
  } else {
    a.key_lengths = sink_ints(held);
  }
  a.k = there(a.k), a.v = there(a.v), a.sink_k = there(a.sink_k), a.sink_v = there(a.sink_v);
  b.k = there(b.k), b.v = there(b.v);
  if (most > 0) a.between = b;
  if (!c.spans.empty()) a.spans = at::tensor(c.spans, at::kInt).view({-1, 3});
  a.window = c.window, a.reach = c.reach;
  return x;
}

at::Tensor sink_attention_naive(const SinkSequences& c, const SinkInputs& x) {
  const int64_t D = x.q.size(2);
  std::vector<at::Tensor> all;
  int64_t at = 0, at_k = 0;
  for (size_t n = 0; n < c.lengths.size(); ++n) {
    const int64_t L = c.lengths[n], T = c.counts[n];
    const at::Tensor s = at::arange(L).unsqueeze(0), t = at::arange(L - T, L).unsqueeze(1);
    at::Tensor seen = (s < c.first) | (s > t - c.window);
    for (const auto& [position, from, until] : x.between[n]) seen.select(1, position).logical_or_(((t >= from) & (t < until)).squeeze(1));
    seen = seen & (s <= t);
    if (c.reach > 0) seen = seen & (s > t - c.reach);
    const auto rows = [&](const at::Tensor& y, int64_t from, int64_t count) { return y.narrow(0, from, count).to(at::kDouble).transpose(0, 1); };  // [H, rows, D]
    const at::Tensor k = rows(x.k, at_k, L).repeat_interleave(c.Hq / c.Hk, 0), v = rows(x.v, at_k, L).repeat_interleave(c.Hq / c.Hk, 0);
    const at::Tensor scores = at::matmul(rows(x.q, at, T), k.transpose(1, 2)) / std::sqrt(static_cast<double>(D));
    all.push_back(at::matmul(scores.masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity()).softmax(-1), v).transpose(0, 1));
    at += T, at_k += L;
  }
  at::Tensor o = at::cat(all).view({c.packed ? 1 : static_cast<int64_t>(c.lengths.size()), -1, c.Hq, D});
  if (c.spans.empty()) return o;
  at::Tensor wanted = at::zeros({o.size(0), o.size(1), 1, 1}, at::kDouble);
  for (size_t i = 0; i + 2 < c.spans.size(); i += 3) wanted[c.spans[i]].narrow(0, c.spans[i + 1], c.spans[i + 2] - c.spans[i + 1]).fill_(1);
  return o * wanted;
}

std::vector<SinkSequences> sink_cases() {
  std::vector<SinkSequences> all = {
      {"RowsOfFour", {400, 400}, {300, 300}, 4, 64},
      {"NoMultipleOfATile", {700, 500}, {133, 133}, 200, 37},
      {"AWholeTile", {900}, {300}, 128, 128},
      {"NothingIsFar", {100}, {100}, 64, 200},
      {"MoreThanThereIs", {90, 300}, {90, 90}, 150, 20},
      {"FirstsBeginToBeSeen", {300}, {290}, 64, 130},
      {"AWindowOfOne", {260}, {200}, 3, 1},
      {"GroupedHeads", {500, 380}, {200, 200}, 30, 90, 0, 0, false, {}, 8, 2},
      {"Spans", {600, 450}, {300, 300}, 70, 100, 0, 0, false, {0, 3, 150, 0, 290, 300, 1, 128, 129}},
      {"Packed", {300, 1, 500, 64, 513}, {200, 1, 0, 63, 300}, 33, 50, 0, 0, true},
      {"PackedSpansOverBounds", {300, 1, 500, 64, 513}, {200, 1, 0, 63, 300}, 33, 50, 0, 0, true, {0, 150, 260, 0, 400, 564}, 4, 1},
      {"AReach", {600}, {550}, 140, 60, 170},
      {"AReachPastAllFirsts", {900}, {100}, 20, 60, 300},
      {"Between", {700, 400}, {300, 300}, 10, 40, 0, 90},
      {"ManyBetween", {1500}, {400}, 7, 30, 0, 500, false, {}, 4, 2},
      {"BetweenAlone", {600}, {300}, 0, 40, 0, 150},
      {"BetweenPackedSpans", {500, 30, 2, 800}, {100, 30, 0, 250}, 5, 20, 0, 140, true, {0, 0, 140, 0, 200, 380}},
      {"BetweenAndReach", {800}, {400}, 9, 50, 200, 200},
  };
  for (const int64_t T : {1, 63, 100, 1000}) {
    const char* name = T == 1 ? "One" : T == 63 ? "SixtyThree" : T == 100 ? "AHundred" : "AThousand";
    all.push_back({name, {T + 1200, T + 1200}, {T, T}, 64, 200});
  }
  return all;
}

class SinkAttentionForms : public testing::TestWithParam<SinkSequences> {};

// f in float64 of what the operator was given, rounded as it was given.
double sink_error(const SinkSequences& c, int64_t D, at::ScalarType type, at::Device device) {
  at::manual_seed(5);
  const SinkInputs x = sink_inputs(c, D, type, device);
  const at::Tensor found = sink_attention(x.given), again = sink_attention(x.given), expected = sink_attention_naive(c, x);
  EXPECT_EQ(found.scalar_type(), type);
  EXPECT_TRUE(found.device().type() == device.type());
  EXPECT_TRUE(at::equal(found, again)) << "bits differ from run to run";
  return ((found.to(at::kCPU, at::kDouble) - expected).norm() / expected.norm()).item<double>();  // NaN fails every comparison
}

TEST_P(SinkAttentionForms, IsTheFormula) { EXPECT_LT(sink_error(GetParam(), 16, at::kFloat, at::kCPU), 2e-6); }

TEST_P(SinkAttentionForms, IsTheFormulaOnAGpu) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  for (const int64_t D : {64, 128}) EXPECT_LT(sink_error(GetParam(), D, at::kBFloat16, at::kCUDA), 1e-2) << D;  // the kernel
  EXPECT_LT(sink_error(GetParam(), 16, at::kFloat, at::kCUDA), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(All, SinkAttentionForms, testing::ValuesIn(sink_cases()), [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace oryx::ops
