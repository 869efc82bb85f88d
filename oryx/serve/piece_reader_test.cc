// Padded pieces give what pieces give: hidden states, and a state from which the text goes on.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "oryx/serve/piece_reader.h"
#include "oryx/serve/test_support.h"

namespace oryx::test {
namespace {

using serve::PieceReader;

LanguageModel small_model(const std::string& name) {
  LanguageModel model(preset(name));
  model.initialize(3);
  return model;
}

Routings routed(const LanguageModel& model, const std::string& schedule, int64_t count, int64_t start = 0) {
  ModePiece piece{.row = 0, .column = 0, .length = count, .start = start, .context = {}};
  piece.context.prompt_length = start + count;
  return ModelSchedule(model.config(), schedule).route({piece}, 1, count);
}

at::Tensor by_the_model(const LanguageModel& model, State& state, std::span<const int32_t> ids, const std::string& schedule) {
  const auto n = static_cast<int64_t>(ids.size());
  ModelInput input;
  input.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).view({1, n});
  input.routing = routed(model, schedule, n, state.lengths()[0]);
  input.state = &state;
  return model.hidden(input).squeeze(0);
}

void expect_close(const at::Tensor& a, const at::Tensor& b, const std::string& what) {
  ASSERT_EQ(a.sizes(), b.sizes()) << what;
  EXPECT_TRUE(at::allclose(a.to(at::kFloat), b.to(at::kFloat), 1e-4, 1e-4)) << what << ": " << (a.to(at::kFloat) - b.to(at::kFloat)).abs().max();
}

// Both have read the same: what is left behind is the same, by all that a file of the state holds.
void expect_close_states(const State& a, const State& b, const std::string& what) {
  EXPECT_EQ(a.lengths(), b.lengths());
  const auto left = a.tensors(), right = b.tensors();
  ASSERT_EQ(left.size(), right.size());
  for (size_t i = 0; i < left.size(); ++i) {
    ASSERT_EQ(left[i].first, right[i].first);
    expect_close(left[i].second, right[i].second, what + left[i].first);
  }
}

TEST(PieceReader, IsThePassOfThePiece) {
  const at::NoGradGuard no_grad;
  const std::pair<std::string, std::string> kinds[] = {{"tiny", "keep"}, {"tiny", "drop"}, {"tiny", "bounded:4+50"}, {"tiny-oryx-mamba2", "keep"}, {"tiny-oryx-kda", "keep"}, {"tiny-mamba2", "keep"}};
  for (const auto& [name, kv] : kinds) {
    const LanguageModel model = small_model(name);
    StateOptions options;
    set_kv(options, kv);
    PieceReader reader(model, options, 100, {});
    EXPECT_EQ(reader.sizes(), (std::vector<int64_t>{64, 100}));
    State padded = model.make_state(1, options), plain = model.make_state(1, options);
    CounterRng rng(5);
    for (const size_t n : {100, 3, 64, 1, 65}) {
      const auto ids = random_prompt(rng, model.config().vocab_size, n);
      ASSERT_TRUE(reader.takes(routed(model, "linear", static_cast<int64_t>(n)), static_cast<int64_t>(n)));
      expect_close(reader.read(padded, ids), by_the_model(model, plain, ids, "linear"), fmt::format("{} {}, {} tokens", name, kv, n));
    }
    expect_close_states(padded, plain, name + " " + kv + ": ");
  }
}

// Captured, it gives to the last bit what the same pass gives launch by launch.
TEST(PieceReaderCuda, ACaptureIsItsPass) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  const at::NoGradGuard no_grad;
  for (const std::string name : {"130m", "130m-oryx-mamba2", "130m-oryx-kda"}) {
    ModelConfig config = preset(name);
    config.vocab_size = 320, config.num_layers = 3;
    LanguageModel model(config, at::kBFloat16);
    model.initialize(3);
    model.to(at::kCUDA);
    model.keep_copies();
    std::string why;
    const auto captured = serve::make_piece_reader(model, {}, 300, &why);
    ASSERT_NE(captured, nullptr) << why;
    PieceReader anew(model, {}, 300, {});
    State a = model.make_state(1), b = model.make_state(1), plain = model.make_state(1);
    CounterRng rng(5);
    for (const size_t n : {300, 3, 64, 1, 299, 130, 64}) {
      const auto ids = random_prompt(rng, 320, n);
      const at::Tensor got = captured->read(a, ids), same = anew.read(b, ids), near = by_the_model(model, plain, ids, "linear");
      EXPECT_TRUE(at::equal(got, same)) << name << ", " << n << " tokens";
      const double off = ((got - near).to(at::kFloat).norm() / near.to(at::kFloat).norm()).item<double>();
      EXPECT_LT(off, 0.02) << name << ", " << n << " tokens";
    }
    const auto left = a.tensors(), right = b.tensors();
    for (size_t i = 0; i < left.size(); ++i) EXPECT_TRUE(at::equal(left[i].second, right[i].second)) << name << ": " << left[i].first;
  }
}

TEST(PieceReader, LeavesOtherModesToTheModel) {
  const LanguageModel model = small_model("tiny");
  const PieceReader reader(model, {}, 128, {});
  EXPECT_TRUE(reader.takes(routed(model, "linear,attention@gen", 100), 100));
  EXPECT_FALSE(reader.takes(routed(model, "attention", 100), 100));
  EXPECT_FALSE(reader.takes(routed(model, "linear,attention@-10:", 100), 100));
  EXPECT_FALSE(reader.takes(routed(model, "linear", 129), 129));
}

TEST(PieceReader, AttentionReadsWhatItKept) {
  const at::NoGradGuard no_grad;
  const LanguageModel model = small_model("tiny");
  PieceReader reader(model, {}, 64, {});
  State padded = model.make_state(1), plain = model.make_state(1);
  CounterRng rng(6);
  const auto ids = random_prompt(rng, model.config().vocab_size, 50), more = random_prompt(rng, model.config().vocab_size, 20);
  reader.read(padded, ids);
  by_the_model(model, plain, ids, "linear");
  expect_close(by_the_model(model, padded, more, "attention"), by_the_model(model, plain, more, "attention"), "in attention");
}

}  // namespace
}  // namespace oryx::test
