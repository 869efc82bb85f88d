// One set of weights, three ways through it. Builds a tiny model with random weights, reads a prompt in linear mode
// with its last tokens in attention, goes on token by token with a State, and prints what each way costs.
//
//     build/cpu/examples/mixed_modes
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include "oryx/common/error.h"
#include "oryx/common/progress.h"
#include "oryx/model/inspect.h"
#include "oryx/model/language_model.h"
#include "oryx/model/routed_cost.h"
#include "oryx/model/scheduling.h"

namespace {

constexpr int64_t kPrompt = 256, kNew = 16;

// Tokens [start, start + count) of one sequence whose prompt is kPrompt tokens long.
oryx::ModelInput piece_of(const oryx::ModelSchedule& schedule, const at::Tensor& ids, int64_t start,
                          oryx::State& state) {
  const int64_t count = ids.size(1);
  oryx::ModePiece piece{.row = 0, .column = 0, .length = count, .start = start, .context = {}};
  piece.context.prompt_length = kPrompt;
  oryx::ModelInput input;
  input.input_ids = ids;  // [1, count]
  input.routing = schedule.route({piece}, 1, count);
  input.state = &state;
  return input;
}

void run(const oryx::LanguageModel& model, const std::string& text) {
  const oryx::ModelSchedule schedule(model.config(), text);
  oryx::State state = model.make_state(1);
  const at::Tensor prompt = at::arange(kPrompt).remainder(model.config().vocab_size).view({1, kPrompt});

  auto input = piece_of(schedule, prompt, 0, state);
  const double share = oryx::attention_share(model.config(), input.routing);
  const double flops = oryx::routed_flops(model.config(), input.routing);
  at::Tensor hidden = model.hidden(input);  // [1, kPrompt, D]

  std::vector<int64_t> ids;
  for (int64_t i = 0; i < kNew; ++i) {
    const at::Tensor next = model.logits(hidden.select(1, -1)).argmax(-1);  // [1]
    ids.push_back(next.item<int64_t>());
    hidden = model.hidden(piece_of(schedule, next.view({1, 1}), kPrompt + i, state));
  }
  const auto bytes = [](int64_t n) { return oryx::human_bytes(static_cast<double>(n)); };
  const oryx::StateBytes held = state.bytes();
  fmt::print("{}\n", text);
  fmt::print("  prompt: {:.1f}% of the tokens in attention, {} FLOPs\n", 100 * share, oryx::human_count(flops));
  fmt::print("  state after {} tokens: recurrent {}, convolution tails {}, keys and values {}\n", state.lengths()[0],
             bytes(held.recurrent), bytes(held.tails), bytes(held.tokens));
  fmt::print("  continuation: {}\n", fmt::join(ids, " "));
}

}  // namespace

int main() try {
  const at::NoGradGuard no_grad;
  oryx::LanguageModel model(oryx::preset("tiny"));
  model.initialize(0);
  for (const char* schedule : {"linear", "linear,attention@-16:", "attention"}) run(model, schedule);
  return 0;
} catch (const oryx::Error& e) {
  fmt::print(stderr, "mixed_modes: error: {}\n", e.what());
  return 1;
}
