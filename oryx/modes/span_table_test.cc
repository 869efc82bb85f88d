#include "oryx/modes/span_table.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/error.h"
#include "oryx/modes/layer_schedules.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;

const std::vector<std::string> kTableMixers = {"mamba2", "attention", "sliding_window"};

at::Tensor ints(std::vector<std::vector<int>> rows) {
  at::Tensor t = at::empty({static_cast<int64_t>(rows.size()), 3}, at::kInt);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < 3; ++j) t[static_cast<int64_t>(i)][static_cast<int64_t>(j)] = rows[i][j];
  }
  return t;
}

TEST(SpanTable, RowsOfWholeDocuments) {
  const auto s = Schedule::parse("linear,attention@-3:", kTableMixers);
  const auto t = SpanTable::build(s, row_pieces(2, 10, {}), 2, 10);
  EXPECT_TRUE(at::equal(t.of(0), ints({{0, 0, 7}, {1, 0, 7}})));
  EXPECT_TRUE(at::equal(t.of(1), ints({{0, 7, 10}, {1, 7, 10}})));
  EXPECT_EQ(t.of(2).sizes(), (at::IntArrayRef{0, 3}));
  EXPECT_EQ(t.of(2).scalar_type(), at::kInt);
  EXPECT_EQ(t.count(1), 6);
  EXPECT_EQ(t.total(), 20);
  EXPECT_DOUBLE_EQ(t.share(1), 0.3);
  EXPECT_DOUBLE_EQ(t.share(2), 0.0);
  EXPECT_TRUE(at::equal(t.modes()[1].slice(0, 5, 9), at::tensor({0, 0, 1, 1}, at::kInt)));
}

TEST(SpanTable, PackedDocumentsAreRelativeToThemselves) {
  const auto s = Schedule::parse("linear,attention@50%:", kTableMixers);
  const auto t = SpanTable::build(s, packed_pieces(at::tensor({0, 4, 4, 10}, at::kInt), {}), 1, 10);
  EXPECT_TRUE(at::equal(t.of(0), ints({{0, 0, 2}, {0, 4, 7}})));
  EXPECT_TRUE(at::equal(t.of(1), ints({{0, 2, 4}, {0, 7, 10}})));
}

TEST(SpanTable, OneMixerForAll) {
  const auto t = SpanTable::build(Schedule::parse("attention", kTableMixers), row_pieces(3, 5, {}), 3, 5);
  EXPECT_TRUE(at::equal(t.of(1), ints({{0, 0, 5}, {1, 0, 5}, {2, 0, 5}})));
}

TEST(SpanTable, PiecesOfADocumentEqualTheWhole) {
  const auto s = Schedule::parse("random(attention=0.5;chunk=3),sliding_window@gen", kTableMixers);
  const ModeContext context{.prompt_length = 40, .seed = 1, .step = 2, .sequence = 3};
  const auto whole = SpanTable::build(s, {{0, 0, 50, 0, context}}, 1, 50);
  for (const int64_t cut : {1, 7, 39, 40, 41}) {
    const auto left = SpanTable::build(s, {{0, 0, cut, 0, context}}, 1, cut);
    const auto right = SpanTable::build(s, {{0, 0, 50 - cut, cut, context}}, 1, 50 - cut);
    EXPECT_TRUE(at::equal(at::cat({left.modes(), right.modes()}, 1), whole.modes())) << cut;
  }
}

TEST(SpanTable, SequencesDrawTheirOwn) {
  const auto s = Schedule::parse("random(attention=0.5;chunk=1)", kTableMixers);
  const auto t = SpanTable::build(s, row_pieces(2, 64, {.sequence = 5}), 2, 64);
  EXPECT_FALSE(at::equal(t.modes()[0], t.modes()[1]));
  const auto alone = SpanTable::build(s, row_pieces(1, 64, {.sequence = 6}), 1, 64);
  EXPECT_TRUE(at::equal(alone.modes()[0], t.modes()[1]));
}

TEST(SpanTable, TokensWithoutAPieceHaveNoMixer) {
  const auto t = SpanTable::build(Schedule::parse("attention", kTableMixers), {{0, 2, 3, 0, {.prompt_length = 3}}}, 1, 8);
  EXPECT_TRUE(at::equal(t.modes()[0], at::tensor({-1, -1, 1, 1, 1, -1, -1, -1}, at::kInt)));
  EXPECT_DOUBLE_EQ(t.share(1), 1.0);
}

TEST(SpanTable, MisuseIsRefused) {
  const auto s = Schedule::parse("attention", kTableMixers);
  const ModeContext c{.prompt_length = 4};
  EXPECT_THROW(SpanTable::build(s, {{0, 0, 4, 0, c}, {0, 3, 4, 0, c}}, 1, 8), c10::Error);
  EXPECT_THROW(SpanTable::build(s, {{0, 6, 4, 0, c}}, 1, 8), c10::Error);
  EXPECT_THROW(SpanTable::build(s, {{1, 0, 4, 0, c}}, 1, 8), c10::Error);
}

TEST(LayerSchedules, OneTextForAll) {
  const auto all = parse_layer_schedules("linear,attention@-2:", {{"mamba2", "attention"}, {"mamba2"}, {"attention"}});
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[0].resolve({.prompt_length = 5}), (std::vector<ModeSpan>{{0, 3, 0}, {3, 5, 1}}));
  EXPECT_EQ(all[1].resolve({.prompt_length = 5}), (std::vector<ModeSpan>{{0, 5, 0}}));
  EXPECT_EQ(all[2].resolve({.prompt_length = 5}), (std::vector<ModeSpan>{{0, 5, 0}}));
}

TEST(LayerSchedules, ByLayer) {
  const std::vector<std::vector<std::string>> mixers(6, {"mamba2", "attention"});
  const auto all =
      parse_layer_schedules(R"({"layers": {"*": "linear", "0-1,4": "attention", "5": "attention@gen"}})", mixers);
  std::string texts;
  for (const auto& s : all) texts += s.text() + " ";
  EXPECT_EQ(texts, "attention attention linear linear attention attention@gen ");
}

std::string error_of(const std::string& text, const std::vector<std::vector<std::string>>& mixers) {
  try {
    parse_layer_schedules(text, mixers);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(LayerSchedules, Errors) {
  const std::vector<std::vector<std::string>> mixers(3, {"mamba2", "attention"});
  EXPECT_THAT(error_of(R"({"layers": {"0-3": "linear", "*": "linear"}})", mixers),
              HasSubstr("layers '0-3', but the model has 3 layers, 0 to 2"));
  EXPECT_THAT(error_of(R"({"layers": {"0-1": "linear", "1": "linear", "*": "linear"}})", mixers),
              HasSubstr("layer 1 is named twice"));
  EXPECT_THAT(error_of(R"({"layers": {"0": "linear"}})", mixers), HasSubstr("layer 1 has none; add a \"*\""));
  EXPECT_THAT(error_of(R"({"layers": {"x": "linear"}})", mixers), HasSubstr("layers 'x', expected a layer, a range"));
  EXPECT_THAT(error_of(R"({"layers": {"2-1": "linear"}})", mixers), HasSubstr("expected a layer, a range"));
  EXPECT_THAT(error_of(R"({"layers": {"0,": "linear"}})", mixers), HasSubstr("expected a layer, a range"));
  EXPECT_THAT(error_of(R"({"layers": {"18446744073709551616": "linear"}})", mixers), HasSubstr("expected a layer, a range"));
  EXPECT_THAT(error_of(R"({"layers": {"0\n1": "linear"}})", mixers), HasSubstr("layers '0 1', expected a layer, a range")) << "one line";
  EXPECT_LT(error_of(R"({"layers": {")" + std::string(5000, '7') + R"(": "linear"}})", mixers).size(), 300u);
  EXPECT_THAT(error_of(R"({"layers": {"*": 3}})", mixers), HasSubstr("layers '*' is 3, expected a schedule's text"));
  EXPECT_THAT(error_of(R"({"layer": {"*": "linear"}})", mixers),
              HasSubstr("expected a schedule's text or {\"layers\""));
  EXPECT_THAT(error_of(R"({"layers": )", mixers), HasSubstr("schedule: not valid JSON"));
  EXPECT_THAT(error_of("atention", mixers), HasSubstr("Did you mean 'attention'?"));
  EXPECT_THAT(error_of("sliding_window", {{"mamba2"}, {"mamba2", "sliding_window"}, {"mamba2", "attention"}}),
              HasSubstr("found 'sliding_window', expected a mixer (mamba2, attention)"));
}

}  // namespace
}  // namespace oryx
