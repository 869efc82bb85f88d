#include "oryx/eval/likelihood.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/model/test_support.h"

namespace oryx {
namespace {

using test::make;
using test::small;

std::vector<TokenPair> random_pairs(CounterRng& rng, int64_t vocab, int64_t count) {
  std::vector<TokenPair> pairs;
  for (int64_t i = 0; i < count; ++i) {
    TokenPair p;
    for (uint64_t k = 1 + rng.below(20); k > 0; --k) p.context.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab))));
    for (uint64_t k = 1 + rng.below(6); k > 0; --k) p.continuation.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab))));
    pairs.push_back(p);
  }
  return pairs;
}

// Each pair alone, by the whole model's logits; packed or not makes no difference.
TEST(Likelihood, IsTheModelsHoweverItIsPacked) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  const at::NoGradGuard no_grad;
  CounterRng rng(1);
  const auto pairs = random_pairs(rng, c.vocab_size, 25);
  for (const std::string text : {"linear", "attention@prompt,linear@gen", "linear,attention@-3:"}) {
    const ModelSchedule schedule(c, text);
    for (const int64_t batch : {1, 64, 4096}) {
      EvalCost cost;
      const auto out = score_pairs(*m, schedule, pairs, {.batch_tokens = batch}, cost);
      ASSERT_EQ(out.size(), pairs.size());
      EXPECT_EQ(cost.sequences, 25);
      for (size_t i = 0; i < pairs.size(); ++i) {
        std::vector<int64_t> ids(pairs[i].context.begin(), pairs[i].context.end());
        ids.insert(ids.end(), pairs[i].continuation.begin(), pairs[i].continuation.end());
        const auto T = static_cast<int64_t>(ids.size()), head = static_cast<int64_t>(pairs[i].context.size());
        ModelInput in;
        in.input_ids = at::tensor(ids, at::kLong).unsqueeze(0);
        ModePiece piece{.row = 0, .column = 0, .length = T, .start = 0, .context = {}};
        piece.context.prompt_length = head;
        in.routing = schedule.route({piece}, 1, T);
        const at::Tensor log_p = m->logits(m->hidden(in))[0].log_softmax(-1);
        double sum = 0;
        bool greedy = true;
        for (int64_t t = head; t < T; ++t) {
          sum += log_p[t - 1][ids[static_cast<size_t>(t)]].item<double>();
          greedy = greedy && log_p[t - 1].argmax().item<int64_t>() == ids[static_cast<size_t>(t)];
        }
        EXPECT_NEAR(out[i].log_p, sum, 1e-3 * std::abs(sum)) << text << " " << batch << " " << i;
        EXPECT_EQ(out[i].greedy, greedy);
      }
    }
  }
}

TEST(Likelihood, SpreadIsTheSampleDeviationOfTheMean) {
  const Spread s = spread_of({1, 0, 0, 1, 1});
  EXPECT_DOUBLE_EQ(s.mean, 0.6);
  EXPECT_NEAR(s.stderr_of_mean, std::sqrt(0.3) / std::sqrt(5.0), 1e-12);
  EXPECT_EQ(spread_of({2}).stderr_of_mean, 0);
}

TEST(Likelihood, NaNIsAnError) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  const at::NoGradGuard no_grad;
  at::Tensor(m->parameter("embed.weight"))[3].fill_(std::nan(""));
  CounterRng rng(2);
  EvalCost cost;
  EXPECT_THROW(score_pairs(*m, ModelSchedule(c, "linear"), random_pairs(rng, c.vocab_size, 3), {}, cost), Error);
}

}  // namespace
}  // namespace oryx
