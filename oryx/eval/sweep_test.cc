// Sweeps: their points, what they measure, and what recall knows of its prompts for them.
#include "oryx/eval/sweep.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/eval/recall.h"
#include "oryx/model/scheduling.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;

constexpr RecallOptions kSweepTask{.pairs = 5, .queries = 3, .length = 40, .key_symbols = 8, .value_symbols = 8, .filler_symbols = 4};

std::unique_ptr<LanguageModel> sweep_model(uint64_t seed) {
  ModelConfig c;
  c.vocab_size = kSweepTask.vocab_size();
  c.num_layers = 2;
  c.layer.hidden_size = 32;
  c.layer.num_heads = 2;
  c.layer.head_dim = c.layer.value_head_dim = 16;
  c.layer.intermediate_size = 32;
  auto m = std::make_unique<LanguageModel>(c);
  m->initialize(seed);
  return m;
}

template <typename F>
std::string sweep_error(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Sweep, EveryPointIsASchedule) {
  const auto m = sweep_model(1);
  const SweepOptions o;
  for (const char* set : {"share", "kv", "switches"}) {
    const auto points = sweep_points(set, o);
    EXPECT_GT(points.size(), 10u) << set;
    for (const SweepPoint& p : points) {
      EXPECT_EQ(p.set, set);
      EXPECT_NO_THROW(ModelSchedule(m->config(), p.schedule)) << p.schedule;
      StateOptions state;
      set_kv(state, p.kv);
      // However the rows are chosen, there are as many.
      if (state.bound.on()) {
        EXPECT_EQ(p.label, fmt::format("{} rows", state.seen(1 << 20)));
      }
    }
  }
  EXPECT_THAT(sweep_error([&] { sweep_points("all", o); }), HasSubstr("unknown set 'all', known: share, kv, switches"));
  SweepOptions small = o;
  small.rows = {8};
  EXPECT_THAT(sweep_error([&] { sweep_points("kv", small); }), HasSubstr("8 rows beside the first ones, of which 8 are the window's"));
  small = o;
  small.shares = {1};
  EXPECT_THAT(sweep_error([&] { sweep_points("share", small); }), HasSubstr("expected more than 0 and less than 1"));
}

TEST(Sweep, MeasuresEveryPointOfEveryModel) {
  SweepOptions o;
  o.shares = {0.1, 0.5};
  o.rows = {10, 20};
  o.window = 4;
  o.first = 2;
  o.chunks = {1, 8};
  o.draws = 2;
  std::vector<SweepPoint> points;
  for (const char* set : {"share", "kv", "switches"}) {
    for (const SweepPoint& p : sweep_points(set, o)) points.push_back(p);
  }
  const std::vector<std::string> task{"pairs=5", "queries=3", "lengths=40", "key_symbols=8", "value_symbols=8", "filler_symbols=4", "examples=4"};
  SweepResult r;
  for (const uint64_t seed : {1, 2}) run_sweep(r, {*sweep_model(seed), nullptr, fmt::format("model{}", seed)}, "recall", task, points);
  ASSERT_EQ(r.rows.size(), points.size());
  EXPECT_EQ(r.measure, "accuracy");
  double all = 0;
  for (const SweepRow& row : r.rows) {
    ASSERT_EQ(row.values.size(), 2u);
    EXPECT_LE(row.least(), row.mean());
    EXPECT_LE(row.mean(), row.most());
    if (row.point.curve == "all rows") all = row.kv_bytes;
    if (row.point.set == "share" && row.point.label == "50%" && row.point.curve.find("question") == std::string::npos) {
      EXPECT_NEAR(row.attention_share, 0.5, row.point.curve == "random tokens" ? 0.12 : 1e-9) << row.point.curve;
    }
    if (row.point.curve == "question only") {
      EXPECT_NEAR(row.attention_share, 3.0 / 40, 1e-9);
    }
    if (row.point.curve == "needle only (oracle)") {
      EXPECT_NEAR(row.attention_share, 6.0 / 40, 1e-9);
    }
    if (row.point.curve == "a switch at every token") {
      EXPECT_NEAR(row.attention_share, 0.5, 1e-9);
    }
  }
  for (const SweepRow& row : r.rows) {
    if (row.point.set != "kv") continue;
    if (row.point.kv == "drop") {
      EXPECT_EQ(row.kv_bytes, 0);
    }
    // Of 40 tokens 12 or 22 are kept. Chosen rows hold no scalars for a replay, but their places.
    if (!row.point.label.empty()) {
      EXPECT_NEAR(row.kv_bytes / all, row.point.label == "12 rows" ? 12.0 / 40 : 22.0 / 40, 0.03) << row.point.kv;
    }
  }
  const test::TemporaryFolder folder;
  write_sweep(r, "oryx sweep recall", folder.path());
  EXPECT_THAT(read_file(folder.path() / "report.html"), HasSubstr("most surprising rows"));
  EXPECT_THAT(read_file(folder.path() / "share.svg"), HasSubstr("surprising and question"));
  EXPECT_THAT(read_file(folder.path() / "kv.svg"), HasSubstr("last rows (bounded)"));
  EXPECT_EQ(read_json_file(folder.path() / "sweep.json")["rows"].size(), points.size());
  EXPECT_EQ(r.table("kv").rows.size(), sweep_points("kv", o).size());
}

TEST(Sweep, RefusesWhatItDoesNotKnow) {
  const auto m = sweep_model(1);
  SweepResult r;
  EXPECT_THAT(sweep_error([&] { run_sweep(r, {*m, nullptr, "m"}, "recal", {}, {{"share", "a", "", "linear"}}); }), HasSubstr("unknown task 'recal'"));
  EXPECT_THAT(sweep_error([&] { run_sweep(r, {*m, nullptr, "m"}, "recall", {"pears=3"}, {{"share", "a", "", "linear"}}); }), HasSubstr("pears"));
}

// The parts of a recall prompt are its queries' keys and the pairs that answer them; a first pass is made where a schedule asks for scores.
TEST(Sweep, RecallKnowsItsPartsAndSurprise) {
  const auto m = sweep_model(3);
  RecallEvaluation e{.schedule = "queries", .examples = 8, .batch_size = 3};
  const RecallResult queries = evaluate_recall(*m, kSweepTask, e);
  e.schedule = "linear,part(attention=question)";
  const RecallResult question = evaluate_recall(*m, kSweepTask, e);
  EXPECT_EQ(question.nll_sum, queries.nll_sum);
  EXPECT_EQ(question.attention_share, queries.attention_share);
  e.schedule = "surprise(attention=0.25)";
  const RecallResult surprise = evaluate_recall(*m, kSweepTask, e);
  EXPECT_NEAR(surprise.attention_share, 0.25, 1e-9);
  e.schedule = "linear";
  EXPECT_GT(surprise.flops_per_token, 1.9 * evaluate_recall(*m, kSweepTask, e).flops_per_token);
  const RecallBatch batch = recall_batch(kSweepTask, 7, 0, 4);
  const auto facts = RecallRouting(m->config(), "linear,part(attention=needle)").facts(*m, batch);
  ASSERT_EQ(facts.size(), 4u);
  for (size_t b = 0; b < 4; ++b) {
    const auto& needle = facts[b]->parts.at("needle");
    ASSERT_EQ(needle.size(), 3u);
    const auto* ids = batch.input_ids[static_cast<int64_t>(b)].const_data_ptr<int64_t>();
    for (const auto& [key, value] : facts[b]->parts.at("question")) {
      const bool answered = std::any_of(needle.begin(), needle.end(), [&, key = key](const auto& n) { return ids[n.first] == ids[key] && ids[n.first + 1] == ids[key + 1]; });
      EXPECT_TRUE(answered);
      EXPECT_EQ(value, key + 1);
    }
  }
  EXPECT_TRUE(RecallRouting(m->config(), "queries").facts(*m, batch).empty());
}

// Sequences over a state give what they give without one, where it keeps what they look at.
TEST(Sweep, RecallOverAState) {
  const auto m = sweep_model(4);
  RecallEvaluation e{.schedule = "attention", .examples = 5, .batch_size = 2};
  const RecallResult kept = evaluate_recall(*m, kSweepTask, e);
  for (const char* kv : {"bounded:4+60", "surprise:share=100%,first=2,window=5", "random:budget=33,first=2,window=5"}) {
    set_kv(e.state, kv);
    EXPECT_NEAR(evaluate_recall(*m, kSweepTask, e).nll_sum / kept.nll_sum, 1, 1e-5) << kv;
  }
  set_kv(e.state, "surprise:budget=6,first=2,window=5");
  const RecallResult few = evaluate_recall(*m, kSweepTask, e);
  EXPECT_GT(std::abs(few.nll_sum / kept.nll_sum - 1), 1e-6);
  EXPECT_LT(few.state_bytes, kept.state_bytes);
  EXPECT_LT(few.flops_per_token, 1.2 * kept.flops_per_token);
}

}  // namespace
}  // namespace oryx
