#include "oryx/data/synthetic.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "oryx/data/packing.h"
#include "oryx/data/test_support.h"

namespace oryx {
namespace {

using test::error_of;
using ::testing::HasSubstr;

TEST(Recall, LayoutAndTargets) {
  for (const auto& o : {RecallOptions{}, RecallOptions{.pairs = 64, .queries = 10},
                        RecallOptions{.pairs = 3, .queries = 8}, RecallOptions{.pairs = 5, .queries = 2, .length = 100},
                        RecallOptions{.pairs = 1, .queries = 1, .filler_symbols = 0}}) {
    for (uint64_t index = 0; index < 20; ++index) {
      const RecallExample e = recall_example(o, 3, index);
      const int64_t n = o.tokens();
      ASSERT_EQ(static_cast<int64_t>(e.ids.size()), n);
      ASSERT_EQ(e.ids.size(), e.targets.size());
      ASSERT_EQ(static_cast<int64_t>(e.query_positions.size()), o.queries);
      std::map<int64_t, int64_t> pairs;
      const int64_t queries_begin = n - 2 * o.queries;
      for (int64_t i = 0; i < queries_begin; ++i) {
        EXPECT_EQ(e.targets[i], kIgnoreTarget);
        if (e.ids[i] >= o.key_symbols) continue;
        const int64_t value = e.ids[i + 1];
        EXPECT_TRUE(value >= o.key_symbols && value < o.key_symbols + o.value_symbols);
        EXPECT_TRUE(pairs.emplace(e.ids[i], value).second) << "a key twice";
      }
      EXPECT_EQ(static_cast<int64_t>(pairs.size()), o.pairs);
      std::set<int64_t> asked;
      for (int64_t q = 0; q < o.queries; ++q) {
        const int64_t at = queries_begin + 2 * q;
        EXPECT_EQ(e.query_positions[q], at);
        EXPECT_EQ(e.targets[at], pairs.at(e.ids[at]));
        EXPECT_EQ(e.ids[at + 1], e.targets[at]);
        EXPECT_EQ(e.targets[at + 1], kIgnoreTarget);
        if (q < o.pairs) asked.insert(e.ids[at]);
      }
      EXPECT_EQ(static_cast<int64_t>(asked.size()), std::min(o.queries, o.pairs));
      for (const int64_t id : e.ids) EXPECT_TRUE(id >= 0 && id < o.vocab_size());
    }
  }
}

TEST(Recall, IsAFunctionOfSeedAndIndex) {
  const RecallOptions o{.pairs = 20, .queries = 5, .length = 90};
  const RecallBatch whole = recall_batch(o, 4, 100, 6);
  EXPECT_EQ(whole.input_ids.sizes(), (std::vector<int64_t>{6, 90}));
  EXPECT_EQ(whole.query_positions.sizes(), (std::vector<int64_t>{6, 5}));
  const RecallBatch tail = recall_batch(o, 4, 103, 3), other = recall_batch(o, 5, 103, 3);
  EXPECT_TRUE(at::equal(whole.input_ids.slice(0, 3), tail.input_ids));
  EXPECT_TRUE(at::equal(whole.targets.slice(0, 3), tail.targets));
  EXPECT_TRUE(at::equal(whole.query_positions.slice(0, 3), tail.query_positions));
  EXPECT_FALSE(at::equal(other.input_ids, tail.input_ids));
  EXPECT_FALSE(at::equal(tail.input_ids[0], tail.input_ids[1]));
}

TEST(Recall, ValuesAndKeysAreUniform) {
  const RecallOptions o{.pairs = 8, .queries = 1, .key_symbols = 16, .value_symbols = 4};
  std::map<int64_t, int> count;
  for (uint64_t i = 0; i < 2000; ++i) {
    for (const int64_t id : recall_example(o, 1, i).ids) ++count[id];
  }
  for (int64_t k = 0; k < 16; ++k) EXPECT_NEAR(count[k], 18000 / 16, 150) << k;
  for (int64_t v = 16; v < 20; ++v) EXPECT_NEAR(count[v], 18000 / 4, 300) << v;
}

TEST(Recall, QueryShare) {
  EXPECT_NEAR((RecallOptions{.pairs = 48, .queries = 9}).query_share(), 9.0 / 114, 1e-12);
  EXPECT_NEAR((RecallOptions{.pairs = 8, .queries = 8, .length = 160}).query_share(), 0.05, 1e-12);
}

TEST(Recall, BadOptions) {
  const std::vector<std::pair<RecallOptions, std::string>> table = {
      {{.pairs = 0}, "0 pairs"},
      {{.queries = 0}, "0 queries"},
      {{.pairs = 65}, "65 pairs need as many keys"},
      {{.length = 39}, "length 39 is too short"},
      {{.length = -1}, "length -1 is too short"},
      {{.length = 100, .filler_symbols = 0}, "needs filler symbols"},
      {{.value_symbols = 1}, "1 value symbols"},
  };
  for (const auto& [options, message] : table) {
    EXPECT_THAT(error_of([&, o = options] { recall_example(o, 0, 0); }), HasSubstr(message));
  }
}

std::vector<std::string> essays() {
  std::vector<std::string> out;
  for (int d = 0; d < 3; ++d) {
    std::string text;
    for (int i = 0; i < 200; ++i) text += fmt::format("Sentence {} of essay {} is here, at 3.5 paces. Is it? ", i, d);
    out.push_back(text + "\n\n");
  }
  return out;
}

TEST(Recall, ABatchBeyondTheMemory) {
  EXPECT_THAT(error_of([] { recall_batch({.length = int64_t{1} << 40}, 0, 0, 1024); }), HasSubstr("of memory are free"));
}

TEST(Needle, LengthDepthAndContent) {
  const auto tokenizer = make_byte_tokenizer();
  for (const char* name : {"noise", "essay_number", "essay_word"}) {
    const NeedleTask task(*tokenizer, parse_needle_kind(name), essays());
    for (const int64_t length : {400, 1000, 30000}) {
      for (const double depth : {0.0, 0.1, 0.5, 0.9, 1.0}) {
        const NeedleExample e = task.example(length, depth, 1, 7);
        const auto n = static_cast<int64_t>(e.ids.size());
        EXPECT_LE(n, length);
        EXPECT_GT(n, length - 60);
        const std::string text = tokenizer->decode(e.ids);
        EXPECT_EQ(text.find(e.answer), text.rfind(e.answer)) << "the answer stands once";
        EXPECT_TRUE(text.ends_with(e.question)) << name;
        const std::span<const int32_t> ids(e.ids);
        EXPECT_EQ(tokenizer->decode(ids.subspan(e.needle_begin, e.needle_end - e.needle_begin)), " " + e.needle);
        EXPECT_EQ(tokenizer->decode(e.answer_ids), " " + e.answer);
        EXPECT_THAT(e.needle, HasSubstr(e.answer));
        const auto frame = static_cast<int64_t>(e.question.size() + 2 + e.needle.size() + 1 + 1);
        EXPECT_NEAR(static_cast<double>(e.needle_begin - 1), depth * static_cast<double>(n - frame), 31);
      }
    }
  }
}

TEST(Needle, IsAFunctionOfSeedAndIndex) {
  const auto tokenizer = make_byte_tokenizer();
  const NeedleTask task(*tokenizer, NeedleKind::essay_word, essays());
  const auto a = task.example(1000, 0.5, 1, 7), b = task.example(1000, 0.5, 1, 7), c = task.example(1000, 0.5, 1, 8),
             d = task.example(1000, 0.5, 2, 7);
  EXPECT_EQ(a.ids, b.ids);
  EXPECT_NE(a.answer, c.answer);
  EXPECT_NE(a.answer, d.answer);
  EXPECT_EQ(a.answer.size(), 8u);
}

TEST(Needle, BadInput) {
  const auto tokenizer = make_byte_tokenizer();
  EXPECT_THAT(error_of([&] { NeedleTask(*tokenizer, NeedleKind::essay_word, {""}); }), HasSubstr("needs documents"));
  EXPECT_THAT(error_of([] { parse_needle_kind("nose"); }), HasSubstr("Did you mean 'noise'?"));
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  EXPECT_THAT(error_of([&] { task.example(50, 0.5, 0, 0); }), HasSubstr("a prompt of 50 tokens is too short"));
  EXPECT_THAT(error_of([&] { task.example(500, 1.5, 0, 0); }), HasSubstr("depth 1.5"));
  EXPECT_THAT(error_of([&] { task.example(int64_t{1} << 50, 0.5, 0, 0); }), HasSubstr("of memory are free"));
}

}  // namespace
}  // namespace oryx
