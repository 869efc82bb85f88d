// Log-probabilities: their values, their form, and which tokens stand in which piece of an answer.
#include "oryx/serve/scores.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "oryx/common/random.h"
#include "oryx/model/test_support.h"
#include "oryx/serve/channel.h"

namespace oryx::serve {
namespace {

TEST(ServeScores, AreLogSoftmax) {
  const at::Tensor logits = at::tensor({1.0F, -2.0F, 3.0F, 3.0F, 0.5F}), wanted = at::log_softmax(logits.to(at::kDouble), 0);
  const TokenScores s = score_token(logits, 1, 3);
  EXPECT_EQ(s.id, 1);
  EXPECT_NEAR(s.logprob, wanted[1].item<double>(), 1e-12);
  ASSERT_EQ(s.top.size(), 3u);
  EXPECT_EQ(s.top[0].first, 2) << "of equals the lower id";
  EXPECT_EQ(s.top[1].first, 3);
  EXPECT_EQ(s.top[2].first, 0);
  EXPECT_NEAR(s.top[2].second, wanted[0].item<double>(), 1e-12);
  EXPECT_EQ(score_token(logits, 4, 9).top.size(), 5u);
}

TEST(ServeScores, OfRowsAreThoseOfEach) {
  at::Tensor logits = at::randn({7, 300}).to(at::kBFloat16);  // with equals among them
  logits[2][5] = -0.0, logits[2][9] = 0.0, logits[3].fill_(1.5), logits[4][17] = -std::numeric_limits<float>::infinity();
  const std::vector<int32_t> ids = {0, 299, 5, 100, 17, 6, 150};
  for (const int64_t top : {0, 1, 20, 400}) {
    const auto all = score_rows(logits, ids, top);
    ASSERT_EQ(all.size(), ids.size());
    for (size_t i = 0; i < all.size(); ++i) {
      const TokenScores one = score_token(logits[static_cast<int64_t>(i)], ids[i], top);
      EXPECT_EQ(all[i].id, one.id);
      ASSERT_EQ(all[i].top.size(), one.top.size());
      for (size_t j = 0; j < one.top.size(); ++j) {
        EXPECT_EQ(all[i].top[j].first, one.top[j].first) << i << " " << j;
        if (std::isfinite(one.top[j].second)) {
          EXPECT_NEAR(all[i].top[j].second, one.top[j].second, 1e-9);
        }
      }
      if (std::isfinite(one.logprob)) {
        EXPECT_NEAR(all[i].logprob, one.logprob, 1e-9);
      }
    }
  }
  EXPECT_THROW(score_rows(logits, std::vector<int32_t>(7, 300), 0), Error);
}

TEST(ServeScores, HaveOpenAisForms) {
  const auto tokenizer = make_byte_tokenizer();
  EXPECT_EQ(token_text(*tokenizer, 'a'), "a");
  EXPECT_EQ(token_text(*tokenizer, 0xe2), "bytes:\\xe2");
  EXPECT_EQ(token_text(*tokenizer, 256), "");
  EXPECT_EQ(token_text(*tokenizer, 1000), "") << "a vocabulary that is padded";
  const std::vector<ShownToken> tokens{{{'a', std::nan(""), {}}, 0}, {{'b', -0.5, {{'b', -0.5}, {256, -2}, {1000, -3}, {'c', -INFINITY}}}, 1}};
  EXPECT_EQ(completion_logprobs(*tokenizer, tokens, 4),
            Json::parse(R"({"tokens": ["a", "b"], "token_logprobs": [null, -0.5], "top_logprobs": [null, {"b": -0.5, "": -2.0, "c": -9999.0}], "text_offset": [0, 1]})"));
  EXPECT_EQ(completion_logprobs(*tokenizer, std::span(tokens).last(1), 0), Json::parse(R"({"tokens": ["b"], "token_logprobs": [-0.5], "top_logprobs": null, "text_offset": [1]})"));
  EXPECT_EQ(chat_logprobs(*tokenizer, std::vector<ShownToken>{{{'b', -0.5, {{0xe2, -0.25}}}, 0}}),
            Json::parse(R"({"content": [{"token": "b", "logprob": -0.5, "bytes": [98], "top_logprobs": [{"token": "bytes:\\xe2", "logprob": -0.25, "bytes": [226]}]}]})"));
}

// Tokens come with the piece in which their text begins, and those of what a stop string cut off never.
TEST(ServeChannel, TokensStandWhereTheirTextBegins) {
  const auto tokenizer = make_byte_tokenizer();
  Completion c;
  c.prompts = {{256, 'P', 0xc3, 0xa9}};  // P, e acute
  c.stops = {"STOP"};
  c.n = 2;
  c.echo = true;
  c.framed = 1;
  c.top_logprobs = 0;
  Channel channel(*tokenizer, c);
  std::vector<std::string> text(2);
  std::vector<std::vector<ShownToken>> tokens(2);
  const auto take = [&] {
    const auto all = channel.take();
    for (size_t i = 0; i < 2; ++i) {
      text[i] += all[i].text;
      for (const ShownToken& t : all[i].tokens) {
        EXPECT_LT(t.offset, count_characters(text[i]));
        tokens[i].push_back(t);
      }
    }
  };
  for (size_t i = 0; i < 2; ++i) {
    for (const int32_t id : c.prompts[0]) channel.score(i, {id, -1, {}});
  }
  for (const char byte : std::string("a\xe2\x82\xac SSTOP, no more")) {
    for (size_t i = 0; i < 2; ++i) {
      const auto id = static_cast<int32_t>(static_cast<unsigned char>(byte));
      if (tokens[i].size() > 100) break;
      channel.score(i, {id, -2, {}});
      if (!channel.add(i, id)) {
        EXPECT_EQ(byte, 'P');
        channel.end(i, {.outcome = Outcome::kStopped});
      }
    }
    take();
    if (channel.all_over()) break;
  }
  EXPECT_TRUE(channel.wait_for_end());
  take();
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(text[i], "P\xc3\xa9""a\xe2\x82\xac S");
    std::vector<std::pair<int32_t, int64_t>> got;
    for (const ShownToken& t : tokens[i]) got.emplace_back(t.scores.id, t.offset);
    EXPECT_EQ(got, (std::vector<std::pair<int32_t, int64_t>>{{'P', 0}, {0xc3, 1}, {0xa9, 1}, {'a', 2}, {0xe2, 3}, {0x82, 3}, {0xac, 3}, {' ', 4}, {'S', 5}}));
  }
}

// Of prompts in pieces and of what is written: the model's own, whatever is drawn, kept or beside it.
TEST(ServeEngineScores, AreTheModelsOwn) {
  const auto m = test::make(test::small({{"gated_delta_net", "attention"}}));
  const at::NoGradGuard no_grad;
  CounterRng rng(5);
  std::vector<int32_t> prompt(37);
  for (auto& id : prompt) id = static_cast<int32_t>(rng.below(61));
  EngineOptions o{.max_running = 3, .piece = 16, .keep_every = 16, .state_budget = 1 << 24};
  Engine engine(*m, o);
  const auto ask = [&](const char* schedule, int64_t max_tokens, bool score_prompt, std::vector<TokenScores>& scores, std::vector<int32_t>& ids, Ended& ended) {
    Request r;
    r.prompt = prompt;
    r.schedule = std::make_shared<ModelSchedule>(m->config(), schedule);
    r.max_tokens = max_tokens;
    r.vocab_size = 57;
    r.sampling = {.temperature = 1, .top_k = 3, .seed = 8};
    r.top_logprobs = 2;
    r.score_prompt = score_prompt;
    r.on_token = [&](int32_t id) {
      ids.push_back(id);
      return true;
    };
    r.on_scores = [&](TokenScores s) { scores.push_back(std::move(s)); };
    r.on_end = [&](const Ended& e) { ended = e; };
    engine.submit(std::move(r));
  };
  for (auto& id : prompt) id = id % 57;
  for (const char* schedule : {"linear", "linear,attention@-5:"}) {
    std::vector<TokenScores> whole, text, only;
    std::vector<int32_t> ids, again, none;
    Ended a, b, c;
    ask(schedule, 6, false, text, again, b);  // keeps its beginnings
    while (engine.step()) {
    }
    ask(schedule, 6, true, whole, ids, a);
    ask(schedule, 0, true, only, none, c);
    while (engine.step()) {
    }
    EXPECT_EQ(ids, again);
    EXPECT_EQ(a.reused_tokens, 0) << "a scored prompt is read whole";
    ASSERT_EQ(whole.size(), prompt.size() + 6);
    ASSERT_EQ(text.size(), 6u);
    ASSERT_EQ(only.size(), prompt.size());
    EXPECT_TRUE(none.empty());
    EXPECT_EQ(c.outcome, Outcome::kLength);
    EXPECT_EQ(c.error, "");
    // The same text, read at once.
    std::vector<int64_t> all(prompt.begin(), prompt.end());
    all.insert(all.end(), ids.begin(), ids.end());
    const auto T = static_cast<int64_t>(all.size());
    ModelInput input;
    input.input_ids = at::tensor(all, at::kLong).unsqueeze(0);
    ModePiece piece{.row = 0, .column = 0, .length = T, .start = 0, .context = {}};
    piece.context.prompt_length = static_cast<int64_t>(prompt.size());
    input.routing = ModelSchedule(m->config(), schedule).route({piece}, 1, T);
    const at::Tensor wanted = at::log_softmax(m->logits(m->hidden(input)[0]).narrow(1, 0, 57).to(at::kDouble), 1);
    EXPECT_TRUE(std::isnan(whole[0].logprob));
    for (int64_t t = 1; t < T; ++t) {
      const TokenScores& s = whole[static_cast<size_t>(t)];
      EXPECT_EQ(s.id, all[static_cast<size_t>(t)]);
      EXPECT_NEAR(s.logprob, wanted[t - 1][s.id].item<double>(), 1e-3) << t;
      ASSERT_EQ(s.top.size(), 2u);
      EXPECT_NEAR(s.top[0].second, wanted[t - 1].max().item<double>(), 1e-3) << t;
    }
    for (size_t t = 0; t < 6; ++t) EXPECT_EQ(text[t].logprob, whole[prompt.size() + t].logprob);
    for (size_t t = 1; t < prompt.size(); ++t) EXPECT_EQ(only[t].logprob, whole[t].logprob);
  }
}

}  // namespace
}  // namespace oryx::serve
