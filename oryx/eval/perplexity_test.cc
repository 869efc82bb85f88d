#include "oryx/eval/perplexity.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/data/test_support.h"
#include "oryx/eval/task.h"
#include "oryx/model/inspect.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;
using test::error_of;

ModelConfig text_config(int64_t vocab) {
  ModelConfig c;
  c.vocab_size = vocab;
  c.layer.hidden_size = 32;
  c.layer.head_dim = 16;
  c.layer.intermediate_size = 48;
  return c;
}

std::unique_ptr<LanguageModel> random_model(const ModelConfig& c) {
  auto m = std::make_unique<LanguageModel>(c);
  m->initialize(2);
  at::NoGradGuard no_grad;
  for (const auto& p : m->parameters()) {
    if (p.dim() == 2 && p.size(1) > 8) at::Tensor(p).mul_(6);
  }
  return m;
}

// Documents of these lengths, in a token file.
std::shared_ptr<const TokenFile> tokens(const test::TemporaryFolder& folder, int64_t vocab, const std::vector<size_t>& lengths) {
  CounterRng rng(4);
  TokenFileWriter writer(folder / "some.tok", vocab, 0);
  for (const size_t n : lengths) {
    std::vector<int32_t> document(n);
    for (auto& t : document) t = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab)));
    writer.add(document);
  }
  writer.finish();
  return std::make_shared<TokenFile>(folder / "some.tok");
}

TEST(Perplexity, OfAUniformModelIsTheVocabulary) {
  const test::TemporaryFolder folder;
  const LanguageModel m(text_config(53));  // all zeros: every logit is 0
  EvalReader reader(tokens(folder, 53, {20, 1, 75, 2}), {.seq_len = 32});
  for (const char* schedule : {"linear", "attention", "random(attention=0.5;chunk=8)"}) {
    const auto r = evaluate_perplexity(m, ModelSchedule(m.config(), schedule), reader);
    EXPECT_EQ(r.targets, 19 + 74 + 1);
    EXPECT_EQ(r.windows, 1 + 3 + 1);
    EXPECT_EQ(r.longest, 32);
    EXPECT_NEAR(r.perplexity(), 53, 53e-6);
    EXPECT_NEAR(r.nats(), std::log(53.0), 1e-6);
    EXPECT_FALSE(r.bits_per_byte());
  }
}

TEST(Perplexity, IsTheLossOfEachWindowAlone) {
  const test::TemporaryFolder folder;
  const auto m = random_model(text_config(53));
  const auto file = tokens(folder, 53, {50});
  const ModelSchedule schedule(m->config(), "linear,attention@50%:");
  EvalReader reader(file, {.seq_len = 30});
  const auto r = evaluate_perplexity(*m, schedule, reader);

  at::NoGradGuard no_grad;
  std::vector<int64_t> ids(50);
  file->read(0, ids);
  double expected = 0;
  for (const auto& [begin, length] : {std::pair<int64_t, int64_t>{0, 30}, {30, 19}}) {
    const at::Tensor all = at::tensor(ids, at::kLong);
    ModelInput in;
    in.input_ids = all.narrow(0, begin, length).view({1, length});
    in.routing = schedule.route(row_pieces(1, length, {.prompt_length = length}), 1, length);
    const at::Tensor log_p = m->logits(m->hidden(in)).squeeze(0).log_softmax(-1);
    expected -= log_p.gather(1, all.narrow(0, begin + 1, length).view({length, 1})).sum(at::kDouble).item<double>();
  }
  EXPECT_NEAR(r.nll_sum / expected, 1, 1e-5);
  EXPECT_EQ(r.targets, 49);
  EXPECT_NEAR(r.attention_share, (15 + 10) / 49.0, 1e-12);  // 19 tokens: from 9 on
  EXPECT_EQ(r.state_bytes, state_bytes(m->config(), 30).total());
}

TEST(Perplexity, DoesNotDependOnThePacking) {
  const test::TemporaryFolder folder;
  const auto m = random_model(text_config(53));
  const auto file = tokens(folder, 53, {20, 33, 100, 7, 2, 64, 65});
  for (const char* text : {"linear", "attention", "linear,attention@-5:", "random(attention=0.5;chunk=4)"}) {
    const ModelSchedule schedule(m->config(), text);
    EvalReader alone(file, {.seq_len = 32}), packed(file, {.seq_len = 32, .tokens_per_batch = 150});
    const auto a = evaluate_perplexity(*m, schedule, alone), b = evaluate_perplexity(*m, schedule, packed);
    EXPECT_EQ(a.targets, b.targets);
    EXPECT_EQ(a.windows, b.windows);
    EXPECT_NEAR(a.nll_sum / b.nll_sum, 1, 1e-5) << text;
    EXPECT_NEAR(a.attention_share, b.attention_share, 1e-12) << text;
    EXPECT_NEAR(a.flops_per_token / b.flops_per_token, 1, 1e-12) << text;
  }
}

// Windows over a state that keeps what they look at lose nothing; one that keeps less does, and costs less.
TEST(Perplexity, KeysAndValuesMayBeBounded) {
  const test::TemporaryFolder folder;
  const auto m = random_model(text_config(53));
  const auto file = tokens(folder, 53, {50, 33, 70});
  const ModelSchedule schedule(m->config(), "attention");
  EvalReader reader(file, {.seq_len = 40, .tokens_per_batch = 90});
  const auto kept = evaluate_perplexity(*m, schedule, reader);
  const auto with = [&](const char* kv) {
    PerplexityOptions o;
    set_kv(o.state, kv);
    return evaluate_perplexity(*m, schedule, reader, o);
  };
  for (const char* kv : {"bounded:4+60", "surprise:share=100%,first=2,window=5"}) EXPECT_NEAR(with(kv).nll_sum / kept.nll_sum, 1, 1e-5) << kv;
  const auto few = with("write:budget=6,first=2,window=5");
  EXPECT_GT(std::abs(few.nll_sum / kept.nll_sum - 1), 1e-4);
  EXPECT_LT(few.state_bytes, kept.state_bytes);
  EXPECT_EQ(few.targets, kept.targets);
}

TEST(Perplexity, RandomSchedulesFollowTheSeed) {
  const test::TemporaryFolder folder;
  const auto m = random_model(text_config(53));
  EvalReader reader(tokens(folder, 53, {200}), {.seq_len = 64});
  const ModelSchedule schedule(m->config(), "random(attention=0.5;chunk=4)");
  const auto with = [&](uint64_t seed) { return evaluate_perplexity(*m, schedule, reader, {.seed = seed}).nll_sum; };
  EXPECT_EQ(with(1), with(1));
  EXPECT_NE(with(1), with(2));
}

TEST(Perplexity, BitsPerByteCountTheBytesOfTargets) {
  const test::TemporaryFolder folder;
  const auto tokenizer = make_byte_tokenizer();
  TokenFileWriter writer(folder / "text.tok", tokenizer->vocab_size(), tokenizer->fingerprint());
  writer.add(tokenizer->encode_document("sixteen bytes ab"));
  writer.add(tokenizer->encode_document("über"));  // 5 bytes
  writer.finish();
  const LanguageModel m(text_config(257));
  EvalReader reader(std::make_shared<TokenFile>(folder / "text.tok"), {.seq_len = 8});
  const auto r = evaluate_perplexity(m, ModelSchedule(m.config(), "linear"), reader, {.tokenizer = tokenizer.get()});
  EXPECT_EQ(r.text_bytes, 21);
  EXPECT_EQ(r.targets, 23);  // the eos of both are targets, and no bytes
  ASSERT_TRUE(r.bits_per_byte());
  EXPECT_NEAR(*r.bits_per_byte(), std::log2(257.0) * 23 / 21, 1e-5);
}

TEST(Perplexity, FlopsAreThoseOfTheWindows) {
  const test::TemporaryFolder folder;
  const auto m = random_model(text_config(53));
  EvalReader reader(tokens(folder, 53, {33}), {.seq_len = 32});
  const auto r = evaluate_perplexity(*m, ModelSchedule(m->config(), "attention"), reader);
  double expected = 0;
  for (int64_t t = 1; t <= 32; ++t) expected += token_flops(m->config(), "attention", t) / 32;
  EXPECT_NEAR(r.flops_per_token / expected, 1, 1e-12);
  EXPECT_EQ(evaluate_perplexity(*m, ModelSchedule(m->config(), "attention"), reader, {.count_flops = false}).flops_per_token, 0);
}

TEST(Perplexity, NaNIsAnError) {
  const test::TemporaryFolder folder;
  const auto m = random_model(text_config(53));
  EvalReader reader(tokens(folder, 53, {33}), {.seq_len = 32});
  at::NoGradGuard no_grad;
  at::Tensor(m->parameter("layers.1.norm1.weight"))[3].fill_(std::nan(""));
  EXPECT_THAT(error_of([&] { evaluate_perplexity(*m, ModelSchedule(m->config(), "linear"), reader); }), HasSubstr("schedule 'linear': the loss is nan"));
}

TEST(EvalTask, TablesAreAligned) {
  const EvalTable table{{{"name", "name", cell_text()}, {"x", "x", cell_fixed(2)}, {"share", "share", cell_percent()}},
                        {{{"name", "a long name"}, {"x", 1.5}, {"share", 0.25}}, {{"name", "b"}, {"x", nullptr}, {"share", 1}}}};
  EXPECT_EQ(format_table(table), "name            x   share\na long name  1.50   25.0%\nb               -  100.0%\n");
}

TEST(EvalTask, NoNumberThatIsNotFinite) {
  EvalTable table{{}, {{{"good", 1.0}}}};
  check_finite(table);
  table.rows.push_back({{"bad", std::numeric_limits<double>::infinity()}});
  EXPECT_THAT(error_of([&] { check_finite(table); }), HasSubstr("'bad' is inf"));
}

TEST(EvalTask, AllAreRegistered) {
  std::vector<std::string> names;
  for (const auto& kind : eval_tasks()) names.push_back(kind.name);
  EXPECT_THAT(names, ::testing::IsSupersetOf({"needle", "perplexity", "recall"}));
}

TEST(EvalTask, SingleModesAreTheModelsChoices) {
  using Names = std::vector<std::string>;
  EXPECT_EQ(single_modes(preset("tiny")), (Names{"gated_delta_net", "attention"}));
  EXPECT_EQ(single_modes(preset("tiny-transformer")), (Names{"attention"}));
  EXPECT_EQ(single_modes(preset("tiny-inter-layer")), (Names{"linear"}));
  EXPECT_EQ(single_modes(preset("tiny-intra-layer")), (Names{"linear"}));
  EXPECT_TRUE(has_attention_choice(preset("tiny")));
  for (const char* name : {"tiny-transformer", "tiny-gdn", "tiny-inter-layer", "tiny-intra-layer"}) EXPECT_FALSE(has_attention_choice(preset(name))) << name;
}

}  // namespace
}  // namespace oryx
