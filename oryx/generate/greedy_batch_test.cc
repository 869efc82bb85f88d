#include "oryx/generate/greedy_batch.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/generate/facts.h"
#include "oryx/generate/generator.h"
#include "oryx/generate/session.h"
#include "oryx/model/test_support.h"
#include "oryx/router/test_support.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using test::make;
using test::small;

std::vector<BatchPrompt> batch_prompts(int64_t vocab) {
  CounterRng rng(4);
  std::vector<BatchPrompt> prompts;
  for (const int64_t length : {9, 1, 40, 17}) {
    BatchPrompt p;
    for (int64_t i = 0; i < length; ++i) p.ids.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab))));
    prompts.push_back(std::move(p));
  }
  return prompts;
}

// Each prompt's tokens are those of its own session, whichever of them end early.
TEST(GreedyBatch, GivesEachPromptWhatItsSessionGives) {
  constexpr int64_t kNew = 7;
  const size_t ends[] = {7, 3, 2, 6};  // two are left, then one
  for (const auto& mixers : {std::vector<std::string>{"gated_delta_net", "attention"}, {"mamba2", "attention"}, {"attention"}}) {
    const ModelConfig c = small({mixers});
    const auto m = make(c);
    auto prompts = batch_prompts(c.vocab_size);
    for (const std::string text : {"linear", "attention", "attention@prompt,linear@gen", "linear,part(attention=question),attention@gen"}) {
      for (const std::string kv : {"keep", "bounded:2+12"}) {
        const ModelSchedule schedule(c, text);
        std::vector<std::vector<int32_t>> expected(prompts.size()), got(prompts.size());
        GreedyBatchOptions o{.max_new_tokens = kNew, .vocab_size = c.vocab_size - 5};
        set_kv(o.state, kv);
        for (size_t i = 0; i < prompts.size(); ++i) {
          BatchPrompt& p = prompts[i];
          const auto length = static_cast<int64_t>(p.ids.size());
          p.facts = gather_facts(*m, schedule, p.ids, {{"question", {{std::max<int64_t>(0, length - 4), length}}}});
          SessionOptions options{length, length + kNew, 1024, 0, o.state};
          options.facts = p.facts;
          Session session(*m, schedule, options);
          at::Tensor hidden = session.extend(p.ids);
          for (int64_t n = 0; n < kNew; ++n) {
            const auto id = static_cast<int32_t>(m->logits(hidden).narrow(1, 0, o.vocab_size).argmax().item<int64_t>());
            expected[i].push_back(id);
            hidden = session.extend({&id, 1});
          }
        }
        generate_greedily(*m, schedule, prompts, o, [&](size_t i, int32_t id) {
          got[i].push_back(id);
          return got[i].size() < ends[i];
        });
        for (size_t i = 0; i < expected.size(); ++i) expected[i].resize(ends[i]);
        EXPECT_EQ(got, expected) << mixers.front() << " " << text << " " << kv;
      }
    }
  }
}

// A router decides on each prompt's own tokens, also on those that are written.
TEST(GreedyBatch, RoutersDecideForEachPrompt) {
  constexpr int64_t kNew = 9;
  const test::TemporaryFolder folder;
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  auto prompts = batch_prompts(c.vocab_size);
  for (const bool reads_hidden : {true, false}) {
    const std::string file = test::save_drawn_head(*m, reads_hidden, folder / "r");
    for (const std::string& text : {"linear,router(attention=0.4;" + file + ")", "linear,router(attention=0.3;window=4;" + file + ")@gen"}) {
      const ModelSchedule schedule(c, text);
      std::vector<std::vector<int32_t>> expected(prompts.size()), got(prompts.size());
      for (size_t i = 0; i < prompts.size(); ++i) {
        prompts[i].facts = gather_facts(*m, schedule, prompts[i].ids);
        expected[i] = generate(*m, schedule, prompts[i].ids, {.max_new_tokens = kNew}).ids;
      }
      generate_greedily(*m, schedule, prompts, {.max_new_tokens = kNew}, [&](size_t i, int32_t id) {
        got[i].push_back(id);
        return true;
      });
      EXPECT_EQ(got, expected) << text;
    }
  }
}

TEST(GreedyBatch, NaNIsAnError) {
  const ModelConfig c = small({{"gated_delta_net", "attention"}});
  const auto m = make(c);
  {
    const at::NoGradGuard no_grad;
    at::Tensor(m->parameter("embed.weight"))[3].fill_(std::nan(""));
  }
  const auto prompts = batch_prompts(c.vocab_size);
  EXPECT_THROW(generate_greedily(*m, ModelSchedule(c, "linear"), prompts, {}, [](size_t, int32_t) { return true; }), Error);
}

}  // namespace
}  // namespace oryx
