#include "oryx/ops/decode_attention/decode_attention.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <string>

#include "oryx/common/error.h"
#include "oryx/ops/rope/rope.h"
#include "oryx/ops/span_attention/span_attention.h"
#include "tests/support/fixtures.h"

namespace oryx::ops {
namespace {

using oryx::test::norm_error;

struct Case {
  at::Tensor q, keys, values, lengths;
  std::optional<at::Tensor> blocks, wanted;
  DecodeRope rope = {10000, 0};
  int64_t window = 0;
  std::optional<double> scale;

  Case to(at::ScalarType dtype) const {
    Case c = *this;
    c.q = q.to(dtype), c.keys = keys.to(dtype), c.values = values.to(dtype);
    return c;
  }
};

Case make_case(const std::vector<int32_t>& lengths, int64_t capacity, int64_t Hq, int64_t Hk, int64_t K, int64_t V) {
  const auto N = static_cast<int64_t>(lengths.size());
  return {at::randn({N, Hq, K}), at::randn({N, capacity, Hk, K}), at::randn({N, capacity, Hk, V}), at::tensor(lengths, at::kInt), {}, {}, {10000, 0}, 0, {}};
}

at::Tensor run(const Case& c) {
  return decode_attention(c.q, c.keys, c.values, c.lengths, c.blocks, c.wanted, c.rope, c.window, c.scale);
}
at::Tensor run_naive(const Case& c) {
  return decode_attention_naive(c.q, c.keys, c.values, c.lengths, c.blocks, c.wanted, c.rope, c.window, c.scale);
}

void expect_like_naive(const Case& c, const std::string& what, double limit = 4e-6) {
  EXPECT_LT(norm_error(run(c), run_naive(c.to(at::kDouble))), limit) << what;
  const Case narrow = c.to(at::kBFloat16);
  EXPECT_LT(norm_error(run(narrow), run_naive(narrow.to(at::kDouble))), 1e-2) << what << ", bfloat16";
}

TEST(DecodeAttention, EqualsNaiveAtOddShapes) {
  at::manual_seed(1);
  for (const auto& [K, V] : {std::pair<int64_t, int64_t>{8, 8}, {16, 24}, {64, 64}, {128, 128}, {34, 17}}) {
    for (const int64_t heads : {1, 2, 6}) {
      expect_like_naive(make_case({1, 37, 600, 1025}, 1100, 6, heads, K, V), c10::str("K ", K, ", V ", V, ", ", heads, " key heads"));
    }
  }
}

// Positions at which float32 angles would be off, and tables longer than those kept for rope().
TEST(DecodeAttention, FarPositions) {
  at::manual_seed(2);
  expect_like_naive(make_case({70001}, 70001, 1, 1, 8, 8), "70,001 keys");
}

// The unfused form: all keys rotated into a copy, then span attention. In float32 rotated keys have the same bits either way.
TEST(DecodeAttention, EqualsRotatedCopyBitForBit) {
  at::manual_seed(3);
  Case c = make_case({900, 513}, 1000, 4, 2, 64, 64);
  for (const int64_t rotary : {0, 32}) {
    c.rope.rotary_dim = rotary;
    const at::Tensor positions = at::arange(1000, at::kInt).expand({2, 1000});
    const at::Tensor k = rope(c.keys, positions, c.rope.theta, rotary);
    const at::Tensor q = rope(c.q.unsqueeze(1), (c.lengths - 1).unsqueeze(1), c.rope.theta, rotary);
    EXPECT_TRUE(at::equal(run(c), span_attention(q, k, c.values, {}, {}, {}, c.lengths).squeeze(1))) << "rotary_dim " << rotary;
  }
}

TEST(DecodeAttention, OptionsEqualNaive) {
  at::manual_seed(4);
  Case c = make_case({700, 3, 64, 900}, 900, 4, 2, 32, 32);
  c.window = 100;
  expect_like_naive(c, "window");
  c.window = 1;
  expect_like_naive(c, "window 1");
  c.window = 0;
  c.scale = 0.3;
  expect_like_naive(c, "scale");
  c.rope.rotary_dim = 8;
  expect_like_naive(c, "part of a head rotated");
  c.rope = {};
  expect_like_naive(c, "no rotation");
  c.rope = {500000, 0};
  c.keys = c.keys.transpose(1, 2).contiguous().transpose(1, 2);  // heads before tokens
  expect_like_naive(c, "other strides");
}

TEST(DecodeAttention, RowsThatAreNotWantedAreZeroAndNotRead) {
  at::manual_seed(5);
  Case c = make_case({200, 100, 300}, 300, 2, 2, 16, 16);
  const at::Tensor all = run(c);
  c.wanted = at::tensor({1, 0, 1}, at::kInt).to(at::kBool);
  c.keys[1].fill_(NAN);
  const at::Tensor some = run(c);
  EXPECT_TRUE(at::equal(some[0], all[0]));
  EXPECT_TRUE(at::equal(some[2], all[2]));
  EXPECT_EQ(some[1].abs().max().item<float>(), 0);
}

TEST(DecodeAttention, PagesEqualRows) {
  at::manual_seed(6);
  Case rows = make_case({95, 33, 128}, 128, 4, 2, 32, 32), paged = rows;
  const at::Tensor order = at::randperm(3 * 4 + 2).narrow(0, 0, 3 * 4);  // four pages of 32 a sequence, scattered over fourteen
  for (auto [to, from] : {std::pair{&paged.keys, rows.keys}, {&paged.values, rows.values}}) {
    *to = at::full({14, 32, 2, 32}, NAN);
    to->index_copy_(0, order, from.reshape({12, 32, 2, 32}));
  }
  paged.blocks = order.view({3, 4}).to(at::kInt);
  EXPECT_TRUE(at::equal(run(rows), run(paged)));
}

// Sequences of `lengths` keys in pages of `page`, scattered over three pools; what no query may see is NaN.
PagedDecode make_paged(const std::vector<int32_t>& lengths, int64_t page, int64_t Hq, int64_t Hk, int64_t K, int64_t V, int64_t window = 0, int64_t first = 0) {
  const auto N = static_cast<int64_t>(lengths.size());
  const int64_t most = *std::max_element(lengths.begin(), lengths.end()) / page + 2;
  PagedDecode a{.q = at::randn({N, Hq, K}), .lengths = at::tensor(lengths, at::kInt), .blocks = at::full({N, most}, -1, at::kInt), .rope = {10000, 0}, .window = window, .first = first};
  int64_t used = 0;
  for (const int32_t length : lengths) used += (length + page - 1) / page;
  const at::Tensor numbers = at::randperm(used + 5).to(at::kInt);
  at::Tensor keys = at::full({used + 5, page, Hk, K}, NAN), values = at::full({used + 5, page, Hk, V}, NAN);
  int64_t at = 0;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t length = lengths[static_cast<size_t>(n)];
    for (int64_t i = 0; i * page < length; ++i) {
      const int32_t number = numbers[at++].item<int32_t>();
      int64_t seen = 0;
      for (int64_t j = 0; j < page; ++j) {
        const int64_t token = i * page + j;
        if (token >= length || (window > 0 && token < length - window && token >= first)) continue;
        keys[number][j] = at::randn({Hk, K}), values[number][j] = at::randn({Hk, V});
        ++seen;
      }
      if (seen > 0) a.blocks[n][i] = number;
    }
  }
  const std::vector<int64_t> cuts{1, (used + 5) / 2, used + 4 - (used + 5) / 2};
  a.keys = keys.split_with_sizes(cuts), a.values = values.split_with_sizes(cuts);
  return a;
}

PagedDecode to(PagedDecode a, at::ScalarType dtype) {
  a.q = a.q.to(dtype);
  for (auto* pools : {&a.keys, &a.values}) {
    for (at::Tensor& x : *pools) x = x.to(dtype);
  }
  return a;
}

void expect_like_naive(const PagedDecode& a, const std::string& what) {
  EXPECT_LT(norm_error(paged_decode_attention(a), paged_decode_attention_naive(to(a, at::kDouble))), 4e-6) << what;
  const PagedDecode narrow = to(a, at::kBFloat16);
  EXPECT_LT(norm_error(paged_decode_attention(narrow), paged_decode_attention_naive(to(narrow, at::kDouble))), 1e-2) << what << ", bfloat16";
}

TEST(PagedDecodeAttention, EqualsNaive) {
  at::manual_seed(11);
  for (const int64_t page : {1, 7, 32, 33}) {
    for (const auto& [Hq, Hk, K, V] : {std::array<int64_t, 4>{6, 2, 16, 24}, {4, 4, 64, 64}, {3, 1, 34, 17}}) {
      const std::vector<int32_t> lengths{1, 31, 32, 33, 64, 700};
      const std::string what = c10::str("page ", page, ", ", Hq, "/", Hk, " heads of ", K, " and ", V);
      expect_like_naive(make_paged(lengths, page, Hq, Hk, K, V), what);
      expect_like_naive(make_paged(lengths, page, Hq, Hk, K, V, 40), what + ", window 40");
      PagedDecode a = make_paged(lengths, page, Hq, Hk, K, V, 30, 5);
      expect_like_naive(a, what + ", window 30 and the first 5");
      a.reach = 33;
      expect_like_naive(a, what + ", reach 33");
      a.reach = 7;
      expect_like_naive(a, what + ", reach 7");
      a.reach = 0;
      a.rope = {};
      a.scale = 0.3;
      expect_like_naive(a, what + ", not rotated, scaled");
      a.k_norm = at::rand({K}) + 0.5, a.norm_eps = 1e-3;
      expect_like_naive(a, what + ", normalised");
      a.rope = {10000, 2 * (K / 4)};
      a.k_norm = at::rand({Hk * K}) + 0.5;
      expect_like_naive(a, what + ", normalised over all heads, part rotated");
    }
  }
}

// Far into a text only the angles of what is seen are made: memory stays that of the window.
TEST(PagedDecodeAttention, FarPositionsInAWindow) {
  at::manual_seed(14);
  PagedDecode a = make_paged({70001, 50, 66000}, 32, 2, 1, 8, 8, 40, 3);
  expect_like_naive(a, "window 40 and the first 3");
  const at::Tensor all = paged_decode_attention(a);
  a.wanted = at::tensor({0, 1, 1}, at::kInt).to(at::kBool);
  const at::Tensor some = paged_decode_attention(a);
  EXPECT_TRUE(at::equal(some.narrow(0, 1, 2), all.narrow(0, 1, 2)));
  a.reach = 20;
  expect_like_naive(a, "reach 20");
}

// Tokens of one sequence that stand behind each other read its keys together, each as many as it sees: the bits that each gets alone, across the borders of blocks and parts.
TEST(PagedDecodeAttention, TokensOfOneSequenceAreBitForBitAlone) {
  at::manual_seed(15);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int32_t longest : {5, 34, 515, 1100}) {
      for (const auto& [window, first] : {std::pair<int64_t, int64_t>{0, 0}, {20, 2}}) {
        constexpr int64_t kTokens = 5;
        PagedDecode a = to(make_paged({longest}, 32, 4, 2, 32, 24), dtype);
        a.window = window, a.first = first;
        a.q = at::randn({kTokens, 4, 32}).to(dtype);
        a.lengths = at::arange(longest - kTokens + 1, longest + 1, at::kInt);
        a.blocks = a.blocks.expand({kTokens, -1});
        const at::Tensor together = paged_decode_attention(a);
        a.wanted = at::tensor({1, 0, 1, 1, 0}, at::kInt).to(at::kBool);
        const at::Tensor some = paged_decode_attention(a);
        a.wanted.reset();
        for (int64_t t = 0; t < kTokens; ++t) {
          PagedDecode one = a;
          one.q = a.q.narrow(0, t, 1), one.lengths = a.lengths.narrow(0, t, 1), one.blocks = a.blocks.narrow(0, t, 1).contiguous();
          const at::Tensor alone = paged_decode_attention(one)[0];
          EXPECT_TRUE(at::equal(together[t], alone)) << longest << " " << window << " token " << t;
          EXPECT_TRUE(at::equal(some[t], t == 1 || t == 4 ? at::zeros_like(alone) : alone)) << longest << " " << window << " token " << t;
        }
      }
    }
  }
}

// Pages or rows side by side, alone or beside others, on one thread or two: the same bits.
TEST(PagedDecodeAttention, EachSequenceIsBitForBitAlone) {
  at::manual_seed(12);
  const std::vector<int32_t> lengths{1025, 1, 96, 513, 700};
  const int threads = at::get_num_threads();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const auto& [window, first] : {std::pair<int64_t, int64_t>{0, 0}, {200, 0}, {200, 3}}) {
      const PagedDecode all = to(make_paged(lengths, 32, 4, 2, 32, 32, window, first), dtype);
      const at::Tensor together = paged_decode_attention(all);
      const at::Tensor keys = at::cat(all.keys), values = at::cat(all.values);
      for (int64_t n = 0; n < 5; ++n) {
        PagedDecode one = all;
        one.q = all.q.narrow(0, n, 1), one.lengths = all.lengths.narrow(0, n, 1);
        // Its pages in order, in a pool of its own: dense.
        const at::Tensor pages = all.blocks[n].clamp_min(0).to(at::kLong);
        one.keys = {keys.index_select(0, pages)}, one.values = {values.index_select(0, pages)};
        one.blocks = at::arange(pages.size(0), at::kInt).unsqueeze(0);
        at::set_num_threads(1);
        EXPECT_TRUE(at::equal(paged_decode_attention(one)[0], together[n])) << n;
        at::set_num_threads(2);
        EXPECT_TRUE(at::equal(paged_decode_attention(one)[0], together[n])) << n;
        at::set_num_threads(threads);
        if (first > 0) continue;
        const at::Tensor rows = decode_attention(one.q, one.keys[0].flatten(0, 1).unsqueeze(0), one.values[0].flatten(0, 1).unsqueeze(0), one.lengths, {}, {}, one.rope, window);
        EXPECT_TRUE(at::equal(rows[0], together[n])) << n;
      }
    }
  }
}

TEST(PagedDecodeAttention, WhatIsNotWantedIsNotLookedAt) {
  at::manual_seed(13);
  PagedDecode a = make_paged({40, 50, 60}, 8, 2, 2, 16, 16);
  const at::Tensor all = paged_decode_attention(a);
  a.wanted = at::tensor({1, 0, 1}, at::kInt).to(at::kBool);
  a.lengths[1] = 0;
  a.blocks[1].fill_(-7);
  const at::Tensor some = paged_decode_attention(a);
  EXPECT_TRUE(at::equal(some[0], all[0]));
  EXPECT_TRUE(at::equal(some[2], all[2]));
  EXPECT_EQ(some[1].abs().max().item<float>(), 0);
  a.wanted = at::zeros({3}, at::kBool);
  EXPECT_EQ(paged_decode_attention(a).abs().max().item<float>(), 0);
  const auto none = [](const at::Tensor& x) { return x.narrow(0, 0, 0); };
  EXPECT_EQ(paged_decode_attention({.q = none(a.q), .keys = a.keys, .values = a.values, .lengths = none(a.lengths), .blocks = none(a.blocks)}).size(0), 0);
}

template <typename F>
std::string decode_error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "nothing was thrown";
}

TEST(PagedDecodeAttention, BadInputIsOneLine) {
  const PagedDecode good = make_paged({5, 6}, 4, 4, 2, 16, 16);
  const auto message = [](const PagedDecode& a) { return decode_error_of([&] { (void)paged_decode_attention(a); }); };
  PagedDecode a = good;
  a.blocks = good.blocks.clone();
  a.blocks[1][1] = 99;
  EXPECT_EQ(message(a), "decode_attention: blocks[1][1] is 99, expected a page of 9");
  a = good;
  a.lengths = at::tensor({5, 13}, at::kInt);
  EXPECT_EQ(message(a), "decode_attention: lengths[1] is 13, expected 1 to 12");
  a = good;
  a.first = 2;
  EXPECT_EQ(message(a), "decode_attention: the first 2 keys beside a window of 0: expected 0, or a window");
  a = good;
  a.k_norm = at::ones({7});
  EXPECT_EQ(message(a), "decode_attention: k_norm has shape [7], expected [16], or [32] over all heads");
  a = good;
  a.values.pop_back();
  EXPECT_EQ(message(a), "decode_attention: 3 pools of keys and 2 of values, expected as many of each, and one at least");
}

TEST(DecodeAttention, DoesNotDependOnThreads) {
  at::manual_seed(7);
  const Case c = make_case({2000, 5, 1300}, 2000, 4, 4, 32, 32);
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor one = run(c);
  at::set_num_threads(2);
  EXPECT_TRUE(at::equal(run(c), one));
  at::set_num_threads(before);
}

// On a GPU against float64 on the CPU: the split kernel (K = V of 64 or 128), the plain one, pages, and fewer keys than multiprocessors.
TEST(DecodeAttention, CudaEqualsNaive) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  at::manual_seed(8);
  const auto there = [](Case c) {
    for (at::Tensor* t : {&c.q, &c.keys, &c.values, &c.lengths}) *t = t->to(at::kCUDA);
    if (c.blocks) c.blocks = c.blocks->to(at::kCUDA);
    if (c.wanted) c.wanted = c.wanted->to(at::kCUDA);
    return c;
  };
  for (const int64_t width : {40, 64, 128}) {
    for (const int64_t heads : {1, 2, 3, 4, 8}) {
      Case c = make_case({1, 37, 600, 1025}, 1100, heads == 3 ? 9 : 8, heads, width, width);
      const std::string what = c10::str("width ", width, ", ", heads, " key heads");
      EXPECT_LT(norm_error(run(there(c)).cpu(), run_naive(c.to(at::kDouble))), 1e-5) << what;
      c = c.to(at::kBFloat16);
      EXPECT_LT(norm_error(run(there(c)).cpu(), run_naive(c.to(at::kDouble))), 1e-2) << what;
      c.wanted = at::tensor({1, 0, 1, 0}, at::kInt).to(at::kBool);
      c.window = 100;
      EXPECT_LT(norm_error(run(there(c)).cpu(), run_naive(c.to(at::kDouble))), 1e-2) << what << ", wanted, window";
    }
  }
}

TEST(DecodeAttention, BadInputIsOneLine) {
  const Case good = make_case({5, 6}, 8, 4, 2, 16, 16);
  const auto message = [](const Case& c) { return decode_error_of([&] { (void)run(c); }); };
  Case c = good;
  c.lengths = at::tensor({5, 9}, at::kInt);
  EXPECT_EQ(message(c), "decode_attention: lengths[1] is 9, expected 1 to 8");
  c = good;
  c.lengths = at::tensor({0, 6}, at::kInt);
  EXPECT_EQ(message(c), "decode_attention: lengths[0] is 0, expected 1 to 8");
  c = good;
  c.q = at::randn({2, 3, 16});
  EXPECT_EQ(message(c), "decode_attention: 3 query heads do not divide into groups for 2 key heads");
  c = good;
  c.rope.rotary_dim = 15;
  EXPECT_EQ(message(c), "decode_attention: rotates 15 of 16 values of a head, expected an even number of them");
  c = good;
  c.wanted = at::ones({2}, at::kInt);
  EXPECT_EQ(message(c), "decode_attention: wanted is Int of shape [2], expected Bool of [2]");
}

}  // namespace
}  // namespace oryx::ops
