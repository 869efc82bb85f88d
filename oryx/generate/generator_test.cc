// Decoding is the whole model's answer, whatever the schedule and the split.
#include "oryx/generate/generator.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/data/test_support.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/routed_cost.h"
#include "oryx/model/state_file.h"
#include "tests/support/fixtures.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using test::error_of;
using ::testing::HasSubstr;

constexpr double kTolerance = 2e-5;  // float32, two small layers, different orders of summation

ModelConfig small_config(std::vector<std::vector<std::string>> mixers = {{"gated_delta_net", "attention"}}) {
  ModelConfig c;
  c.vocab_size = 71;
  c.layer.hidden_size = 48;
  c.layer.num_heads = 4;
  c.layer.head_dim = 16;
  c.layer.intermediate_size = 64;
  c.layer_mixers = std::move(mixers);
  return c;
}

std::unique_ptr<LanguageModel> make_model(const ModelConfig& c) {
  auto m = std::make_unique<LanguageModel>(c);
  m->initialize(5);
  at::NoGradGuard no_grad;
  // Louder than the initialisation, so that the likeliest token stands out.
  for (size_t i = 0; i < m->specs().size(); ++i) {
    if (m->specs()[i].part != "convolution" && m->specs()[i].shape.size() == 2) at::Tensor(m->parameters()[i]).mul_(6);
  }
  return m;
}

std::vector<int32_t> prompt_of(size_t length) {
  CounterRng rng(17);
  std::vector<int32_t> ids(length);
  for (auto& id : ids) id = static_cast<int32_t>(rng.below(71));
  return ids;
}

// The parallel form over the whole sequence -> logits [T, V].
at::Tensor whole(const LanguageModel& m, const ModelSchedule& schedule, const std::vector<int32_t>& ids, int64_t prompt_length, uint64_t seed = 0) {
  at::NoGradGuard no_grad;
  const auto T = static_cast<int64_t>(ids.size());
  ModelInput input;
  input.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).view({1, T});
  ModePiece piece{.row = 0, .column = 0, .length = T, .start = 0, .context = {}};
  piece.context.prompt_length = prompt_length;
  piece.context.seed = seed;
  input.routing = schedule.route({piece}, 1, T);
  return m.logits(m.hidden(input)).squeeze(0);
}

const std::vector<std::string> kSchedules = {"linear",
                                             "attention",
                                             "linear,attention@-5:",
                                             "linear,attention@90%:100%",
                                             "attention@prompt,linear@gen",
                                             "linear,attention@gen",
                                             "random(attention=0.5;chunk=4)",
                                             R"({"layers": {"0": "attention", "1": "linear,attention@-9:"}})"};

// A text that is left, saved and gone on from is the text that was never left.
TEST(Generator, GoesOnFromASession) {
  for (const char* kv : {"keep", "bounded:3+9", "surprise:budget=6,first=2,window=9"}) {
    for (const char* text : {"linear", "attention", "random(attention=0.5;chunk=4)", "linear,attention@20:"}) {
      SCOPED_TRACE(fmt::format("{} {}", kv, text));
      const auto m = make_model(small_config());
      const ModelSchedule schedule(m->config(), text);
      const auto prompt = prompt_of(25), more = prompt_of(7);
      const test::TemporaryFolder folder;
      const auto file = folder / "session.safetensors";
      GenerateOptions o{.max_new_tokens = 8, .prefill_piece = 16};
      set_kv(o.state, kv);
      int64_t saved = 0;
      o.at_end = [&](const State& state, const TextEnd& end) {
        saved = state.lengths()[0];
        save_state(*m, state, file, end);
      };
      const Generated first = generate(*m, schedule, prompt, o);
      EXPECT_EQ(saved, 25 + 8);
      EXPECT_EQ(first.stats.state.total(), first.stats.predicted_state.total());

      State state = load_state(*m, file);
      GenerateOptions on{.max_new_tokens = 9, .prefill_piece = 16, .from = &state};
      const Generated second = generate(*m, schedule, more, on);
      EXPECT_EQ(second.stats.held_tokens, 33);
      EXPECT_EQ(second.stats.prompt_tokens, 7);

      std::vector<int32_t> all = prompt;
      all.insert(all.end(), first.ids.begin(), first.ids.end());
      all.insert(all.end(), more.begin(), more.end());
      GenerateOptions once{.max_new_tokens = 9, .prefill_piece = 16};
      once.state = o.state;
      const Generated whole = generate(*m, schedule, all, once);
      EXPECT_EQ(second.ids, whole.ids);
      EXPECT_EQ(second.stats.state.total(), whole.stats.state.total());
      EXPECT_NEAR(second.stats.attention_share, whole.stats.attention_share, 1e-12);

      // And without another word.
      TextEnd end;
      State left = load_state(*m, file, 0, &end);
      const Generated rest = generate(*m, schedule, {}, {.max_new_tokens = 9, .prefill_piece = 16, .from = &left, .from_end = end});
      EXPECT_EQ(rest.stats.prompt_tokens, 0);
      o.max_new_tokens = 17;
      std::vector<int32_t> joined = first.ids;
      joined.insert(joined.end(), rest.ids.begin(), rest.ids.end());
      EXPECT_EQ(joined, generate(*m, schedule, prompt, o).ids);
    }
  }
}

// On a GPU: the last token of a session goes through the fused decoder like those before it.
TEST(GeneratorCuda, GoesOnFromASessionAsIfItHadNeverBeenLeft) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  ModelConfig c;
  c.vocab_size = 320, c.num_layers = 2;
  c.layer.hidden_size = 256, c.layer.num_heads = 2, c.layer.head_dim = 128, c.layer.intermediate_size = 512;
  LanguageModel m(c, at::kBFloat16);
  m.initialize(3);
  m.to(at::kCUDA);
  m.keep_copies();
  const ModelSchedule schedule(c, "linear,attention@20:");
  const auto prompt = prompt_of(17);
  const test::TemporaryFolder folder;
  const auto file = folder / "session.safetensors";
  GenerateOptions o{.max_new_tokens = 8, .sampling = {.temperature = 1, .seed = 2}};
  o.at_end = [&](const State& state, const TextEnd& end) { save_state(m, state, file, end); };
  std::vector<int32_t> joined = generate(m, schedule, prompt, o).ids;
  TextEnd end;
  State left = load_state(m, file, 0, &end);
  const auto rest = generate(m, schedule, {}, {.max_new_tokens = 9, .sampling = o.sampling, .from = &left, .from_end = end}).ids;
  joined.insert(joined.end(), rest.begin(), rest.end());
  o.max_new_tokens = 17;
  EXPECT_EQ(joined, generate(m, schedule, prompt, o).ids);
}

TEST(Generator, ASessionWithoutAnEndWantsAPrompt) {
  const auto m = make_model(small_config());
  State state = m->make_state(1);
  EXPECT_THAT(error_of([&] { generate(*m, ModelSchedule(m->config(), "linear"), {}, {.from = &state}); }),
              HasSubstr("the session does not hold what follows its text; give a prompt"));
}

TEST(Generator, ASessionIsNotSavedBeforeItsTextIsWhole) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear");
  int64_t held = -1;
  GenerateOptions o{.max_new_tokens = 8, .at_end = [&](const State& state, const TextEnd&) { held = state.lengths()[0]; }};
  const auto stopped = generate(*m, schedule, prompt_of(5), o, [n = 0](int32_t) mutable { return ++n < 3; });
  EXPECT_EQ(stopped.stop, StopReason::kCallback);
  EXPECT_EQ(held, 5 + 3);
  o.eos_id = stopped.ids[2];
  const auto ended = generate(*m, schedule, prompt_of(5), o);
  EXPECT_EQ(ended.stop, StopReason::kEos);
  EXPECT_EQ(held, 5 + static_cast<int64_t>(ended.ids.size()));

  State state = m->make_state(1);
  o.from = &state;
  try {
    generate(*m, ModelSchedule(m->config(), "linear,surprise(attention=0.1)"), prompt_of(5), o);
    FAIL() << "scores of a prompt that is gone";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("wants to know the whole prompt"));
  }
}

TEST(Generator, GreedyIsTheArgmaxOfTheWhole) {
  const auto m = make_model(small_config());
  const auto prompt = prompt_of(37);
  for (const auto& text : kSchedules) {
    const ModelSchedule schedule(m->config(), text);
    const Generated out = generate(*m, schedule, prompt, {.max_new_tokens = 24, .prefill_piece = 16});
    ASSERT_EQ(out.ids.size(), 24u);
    EXPECT_EQ(out.stop, StopReason::kLength);
    std::vector<int32_t> all = prompt;
    all.insert(all.end(), out.ids.begin(), out.ids.end());
    const at::Tensor likeliest = whole(*m, schedule, all, 37).argmax(-1);
    for (size_t i = 0; i < out.ids.size(); ++i) EXPECT_EQ(out.ids[i], likeliest[static_cast<int64_t>(36 + i)].item<int64_t>()) << text << " token " << i;
  }
}

TEST(Generator, EveryMixerGenerates) {
  for (const auto& mixers : std::vector<std::vector<std::vector<std::string>>>{
           {{"mamba2", "attention"}}, {{"attention"}}, {{"gated_delta_net"}, {"attention"}}, {{"gated_delta_net", "sliding_window", "attention"}}}) {
    const auto m = make_model(small_config(mixers));
    const ModelSchedule schedule(m->config(), "");
    const auto prompt = prompt_of(9);
    const Generated out = generate(*m, schedule, prompt, {.max_new_tokens = 8});
    std::vector<int32_t> all = prompt;
    all.insert(all.end(), out.ids.begin(), out.ids.end());
    const at::Tensor likeliest = whole(*m, schedule, all, 9).argmax(-1);
    for (size_t i = 0; i < out.ids.size(); ++i) EXPECT_EQ(out.ids[i], likeliest[static_cast<int64_t>(8 + i)].item<int64_t>());
  }
}

TEST(Session, PiecesGiveTheWhole) {
  const auto m = make_model(small_config());
  const auto ids = prompt_of(83);
  for (const auto& text : kSchedules) {
    const ModelSchedule schedule(m->config(), text);
    const at::Tensor expected = whole(*m, schedule, ids, 70, 3);
    for (const int64_t piece : {3, 16, 200}) {
      Session session(*m, schedule, {.prompt_length = 70, .tokens = 83, .piece = piece, .seed = 3});
      const at::Tensor first = session.extend(std::span(ids).first(50), 20);
      const at::Tensor second = session.extend(std::span(ids).subspan(50), 33);
      EXPECT_LT(test::fixture_error(m->logits(first), expected.narrow(0, 30, 20)), kTolerance) << text << " piece " << piece;
      EXPECT_LT(test::fixture_error(m->logits(second), expected.narrow(0, 50, 33)), kTolerance) << text << " piece " << piece;
      EXPECT_EQ(session.length(), 83);
    }
  }
}

TEST(Session, StateIsAsPlannedAndReserved) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear");
  Session session(*m, schedule, {.prompt_length = 40, .tokens = 40});
  session.extend(prompt_of(40));
  const StateBytes held = session.state().bytes();
  EXPECT_EQ(held.total(), session.plan().state.total());
  // Rows are reserved in pages.
  const int64_t page = RowStore::kPageTokens, pages = (40 + page - 1) / page;
  EXPECT_EQ(session.state().reserved_bytes().tokens, held.tokens / 40 * pages * page);
  EXPECT_GT(held.tokens, 0);
  EXPECT_GT(held.recurrent, 0);
}

TEST(Session, CountsAttention) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear,attention@-10:");
  Session session(*m, schedule, {.prompt_length = 40, .tokens = 50, .piece = 7});
  session.extend(prompt_of(40));
  EXPECT_DOUBLE_EQ(session.attention_share(), 0.25);
  session.extend(prompt_of(10));
  EXPECT_DOUBLE_EQ(session.attention_share(), 0.4);
}

TEST(Session, TrimAndResumeGoOnAsIfNothingHadBeen) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear,attention@-10:");
  const auto ids = prompt_of(60);
  const at::Tensor expected = whole(*m, schedule, ids, 40);
  Session session(*m, schedule, {.prompt_length = 40, .tokens = 60, .piece = 16});
  session.extend(std::span(ids).first(40));
  session.extend(prompt_of(9));
  session.trim(33);
  EXPECT_EQ(session.length(), 33);
  EXPECT_DOUBLE_EQ(session.attention_share(), 3.0 / 33);
  Session resumed(*m, schedule, {.prompt_length = 40, .tokens = 60}, session.state().fork({0}));
  EXPECT_DOUBLE_EQ(resumed.attention_share(), 3.0 / 33);
  for (Session* s : {&session, &resumed}) {
    EXPECT_LT(test::fixture_error(m->logits(s->extend(std::span(ids).subspan(33), 27)), expected.narrow(0, 33, 27)), kTolerance);
  }
}

TEST(Generator, SamplingIsAFunctionOfTheSeed) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear,attention@gen");
  const auto prompt = prompt_of(12);
  const auto with = [&](int64_t seed, int64_t piece) {
    return generate(*m, schedule, prompt, {.max_new_tokens = 30, .prefill_piece = piece, .sampling = {.temperature = 1.5, .seed = seed}}).ids;
  };
  EXPECT_EQ(with(1, 1024), with(1, 1024));
  EXPECT_NE(with(1, 1024), with(2, 1024));
}

TEST(Generator, Stops) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "attention");
  const auto prompt = prompt_of(12);
  const auto free_run = generate(*m, schedule, prompt, {.max_new_tokens = 10}).ids;
  // The first token that differs from all before it ends the text when it is the eos.
  size_t at = 1;
  while (at < free_run.size() && std::count(free_run.begin(), free_run.begin() + static_cast<int64_t>(at), free_run[at]) > 0) ++at;
  ASSERT_LT(at, free_run.size()) << "the model repeats one token";
  const Generated ended = generate(*m, schedule, prompt, {.max_new_tokens = 10, .eos_id = free_run[at]});
  EXPECT_EQ(ended.stop, StopReason::kEos);
  EXPECT_EQ(ended.ids, std::vector<int32_t>(free_run.begin(), free_run.begin() + static_cast<int64_t>(at)));
  EXPECT_EQ(ended.stats.new_tokens, static_cast<int64_t>(at) + 1);

  std::vector<int32_t> seen;
  const Generated cut = generate(*m, schedule, prompt, {.max_new_tokens = 10}, [&](int32_t id) {
    seen.push_back(id);
    return seen.size() < 3;
  });
  EXPECT_EQ(cut.stop, StopReason::kCallback);
  EXPECT_EQ(seen, cut.ids);
  EXPECT_EQ(seen, std::vector<int32_t>(free_run.begin(), free_run.begin() + 3));
}

TEST(Generator, Statistics) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "attention@prompt,linear@gen");
  const Generated out = generate(*m, schedule, prompt_of(30), {.max_new_tokens = 11});
  const GenerateStats& s = out.stats;
  EXPECT_EQ(s.prompt_tokens, 30);
  EXPECT_EQ(s.new_tokens, 11);
  EXPECT_EQ(s.decode_steps, 10);  // the last token is not run
  EXPECT_DOUBLE_EQ(s.attention_share, 0.75);
  EXPECT_EQ(s.state.total(), s.predicted_state.total());
  EXPECT_EQ(s.state.tokens, s.predicted_state.tokens);
  EXPECT_GT(s.predicted.state.tokens, s.state.tokens);  // for one token more
  EXPECT_GT(s.prefill_tokens_per_second(), 0);
  EXPECT_GT(s.decode_ms_per_token(), 0);
}

TEST(Generator, DrawsOnlyFromTheTokenisersVocabulary) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear");
  const auto out = generate(*m, schedule, prompt_of(5), {.max_new_tokens = 100, .vocab_size = 4, .sampling = {.temperature = 3}});
  for (const int32_t id : out.ids) EXPECT_LT(id, 4);
}

TEST(Generator, StreamedTextIsTheDecodedText) {
  const auto tokenizer = make_byte_tokenizer();
  auto config = small_config();
  config.vocab_size = tokenizer->vocab_size();
  const auto m = make_model(config);
  const ModelSchedule schedule(m->config(), "linear");
  StreamDecoder decoder(*tokenizer);
  std::string streamed;
  // Random bytes: most are no whole characters.
  const auto out = generate(*m, schedule, tokenizer->encode_prompt("Grüße"),
                            {.max_new_tokens = 200, .sampling = {.temperature = 2}}, [&](int32_t id) {
                              streamed += decoder.add(id);
                              return true;
                            });
  streamed += decoder.finish();
  EXPECT_EQ(streamed, tokenizer->decode(out.ids));
  EXPECT_EQ(out.ids.size(), 200u);
}

TEST(Generator, RefusesWhatExceedsMemoryBeforeAllocating) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear");
  // 2 layers x 4 heads x (16 + 16) x 4 bytes a token: two terabytes.
  const std::string error = error_of([&] { generate(*m, schedule, prompt_of(3), {.max_new_tokens = 2'000'000'000}); });
  EXPECT_THAT(error, HasSubstr("of memory are free"));
  EXPECT_THAT(error, HasSubstr("2000000003 tokens"));
  const auto pieces = plan_memory(m->config(), 1 << 20, 1 << 20, at::kFloat), small = plan_memory(m->config(), 1 << 20, 256, at::kFloat);
  EXPECT_GT(pieces.activations, 2 * small.activations);
}

TEST(Generator, RefusesBadInput) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear");
  const auto with = [&](std::vector<int32_t> prompt, GenerateOptions options) {
    return error_of([&] { generate(*m, schedule, prompt, options); });
  };
  EXPECT_THAT(with({}, {}), HasSubstr("prompt is empty"));
  EXPECT_THAT(with({1}, {.max_new_tokens = 0}), HasSubstr("max_new_tokens is 0"));
  EXPECT_THAT(with({1}, {.max_new_tokens = int64_t{1} << 31}), HasSubstr("max_new_tokens"));
  EXPECT_THAT(with({1}, {.prefill_piece = -1}), HasSubstr("prefill_piece is -1"));
  EXPECT_THAT(with({1}, {.vocab_size = 72}), HasSubstr("vocab_size is 72"));
  EXPECT_THAT(with({1}, {.sampling = {.temperature = -1}}), HasSubstr("temperature is -1"));
  EXPECT_THAT(with({71}, {}), HasSubstr("token id 71"));
}

TEST(Generator, RefusesDamagedWeights) {
  const auto m = make_model(small_config());
  const ModelSchedule schedule(m->config(), "linear");
  at::NoGradGuard no_grad;
  at::Tensor(m->parameter("final_norm.weight")).fill_(std::numeric_limits<float>::quiet_NaN());
  EXPECT_THAT(error_of([&] { generate(*m, schedule, prompt_of(3), {}); }), HasSubstr("damaged"));
}

TEST(RoutedCost, ShareFollowsWhatLayersReallyRun) {
  const auto share = [](std::vector<std::vector<std::string>> mixers, const std::string& schedule, const std::string& combine = "select") {
    auto c = small_config(std::move(mixers));
    c.layer.combine = combine;
    return attention_share(c, ModelSchedule(c, schedule).route(row_pieces(2, 40, {.prompt_length = 40}), 2, 40));
  };
  EXPECT_DOUBLE_EQ(share({{"gated_delta_net", "attention"}}, "linear,attention@-10:"), 0.25);
  EXPECT_DOUBLE_EQ(share({{"attention"}}, "linear"), 1);
  EXPECT_DOUBLE_EQ(share({{"gated_delta_net"}}, "linear"), 0);
  EXPECT_DOUBLE_EQ(share({{"gated_delta_net"}, {"attention"}}, "linear"), 0.5);
  EXPECT_DOUBLE_EQ(share({{"gated_delta_net", "attention"}}, "linear", "mean"), 1);
  EXPECT_DOUBLE_EQ(share({{"gated_delta_net", "attention"}}, R"({"layers": {"0": "attention", "1": "linear"}})"), 0.5);
}

TEST(RoutedCost, FlopsOfEqualLayersAreThoseOfOneRouting) {
  const auto c = small_config();
  const auto pieces = row_pieces(1, 40, {.prompt_length = 40});
  const auto flops = [&](const std::string& s) { return routed_flops(c, ModelSchedule(c, s).route(pieces, 1, 40)); };
  EXPECT_DOUBLE_EQ(flops("attention"), flops(R"({"layers": {"0": "attention", "1": "attention"}})"));
  EXPECT_DOUBLE_EQ((flops("attention") + flops("linear")) / 2, flops(R"({"layers": {"0": "attention", "1": "linear"}})"));
  EXPECT_NE(flops("attention"), flops("linear"));
}

}  // namespace
}  // namespace oryx
