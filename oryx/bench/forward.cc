#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <span>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/common/random.h"
#include "oryx/generate/session.h"
#include "oryx/model/inspect.h"

namespace oryx {

namespace {

std::vector<int32_t> random_tokens(int64_t count, int64_t vocabulary) {
  CounterRng rng(2);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (auto& id : ids) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocabulary)));
  return ids;
}

SessionOptions session_options(int64_t prompt, int64_t tokens, int64_t piece) {
  SessionOptions s;
  s.prompt_length = prompt;
  s.tokens = tokens;
  s.piece = piece;
  return s;
}

void whole_pass(const LanguageModel& model, const ModelSchedule& schedule, const std::vector<int32_t>& ids) {
  at::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(ids.size());
  ModelInput in;
  in.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).view({1, count});
  ModeContext context;
  context.prompt_length = count;
  in.routing = schedule.route(row_pieces(1, count, context), 1, count);
  (void)model.hidden(in);
}

// Bytes of state that were held at the end.
int64_t pass_in_pieces(const LanguageModel& model, const ModelSchedule& schedule, const std::vector<int32_t>& ids, int64_t piece) {
  const auto count = static_cast<int64_t>(ids.size());
  Session session(model, schedule, session_options(count, count, piece));
  (void)session.extend(ids);
  return session.state().bytes().total();
}

// Found out before the model is made. Passes in pieces have a session, which checks its own.
void check_memory(const ModelConfig& config, const ForwardBenchOptions& o) {
  if (o.piece > 0) return;
  const int64_t longest = *std::max_element(o.lengths.begin(), o.lengths.end());
  const auto needed = static_cast<double>(plan_memory(config, longest, longest, o.model.compute()).activations), free = static_cast<double>(available_memory());
  if (needed <= free) return;
  fail("a pass over {} tokens needs about {}, but only {} of memory are free; use shorter --lengths, or --piece", longest, human_bytes(needed), human_bytes(free));
}

}  // namespace

BenchResult bench_forward(const ForwardBenchOptions& o) {
  const ModelConfig config = o.model.config();
  const ModelSchedule schedule(config, o.schedule);
  check_memory(config, o);
  LanguageModel model(config, o.model.compute());
  model.initialize(0);
  // Thread pools and the matrix library's scratch space come with the first pass and belong to no length.
  whole_pass(model, schedule, random_tokens(o.lengths.front(), config.vocab_size));
  BenchResult result;
  auto& rows = result.table.rows;
  for (const int64_t length : o.lengths) {
    const std::vector<int32_t> ids = random_tokens(length, config.vocab_size);
    int64_t state = 0;
    if (!reset_peak_memory()) log::warn_once("the peak of memory cannot be reset here: it is that of the whole run");
    const int64_t before = resident_memory();
    const Times times = time_repeated(0, o.repeat, [&] {
      if (o.piece == 0) return whole_pass(model, schedule, ids);
      state = pass_in_pieces(model, schedule, ids, o.piece);
    });
    const int64_t memory = peak_memory() - before;
    const auto tokens = static_cast<double>(length);
    Json row = {{"tokens", length}, {"ms", 1e3 * times.median()}, {"ms_per_token", 1e3 * times.median() / tokens}, {"memory_bytes", memory}};
    row["bytes_per_token"] = static_cast<double>(memory) / tokens;
    row["state_bytes"] = state;
    const Json& first = rows.empty() ? row : rows.front();
    row["relative_time"] = row["ms_per_token"].get<double>() / first["ms_per_token"].get<double>();
    row["relative_memory"] = row["bytes_per_token"].get<double>() / first["bytes_per_token"].get<double>();
    rows.push_back(row);
  }
  result.table.columns = {{"tokens", "tokens", cell_text()},
                          {"ms", "ms", cell_fixed(1)},
                          {"ms_per_token", "ms/token", cell_fixed(4)},
                          {"relative_time", "relative", cell_fixed(3)},
                          {"memory_bytes", "memory", cell_bytes()},
                          {"bytes_per_token", "bytes/token", cell_fixed(0)},
                          {"relative_memory", "relative", cell_fixed(3)}};
  if (o.piece > 0) result.table.columns.push_back({"state_bytes", "of it state", cell_bytes()});
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"schedule", o.schedule}, {"lengths", o.lengths}, {"piece", o.piece}, {"repeat", o.repeat}};
  return result;
}

}  // namespace oryx
