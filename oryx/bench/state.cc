// Going back, forking and resuming against reading the prompt again.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <unistd.h>

#include <algorithm>
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

class StateBench {
 public:
  explicit StateBench(const StateBenchOptions& o) : o_(o), config_(o.model.config()), schedule_(config_, o.schedule), model_(config_, o.model.compute()) {
    model_.initialize(0);
    CounterRng rng(2);
    ids_.resize(static_cast<size_t>(*std::max_element(o.contexts.begin(), o.contexts.end()) + kDecoded));
    for (auto& id : ids_) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(config_.vocab_size)));
  }

  // Rows for one context and one sparsity of checkpoints.
  void measure(int64_t context, int64_t every, std::vector<Json>& rows) {
    Session session = read(context, every, kRing);
    const double again = ms(o_.repeat, [&] { (void)read(context, every, kRing); });
    const StateBytes bytes = session.state().bytes();
    const auto add = [&](const std::string& what, double time) {
      rows.push_back({{"context", context},
                      {"checkpoint_every", every},
                      {"action", what},
                      {"ms", time},
                      {"relative_time", again / time},
                      {"rerun_ms", again},
                      {"state_bytes", bytes.recurrent + bytes.tails + bytes.tokens},
                      {"checkpoint_bytes", bytes.checkpoints},
                      {"ring_bytes", bytes.ring}});
    };
    add("read again", again);
    add("read, no ring", ms(o_.repeat, [&] { (void)read(context, every, 0); }));
    add(fmt::format("drop a draft of {}", kDecoded), back(session, context, kDecoded));
    // Where no rows are kept, not every position can be reached.
    const auto trim = [&](const std::string& what, int64_t length) {
      if (session.state().reachable(0, length) == length) add(what, back(session, length, 0));
    };
    trim("trim by 32", context - 32);
    trim("trim by a quarter", context - context / 4 - 1);
    add("fork 4", ms(o_.repeat, [&] { (void)session.state().fork({0, 0, 0, 0}); }));
    const TemporaryFile file;
    add("save", ms(o_.repeat, [&] { save_state(model_, session.state(), file.path); }));
    add("load", ms(o_.repeat, [&] { (void)load_state(model_, file.path); }));
  }

 private:
  static constexpr int64_t kDecoded = 4, kRing = 4, kPiece = 1024;

  SessionOptions options(int64_t context, int64_t every, int64_t ring) const {
    SessionOptions s;
    s.prompt_length = context;
    s.tokens = context + kDecoded;
    s.piece = kPiece;
    s.state.checkpoint_every = every;
    s.state.ring = ring;
    s.state.keep_rows = o_.keep_rows;
    return s;
  }

  Session read(int64_t context, int64_t every, int64_t ring) const {
    Session session(model_, schedule_, options(context, every, ring));
    (void)session.extend(std::span(ids_).first(static_cast<size_t>(context)));
    return session;
  }

  static double ms(int64_t repeat, const std::function<void()>& f) { return 1e3 * time_repeated(0, repeat, f).median(); }

  // Median time of a trim to `length` after `decoded` tokens more; the session holds its context again afterwards.
  double back(Session& session, int64_t length, int64_t decoded) const {
    const int64_t context = session.length();
    const auto extend = [&](int64_t count) { (void)session.extend(std::span(ids_).subspan(static_cast<size_t>(session.length()), static_cast<size_t>(count))); };
    Times times;
    for (int64_t i = 0; i < o_.repeat; ++i) {
      for (int64_t t = 0; t < decoded; ++t) extend(1);
      times.seconds.push_back(time_repeated(0, 1, [&] { session.trim(length); }).median());
      if (length < context) extend(context - length);
    }
    return 1e3 * times.median();
  }

  const StateBenchOptions& o_;
  ModelConfig config_;
  ModelSchedule schedule_;
  LanguageModel model_;
  std::vector<int32_t> ids_;
};

}  // namespace

BenchResult bench_state(const StateBenchOptions& o) {
  const at::NoGradGuard no_grad;
  for (const int64_t context : o.contexts) {
    if (context < 64) fail("a context of {} tokens, expected at least 64", context);
  }
  StateBench bench(o);
  BenchResult result;
  for (const int64_t context : o.contexts) {
    for (const int64_t every : o.checkpoint_every) bench.measure(context, every, result.table.rows);
  }
  result.table.columns = {{"context", "context", cell_text()},
                          {"checkpoint_every", "checkpoints every", cell_text()},
                          {"action", "action", cell_text()},
                          {"ms", "ms", cell_fixed(2)},
                          {"relative_time", "read again / this", cell_fixed(1)},
                          {"state_bytes", "state", cell_bytes()},
                          {"checkpoint_bytes", "checkpoints", cell_bytes()},
                          {"ring_bytes", "ring", cell_bytes()}};
  result.options = {{"preset", o.model.preset}, {"dtype", o.model.precision}, {"schedule", o.schedule}, {"contexts", o.contexts},
                    {"checkpoint_every", o.checkpoint_every}, {"keep_rows", o.keep_rows}, {"repeat", o.repeat}};
  return result;
}

}  // namespace oryx
