#include "oryx/eval/recall.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/data/test_support.h"
#include "oryx/eval/needle.h"
#include "oryx/model/scheduling.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;
using test::error_of;

const RecallOptions kTask{.pairs = 6, .queries = 4, .length = 26, .key_symbols = 12, .value_symbols = 5, .filler_symbols = 3};

ModelConfig recall_config(int64_t vocab, std::vector<std::string> mixers = {"gated_delta_net", "attention"}) {
  ModelConfig c;
  c.vocab_size = vocab;
  c.layer.hidden_size = 32;
  c.layer.head_dim = 16;
  c.layer.intermediate_size = 48;
  c.layer_mixers = {std::move(mixers)};
  return c;
}

std::unique_ptr<LanguageModel> make_random(const ModelConfig& c) {
  auto m = std::make_unique<LanguageModel>(c);
  m->initialize(2);
  at::NoGradGuard no_grad;
  for (const auto& p : m->parameters()) {
    if (p.dim() == 2 && p.size(1) > 8) at::Tensor(p).mul_(6);
  }
  return m;
}

// A model that answers everything with token `answer`: its logits are 32 there and 0 elsewhere, at every token.
std::unique_ptr<LanguageModel> make_constant(int64_t vocab, int64_t answer) {
  ModelConfig c = recall_config(vocab);
  c.tie_word_embeddings = false;
  auto m = std::make_unique<LanguageModel>(c);  // zeros: no layer adds anything
  at::NoGradGuard no_grad;
  at::Tensor(m->parameter("embed.weight")).fill_(1);
  at::Tensor(m->parameter("final_norm.weight")).fill_(1);
  at::Tensor(m->parameter("lm_head.weight"))[answer].fill_(1);
  return m;
}

TEST(Recall, KnownLogitsGiveTheKnownAccuracy) {
  const int64_t vocab = kTask.vocab_size(), answer = kTask.key_symbols + 2;
  const auto m = make_constant(vocab, answer);
  int64_t right = 0, queries = 0;
  for (uint64_t i = 0; i < 40; ++i) {
    const RecallExample e = recall_example(kTask, 8, 100 + i);
    for (const int32_t p : e.query_positions) {
      right += e.targets[static_cast<size_t>(p)] == answer ? 1 : 0;
      ++queries;
    }
  }
  ASSERT_GT(right, 0);
  for (const char* schedule : {"linear", "attention", "queries"}) {
    const RecallResult r = evaluate_recall(*m, kTask, {.schedule = schedule, .seed = 8, .first_index = 100, .examples = 40, .batch_size = 7});
    EXPECT_EQ(r.correct, right);
    EXPECT_EQ(r.queries, queries);
    EXPECT_DOUBLE_EQ(r.accuracy(), static_cast<double>(right) / static_cast<double>(queries));
    const double expected = static_cast<double>(queries) * std::log(std::exp(32.0) + static_cast<double>(vocab - 1)) - 32.0 * static_cast<double>(right);
    EXPECT_NEAR(r.nll_sum / expected, 1, 1e-4);
  }
}

TEST(Recall, IsTheArgmaxOfTheWholeModel) {
  const auto m = make_random(recall_config(kTask.vocab_size()));
  for (const std::string schedule : {"attention", "linear,attention@-8:"}) {
    const RecallResult r = evaluate_recall(*m, kTask, {.schedule = schedule, .seed = 3, .examples = 50, .batch_size = 50});
    at::NoGradGuard no_grad;
    const RecallBatch batch = recall_batch(kTask, 3, 0, 50);
    const int64_t T = kTask.tokens();
    ModelInput in;
    in.input_ids = batch.input_ids;
    in.routing = ModelSchedule(m->config(), schedule).route(row_pieces(50, T, {.prompt_length = T}), 50, T);
    const at::Tensor guess = m->logits(m->hidden(in)).argmax(-1);
    EXPECT_EQ(r.correct, guess.eq(batch.targets).sum().item<int64_t>());
    EXPECT_GT(r.correct, 0) << "a test that compares zeros";
  }
}

TEST(Recall, DoesNotDependOnTheBatchSize) {
  const auto m = make_random(recall_config(kTask.vocab_size()));
  for (const char* schedule : {"queries", "random(attention=0.5;chunk=4)"}) {
    const auto with = [&](int64_t size) { return evaluate_recall(*m, kTask, {.schedule = schedule, .examples = 20, .batch_size = size}); };
    const RecallResult a = with(1), b = with(8);
    EXPECT_EQ(a.queries, b.queries);
    EXPECT_NEAR(a.nll_sum / b.nll_sum, 1, 1e-5);
    EXPECT_NEAR(a.attention_share, b.attention_share, 1e-12);
    EXPECT_NEAR(a.flops_per_token / b.flops_per_token, 1, 1e-12);
  }
}

TEST(Recall, QueriesScheduleIsAttentionAtTheQueryKeysAlone) {
  const ModelConfig c = recall_config(kTask.vocab_size(), {"gated_delta_net", "sliding_window", "attention"});
  const RecallRouting modes(c, "queries");
  EXPECT_EQ(modes.text(), "queries");
  const RecallBatch batch = recall_batch(kTask, 1, 0, 3);
  const auto routings = modes.route(batch, 0, 0, 0);
  ASSERT_EQ(routings.size(), 1u);
  const Routing& routing = *routings.front();
  EXPECT_DOUBLE_EQ(routing.share("attention"), kTask.query_share());
  EXPECT_DOUBLE_EQ(routing.share("gated_delta_net"), 1 - kTask.query_share());
  for (const auto& span : routing.spans()) {
    const auto& mixer = routing.mixers()[static_cast<size_t>(span.mixer)];
    for (int32_t t = span.begin; t < span.end; ++t) {
      const bool query = batch.targets[span.row][t].item<int64_t>() != -100;
      EXPECT_EQ(mixer, query ? "attention" : "gated_delta_net") << "row " << span.row << " token " << t;
    }
  }
}

// Other tokens for the symbols, behind a bos: the same sequences to a model whose tokens are renamed so.
TEST(Recall, SymbolsMayBeAnyTokens) {
  const int64_t vocab = kTask.vocab_size(), answer = kTask.key_symbols + 2;
  const auto plain = make_constant(vocab, answer);
  RecallEvaluation e{.schedule = "queries", .seed = 8, .examples = 30};
  const RecallResult expected = evaluate_recall(*plain, kTask, e);
  ASSERT_GT(expected.correct, 0);
  for (int64_t i = 0; i < vocab; ++i) e.symbols.push_back(static_cast<int32_t>(2 * vocab - i));
  e.bos = 3;
  const auto renamed = make_constant(2 * vocab + 1, 2 * vocab - answer);
  const RecallResult r = evaluate_recall(*renamed, kTask, e);
  EXPECT_EQ(r.correct, expected.correct);
  EXPECT_EQ(r.queries, expected.queries);
  const auto tokens = static_cast<double>(kTask.tokens());
  EXPECT_NEAR(r.attention_share * (tokens + 1), expected.attention_share * tokens, 1e-9);
}

TEST(Recall, RefusesWhatDoesNotFit) {
  const auto m = make_random(recall_config(kTask.vocab_size() - 1));
  EXPECT_THAT(error_of([&] { evaluate_recall(*m, kTask); }), HasSubstr("need a vocabulary of 20, the model's is 19"));
  const auto linear = make_random(recall_config(20, {"gated_delta_net"}));
  EXPECT_THAT(error_of([&] { evaluate_recall(*linear, kTask, {.schedule = "queries"}); }), HasSubstr("the model's mixers are gated_delta_net"));
  EXPECT_THAT(error_of([&] { evaluate_recall(*linear, kTask, {.schedule = "linear", .examples = 0}); }), HasSubstr("0 examples"));
  EXPECT_THAT(error_of([&] { evaluate_recall(*linear, kTask, {.schedule = "atention"}); }), HasSubstr("atention"));
}

TEST(Recall, NaNIsAnError) {
  const auto m = make_random(recall_config(kTask.vocab_size()));
  at::NoGradGuard no_grad;
  at::Tensor(m->parameter("embed.weight"))[kTask.vocab_size() - 1].fill_(std::nan(""));  // one logit of each row
  EXPECT_THAT(error_of([&] { evaluate_recall(*m, kTask); }), HasSubstr("not finite"));
}

TEST(Needle, IsTheWholeModelsAnswer) {
  const auto tokenizer = make_byte_tokenizer();
  const auto m = make_random(recall_config(tokenizer->vocab_size()));
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  const NeedleExample e = task.example(400, 0.3, 5, 2);
  const auto question = static_cast<int64_t>(tokenizer->encode("\n\n" + e.question).size());
  const auto prompt = static_cast<int64_t>(e.ids.size()), answer = static_cast<int64_t>(e.answer_ids.size());

  at::NoGradGuard no_grad;
  std::vector<int64_t> ids(e.ids.begin(), e.ids.end());
  ids.insert(ids.end(), e.answer_ids.begin(), e.answer_ids.end());
  const int64_t T = prompt + answer;
  ModelInput in;
  in.input_ids = at::tensor(ids, at::kLong).view({1, T});
  const int32_t first = static_cast<int32_t>(prompt - question);
  in.routing = {std::make_shared<Routing>(1, T, m->config().mixers(), std::vector<RoutedSpan>{{0, 0, first, 0}, {0, first, static_cast<int32_t>(T), 1}})};
  const at::Tensor log_p = m->logits(m->hidden(in)).squeeze(0).log_softmax(-1).narrow(0, prompt - 1, answer);
  const double expected = -log_p.gather(1, in.input_ids.view({T, 1}).narrow(0, prompt, answer)).sum(at::kDouble).item<double>();

  for (const int64_t piece : {1024, 50}) {
    NeedleEvaluation o{.schedule = "question", .length = 400, .depth = 0.3, .examples = 1, .seed = 5, .first_index = 2};
    o.prefill_piece = piece;
    const NeedleResult r = evaluate_needle(*m, *tokenizer, task, o);
    EXPECT_NEAR(r.nll_sum / expected, 1, 1e-5);
    EXPECT_EQ(r.answer_tokens, answer);
    EXPECT_EQ(r.prompt_tokens, prompt);
    EXPECT_EQ(r.correct, 0);
    EXPECT_NEAR(r.cost.attention_share, static_cast<double>(question + answer - 1) / static_cast<double>(T - 1), 1e-12);
  }
}

// The prompt's parts are the task's to name, and a first pass is made and counted where a schedule asks for scores.
TEST(Needle, PartsAndSurpriseAreKnown) {
  const auto tokenizer = make_byte_tokenizer();
  const auto m = make_random(recall_config(tokenizer->vocab_size()));
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  const NeedleExample e = task.example(400, 0.3, 5, 0);
  const auto T = static_cast<double>(e.ids.size() + e.answer_ids.size() - 1);
  const auto share = [&](const std::string& schedule) {
    return evaluate_needle(*m, *tokenizer, task, {.schedule = schedule, .length = 400, .depth = 0.3, .examples = 1, .seed = 5}).cost;
  };
  EXPECT_NEAR(share("part(attention=needle)").attention_share, static_cast<double>(e.needle_end - e.needle_begin) / T, 1e-12);
  EXPECT_NEAR(share("part(attention=question),attention@gen").attention_share, share("question").attention_share, 1e-12);
  const EvalCost surprise = share("surprise(attention=0.1)"), linear = share("linear");
  EXPECT_NEAR(surprise.attention_share, std::round(0.1 * static_cast<double>(e.ids.size())) / T, 1e-12);
  EXPECT_GT(surprise.flops_per_token, 1.9 * linear.flops_per_token);
  EXPECT_THAT(error_of([&] { share("part(attention=answer)"); }), HasSubstr("part 'answer' of the prompt is not known here; known: needle, question"));
}

// Packed prompts, parts and first passes included, give what one after the other gives.
TEST(Needle, PackedPromptsGiveTheSame) {
  const auto tokenizer = make_byte_tokenizer();
  const auto m = make_random(recall_config(tokenizer->vocab_size()));
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  for (const char* schedule : {"question", "linear", "part(attention=needle),attention@gen", "surprise(attention=0.1)"}) {
    NeedleEvaluation o{.schedule = schedule, .length = 300, .depth = 0.4, .examples = 4, .seed = 3};
    const NeedleResult one = evaluate_needle(*m, *tokenizer, task, o);
    o.batch_tokens = 700;  // two a pass
    std::vector<int64_t> done;
    o.progress = [&](int64_t examples, double) { done.push_back(examples); };
    const NeedleResult packed = evaluate_needle(*m, *tokenizer, task, o);
    EXPECT_THAT(done, testing::ElementsAre(2, 4)) << "said as each pass ends";
    EXPECT_EQ(packed.examples, 4);
    EXPECT_EQ(packed.answer_tokens, one.answer_tokens);
    EXPECT_EQ(packed.prompt_tokens, one.prompt_tokens);
    EXPECT_EQ(packed.correct, one.correct);
    EXPECT_NEAR(packed.nll_sum / one.nll_sum, 1, 1e-5) << schedule;
    EXPECT_NEAR(packed.cost.attention_share, one.cost.attention_share, 1e-12) << schedule;
    EXPECT_NEAR(packed.cost.flops_per_token / one.cost.flops_per_token, 1, 1e-9) << schedule;
    EXPECT_NEAR(packed.cost.state_bytes, one.cost.state_bytes, 1) << schedule;
  }
}

// What a random schedule draws for a prompt does not depend on how many stand in a pass with it.
TEST(Needle, PassesDoNotChangeWhatAPromptDraws) {
  const auto tokenizer = make_byte_tokenizer();
  const auto m = make_random(recall_config(tokenizer->vocab_size()));
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  NeedleEvaluation o{.schedule = "random(attention=0.5;chunk=32)", .length = 300, .depth = 0.4, .examples = 4, .seed = 3};
  o.batch_tokens = 1500;  // all in a pass
  const NeedleResult together = evaluate_needle(*m, *tokenizer, task, o);
  o.batch_tokens = 700;
  const NeedleResult in_twos = evaluate_needle(*m, *tokenizer, task, o);
  EXPECT_EQ(in_twos.cost.attention_share, together.cost.attention_share);
  EXPECT_NEAR(in_twos.nll_sum / together.nll_sum, 1, 1e-5);
}

// Over states that bound keys and values too: each sequence has its own window and its own choice of rows.
TEST(Needle, PackedPromptsGiveTheSameOverBoundedStates) {
  const auto tokenizer = make_byte_tokenizer();
  const auto m = make_random(recall_config(tokenizer->vocab_size()));
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  for (const char* kv : {"bounded:4+40", "random:budget=60,first=4,window=30", "surprise:budget=60,first=4,window=30", "write:share=0.3,first=2,window=20", "drop"}) {
    NeedleEvaluation o{.schedule = std::string(kv) == "drop" ? "linear" : "linear,last(attention=40),attention@gen", .length = 300, .depth = 0.4, .examples = 3, .seed = 3};
    set_kv(o.state, kv);
    const NeedleResult one = evaluate_needle(*m, *tokenizer, task, o);
    o.batch_tokens = 1500;  // all in a pass
    const NeedleResult packed = evaluate_needle(*m, *tokenizer, task, o);
    EXPECT_EQ(packed.examples, 3);
    EXPECT_EQ(packed.correct, one.correct);
    EXPECT_NEAR(packed.nll_sum / one.nll_sum, 1, 1e-5) << kv;
    EXPECT_NEAR(packed.cost.attention_share, one.cost.attention_share, 1e-12) << kv;
    EXPECT_NEAR(packed.cost.flops_per_token / one.cost.flops_per_token, 1, 1e-9) << kv;
    EXPECT_NEAR(packed.cost.state_bytes, one.cost.state_bytes, 1) << kv;
  }
}

// A bounded state that holds every token that is looked at gives the same; one that dropped the needle is another matter.
TEST(Needle, KeysAndValuesMayBeBounded) {
  const auto tokenizer = make_byte_tokenizer();
  const auto m = make_random(recall_config(tokenizer->vocab_size()));
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  NeedleEvaluation o{.schedule = "attention", .length = 400, .examples = 2};
  const NeedleResult kept = evaluate_needle(*m, *tokenizer, task, o);
  set_kv(o.state, "bounded:4+1000");
  EXPECT_NEAR(evaluate_needle(*m, *tokenizer, task, o).nll_sum / kept.nll_sum, 1, 1e-6);
  set_kv(o.state, "bounded:4+40");
  const NeedleResult bound = evaluate_needle(*m, *tokenizer, task, o);
  EXPECT_GT(std::abs(bound.nll_sum / kept.nll_sum - 1), 1e-4);
  EXPECT_LT(bound.cost.state_bytes, 0.5 * kept.cost.state_bytes);
  EXPECT_LT(bound.cost.flops_per_token, kept.cost.flops_per_token);
}

// Greedy generation of a model that says one token for ever finds an answer of that token only.
TEST(Needle, EveryAnswerTokenMustBeTheLikeliest) {
  const auto tokenizer = make_byte_tokenizer();
  const auto m = make_constant(tokenizer->vocab_size(), ' ');  // the answer's first byte
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  const NeedleResult r = evaluate_needle(*m, *tokenizer, task, {.schedule = "attention", .length = 300, .examples = 3});
  EXPECT_EQ(r.examples, 3);
  EXPECT_EQ(r.correct, 0);
  EXPECT_NEAR(r.nll_sum / (32.0 * static_cast<double>(r.answer_tokens - 3)), 1, 1e-4);
}

TEST(Needle, RefusesWhatDoesNotFit) {
  const auto tokenizer = make_byte_tokenizer();
  const NeedleTask task(*tokenizer, NeedleKind::noise);
  const auto linear = make_random(recall_config(257, {"gated_delta_net"}));
  EXPECT_THAT(error_of([&] { evaluate_needle(*linear, *tokenizer, task, {.schedule = "question"}); }), HasSubstr("the model's mixers are gated_delta_net"));
  EXPECT_THAT(error_of([&] { evaluate_needle(*linear, *tokenizer, task, {.schedule = "linear", .length = 20}); }), HasSubstr("too short"));
  EXPECT_THAT(error_of([&] { evaluate_needle(*linear, *tokenizer, task, {.schedule = "linear", .examples = 0}); }), HasSubstr("0 examples"));
}

}  // namespace
}  // namespace oryx
