// Our scoring against the EleutherAI harness's, on worked examples (tools/make_harness_fixtures.py).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "oryx/common/file.h"
#include "oryx/eval/choice.h"
#include "oryx/eval/completion.h"
#include "tests/support/paths.h"

namespace oryx {
namespace {

Json fixture(const std::string& name) {
  const std::string path = test::source_path("tests/data/harness/" + name + ".json");
  return parse_json(read_file(path), path);
}

std::unique_ptr<EvalTask> task_of(const std::string& name) {
  for (const auto& kind : eval_tasks()) {
    if (kind.name == name) return kind.make();
  }
  ADD_FAILURE() << "no task " << name;
  return nullptr;
}

class Harness : public ::testing::TestWithParam<std::pair<std::string, std::string>> {};

TEST_P(Harness, BuildsTheSameRequestsAndGivesTheSameScores) {
  const auto& [name, file] = GetParam();
  const Json expected = fixture(file);
  const auto made = task_of(name);
  const auto* task = dynamic_cast<const ChoiceTask*>(made.get());
  ASSERT_NE(task, nullptr);
  std::vector<ChoiceItem> items;
  for (size_t i = 0; i < expected["examples"].size(); ++i) {
    items.push_back(task->item(Example(expected["examples"][i], "example")));
    EXPECT_EQ(Json(items.back().requests), expected["requests"][i]) << "example " << i;
  }
  std::map<std::string, std::vector<double>> all;
  const Json& metrics = expected["metrics"];
  for (size_t i = 0; i < metrics.size(); ++i) {
    std::vector<Likelihood> likelihoods;
    for (size_t k = 0; k < expected["log_p"][i].size(); ++k) likelihoods.push_back({expected["log_p"][i][k].get<double>(), expected["greedy"][i][k].get<bool>()});
    const ChoiceScore score = score_choices(items[i % items.size()], likelihoods);
    const std::map<std::string, double> ours = {{"acc", score.acc}, {"acc_norm", score.acc_norm}, {"acc_bytes", score.acc_bytes}, {"perplexity", score.log_p}};
    for (const auto& [metric, value] : metrics[i].items()) {
      EXPECT_EQ(ours.at(metric), value.get<double>()) << metric << " of example " << i;
      all[metric].push_back(ours.at(metric));
    }
  }
  for (const auto& [metric, values] : all) {
    const Spread s = spread_of(values);
    const double mean = metric == "perplexity" ? std::exp(-s.mean) : s.mean;
    EXPECT_NEAR(mean, expected["total"][metric].get<double>(), 1e-12 * mean) << metric;
    if (!expected["total"].contains(metric + "_stderr")) continue;
    EXPECT_NEAR(s.stderr_of_mean, expected["total"][metric + "_stderr"].get<double>(), 1e-12) << metric;
  }
}

INSTANTIATE_TEST_SUITE_P(Tasks, Harness,
                         ::testing::Values(std::pair("lambada", "lambada_openai"), std::pair("hellaswag", "hellaswag"), std::pair("piqa", "piqa"),
                                           std::pair("arc_easy", "arc_easy"), std::pair("arc_challenge", "arc_challenge"), std::pair("openbookqa", "openbookqa"),
                                           std::pair("boolq", "boolq"), std::pair("winogrande", "winogrande")),
                         [](const auto& info) { return info.param.first; });

TEST(HarnessPairs, SplitsTextsIntoTheSameTokens) {
  size_t compared = 0;
  for (const Json& pair : fixture("pairs")) {
    const auto tokenizer = load_tokenizer(test::source_path("tests/data/bpe/" + pair["tokenizer"].get<std::string>() + ".json"));
    const TokenPair ours = encode_pair(*tokenizer, pair["context"], pair["continuation"]);
    auto context = pair["context_ids"].get<std::vector<int32_t>>();
    context.insert(context.begin(), tokenizer->bos_id());
    // Where the two are joined in one token, the harness scores the whole's tokens behind as many as the context has alone.
    EXPECT_EQ(ours.context.size(), context.size()) << pair.dump();
    EXPECT_EQ(ours.continuation, pair["continuation_ids"].get<std::vector<int32_t>>()) << pair.dump();
    ++compared;
  }
  EXPECT_GT(compared, 20u);
}

TEST(HarnessContains, FindsTheSameAnswers) {
  for (const Json& c : fixture("contains")) {
    EXPECT_EQ(contains_answer(c["completion"].get<std::string>(), c["answers"].get<std::vector<std::string>>()), c["contains"].get<bool>()) << c.dump();
  }
}

}  // namespace
}  // namespace oryx
