// Going back, forking and resuming against reading the prompt again.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <span>

#include "oryx/bench/bench.h"
#include "oryx/bench/measure.h"
#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/generate/session.h"
#include "oryx/model/inspect.h"
#include "oryx/model/state_file.h"

namespace oryx {

namespace {

namespace fs = std::filesystem;

// A file that is gone when the benchmark ends, however it ends.
struct TemporaryFile {
  fs::path path = fs::temp_directory_path() / fmt::format("oryx-bench-state-{}.safetensors", getpid());
  ~TemporaryFile() {
    std::error_code ignored;
    fs::remove(path, ignored);
  }
};

constexpr const char* kReadAgain = "read again";

class StateBench {
 public:
  explicit StateBench(const StateBenchOptions& o) : o_(o), config_(o.model.config()), schedule_(config_, o.schedule), model_(config_, o.model.compute()) {
    model_.initialize(0);
    CounterRng rng(2);
    ids_.resize(static_cast<size_t>(*std::max_element(o.contexts.begin(), o.contexts.end()) + kDecoded));
    for (auto& id : ids_) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(config_.vocab_size)));
  }

  void measure(int64_t context, std::vector<Json>& rows) {
    std::vector<int64_t> sparsities = o_.checkpoint_every;
    std::erase_if(sparsities, [&](int64_t every) { return every == 0 || every >= context; });
    std::sort(sparsities.begin(), sparsities.end());
    sparsities.push_back(0);
    const auto start = std::chrono::steady_clock::now();
    const std::unique_ptr<Session> held = read(context, sparsities.front(), kRing);
    const Session& session = *held;
    const double once = 1e3 * std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    // The first reading of a context is the slowest; a long one is not repeated for that.
    const double again = once * static_cast<double>(o_.repeat) > kLongestMs ? once : ms(o_.repeat, [&] { (void)read(context, sparsities.front(), kRing); });
    State state = session.state().fork({0});
    const auto add = [&](const std::string& what, const Json& every, double time, int64_t scanned) {
      const StateBytes bytes = state.bytes();
      rows.push_back({{"context", context},
                      {"action", what},
                      {"checkpoint_every", every},
                      {"ms", time},
                      {"relative_time", again / time},
                      {"rerun_ms", again},
                      {"scanned", scanned},
                      {"state_bytes", bytes.recurrent + bytes.tails + bytes.tokens},
                      {"checkpoint_bytes", bytes.checkpoints},
                      {"ring_bytes", bytes.ring}});
    };
    add(kReadAgain, {}, again, context);
    add(fmt::format("drop a draft of {}", kDecoded), {}, drop_draft(state, context), 0);
    add("fork 4", {}, ms(o_.repeat, [&] { (void)state.fork({0, 0, 0, 0}); }), 0);
    {
      const TemporaryFile file;
      add("save", {}, ms(o_.repeat, [&] { save_state(model_, state, file.path); }), 0);
      add("load", {}, ms(o_.repeat, [&] { (void)load_state(model_, file.path); }), 0);
    }
    // Without a ring, whose entries at the ends of the last calls would shorten the scans.
    state = read(context, sparsities.front(), 0)->state().fork({0});
    for (const int64_t every : sparsities) {
      state.thin_checkpoints(every);
      // As far behind a checkpoint as there is: the token before one, or, without any, near the end.
      const std::vector<int64_t> held = state.checkpoints()[0];
      const int64_t length = held.empty() ? context - 33 : held.back() - 1;
      const int64_t from = held.size() > 1 ? held[held.size() - 2] : 0;
      // Where no rows are kept, not every position can be reached.
      if (state.reachable(0, length) == length) add("trim, at worst", every, trim(state, length), length - from);
    }
  }

 private:
  static constexpr int64_t kDecoded = 4, kRing = 4, kPiece = 1024;
  static constexpr double kLongestMs = 60000;

  SessionOptions options(int64_t context, int64_t every, int64_t ring) const {
    SessionOptions s;
    s.prompt_length = context;
    s.tokens = context + kDecoded;
    s.piece = every > 0 ? std::min(every, kPiece) : kPiece;
    s.state.checkpoint_every = every;
    s.state.ring = ring;
    s.state.keep_rows = o_.keep_rows;
    return s;
  }

  std::unique_ptr<Session> read(int64_t context, int64_t every, int64_t ring) const {
    auto session = std::make_unique<Session>(model_, schedule_, options(context, every, ring));
    (void)session->extend(std::span(ids_).first(static_cast<size_t>(context)));
    return session;
  }

  static double ms(int64_t repeat, const std::function<void()>& f) { return 1e3 * time_repeated(0, repeat, f).median(); }

  double drop_draft(const State& state, int64_t context) const {
    Times times;
    for (int64_t i = 0; i < o_.repeat; ++i) {
      Session session(model_, schedule_, options(context, 0, kRing), state.fork({0}));
      for (int64_t t = 0; t < kDecoded; ++t) (void)session.extend(std::span(ids_).subspan(static_cast<size_t>(context + t), 1));
      times.seconds.push_back(time_repeated(0, 1, [&] { session.trim(context); }).median());
    }
    return 1e3 * times.median();
  }

  double trim(const State& state, int64_t length) const {
    Times times;
    for (int64_t i = 0; i < o_.repeat; ++i) {
      State fork = state.fork({0});
      times.seconds.push_back(time_repeated(0, 1, [&] { fork.trim(0, length, model_); }).median());
    }
    return 1e3 * times.median();
  }

  const StateBenchOptions& o_;
  ModelConfig config_;
  ModelSchedule schedule_;
  LanguageModel model_;
  std::vector<int32_t> ids_;
};

// Milliseconds of each action against the context; and what the distance of checkpoints costs: milliseconds of the worst trim, bytes. Without any the distance
// is the whole context.
std::vector<Chart> charts(const std::vector<Json>& rows) {
  Chart time{.title = "Going back and forth against reading the context again", .x_label = "tokens of context", .y_label = "ms", .log_x = true, .log_y = true};
  Chart trim{.title = "The farther apart checkpoints are, the longer a trim takes at worst", .x_label = "tokens between checkpoints (the last of each: no checkpoint)",
             .y_label = "ms", .log_x = true, .log_y = true};
  Chart bytes{.title = "The farther apart checkpoints are, the less memory they take", .x_label = trim.x_label, .y_label = "MiB of checkpoints", .log_x = true};
  const auto add = [](Chart& chart, const std::string& name, double x, double y) {
    auto s = std::find_if(chart.series.begin(), chart.series.end(), [&](const Series& other) { return other.name == name; });
    if (s == chart.series.end()) s = chart.series.insert(s, Series{name});
    s->points.emplace_back(x, y);
    if (std::find(chart.x_ticks.begin(), chart.x_ticks.end(), x) == chart.x_ticks.end()) chart.x_ticks.push_back(x);
  };
  int64_t closest = 0;
  for (const Json& row : rows) {
    const auto context = row["context"].get<int64_t>();
    const auto ms = row["ms"].get<double>();
    const auto action = row["action"].get<std::string>();
    if (row["checkpoint_every"].is_null()) {
      add(time, action, static_cast<double>(context), ms);
      continue;
    }
    const auto every = row["checkpoint_every"].get<int64_t>();
    const auto distance = static_cast<double>(every > 0 ? every : context);
    const std::string name = fmt::format("{} tokens of context", context);
    add(trim, name, distance, ms);
    add(bytes, name, distance, row["checkpoint_bytes"].get<double>() / (1 << 20));
    // The two ends of that stand beside the other actions.
    if (closest == 0) closest = every;
    if (every == 0 || every == closest) add(time, fmt::format("{}, {}", action, every > 0 ? fmt::format("checkpoints every {}", every) : "no checkpoint"), static_cast<double>(context), ms);
  }
  for (Chart* chart : {&trim, &bytes}) std::sort(chart->x_ticks.begin(), chart->x_ticks.end());
  return {time, trim, bytes};
}

}  // namespace

BenchResult bench_state(const StateBenchOptions& o) {
  const at::NoGradGuard no_grad;
  for (const int64_t context : o.contexts) {
    if (context < 64) fail("a context of {} tokens, expected at least 64", context);
  }
  StateBench bench(o);
  BenchResult result;
  for (const int64_t context : o.contexts) bench.measure(context, result.table.rows);
  result.table.columns = {{"context", "context", cell_text()},
                          {"action", "action", cell_text()},
                          {"checkpoint_every", "checkpoints every", [](const Json& j) { return j.get<int64_t>() == 0 ? std::string("none") : j.dump(); }},
                          {"scanned", "tokens scanned", cell_text()},
                          {"ms", "ms", cell_fixed(2)},
                          {"relative_time", "read again / this", cell_fixed(1)},
                          {"state_bytes", "state", cell_bytes()},
                          {"checkpoint_bytes", "checkpoints", cell_bytes()},
                          {"ring_bytes", "ring", cell_bytes()}};
  result.charts = charts(result.table.rows);
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"schedule", o.schedule}, {"contexts", o.contexts},
                    {"checkpoint_every", o.checkpoint_every}, {"keep_rows", o.keep_rows}, {"repeat", o.repeat}};
  return result;
}

}  // namespace oryx
