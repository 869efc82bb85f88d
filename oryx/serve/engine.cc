#include "oryx/serve/engine.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <limits>
#include <set>

#include "oryx/common/file.h"
#include "oryx/common/progress.h"
#include "oryx/model/inspect.h"
#include "oryx/model/routed_cost.h"
#include "oryx/ops/few_rows/few_rows.h"
#include "oryx/serve/prefix_tree.h"

namespace oryx::serve {

namespace {

using Clock = std::chrono::steady_clock;

// Keys and values of all sequences that look back in one pass are brought side by side, padded to the longest: at most so many rows, unless one has more by itself.
constexpr int64_t kRowsSideBySide = 1 << 16;

double seconds_between(Clock::time_point a, Clock::time_point b) { return std::chrono::duration<double>(b - a).count(); }
std::string in_bytes(int64_t n) { return human_bytes(static_cast<double>(n)); }

// Whether a token of this batch reads keys and values of others. By its spans alone: there may be very many tokens.
bool looks_back(const LanguageModel& model, const Routings& routings) {
  for (int64_t i = 0; i < model.config().num_layers; ++i) {
    const MultiMixerLayer& layer = model.layer(i);
    const auto& names = layer.mixer_names();
    const bool all = layer.config().combine == "mean";
    for (size_t m = 0; m < names.size() && all; ++m) {
      if (layer.mixer(m).keeps_tokens()) return true;
    }
    const Routing& routing = *routings[routings.size() == 1 ? 0 : static_cast<size_t>(i)];
    for (const RoutedSpan& s : routing.spans()) {
      const auto at = static_cast<size_t>(std::find(names.begin(), names.end(), routing.mixers()[static_cast<size_t>(s.mixer)]) - names.begin());
      if (layer.mixer(at == names.size() ? 0 : at).keeps_tokens()) return true;
    }
  }
  return false;
}

// Tokens and modes of a chunk of a prompt, exactly.
std::string chunk_key(std::span<const int32_t> ids, const Routings& routings) {
  std::string key(reinterpret_cast<const char*>(ids.data()), ids.size_bytes());
  const Routing* last = nullptr;
  for (const auto& routing : routings) {
    key += '|';
    if (routing.get() == last) continue;
    last = routing.get();
    for (const RoutedSpan& s : routing->spans()) key += fmt::format("{}-{}:{};", s.begin, s.end, routing->mixers()[static_cast<size_t>(s.mixer)]);
  }
  return key;
}

}  // namespace

std::string to_string(Outcome outcome) {
  switch (outcome) {
    case Outcome::kEos: return "eos";
    case Outcome::kLength: return "length";
    case Outcome::kStopped: return "stopped";
    case Outcome::kCancelled: return "cancelled";
    case Outcome::kFailed: return "failed";
  }
  TORCH_CHECK(false, "Outcome");
}

void EngineOptions::validate() const {
  if (max_running < 1) fail("max_running is {}, expected an integer of at least 1", max_running);
  if (max_queue < 0) fail("max_queue is {}, expected an integer of at least 0", max_queue);
  if (piece < 1) fail("piece is {}, expected an integer of at least 1", piece);
  if (keep_every < 0 || keep_every % piece != 0) fail("keep_every is {}, expected 0 or a multiple of piece, {}", keep_every, piece);
  if (state_budget < 0) fail("state_budget is {}, expected an integer of at least 0", state_budget);
  if (state.kept.on()) fail("keys and values '{}' are not served: rows kept by choice stand in no batch; expected keep, drop or bounded:F+W", kv_text(state));
  state.validate();
}

struct Engine::Run {
  int64_t id;
  Request request;
  Clock::time_point arrived, started, last_token;
  std::optional<State> state;  // while the prompt is read; then in a batch
  PrefixTree::Keys keys;       // of the prompt's chunks
  int64_t length = 0;          // tokens that the state holds
  int64_t read = 0;            // tokens of the prompt that ran through the model for it
  int32_t next = -1;           // sampled, not yet run
  double attention_tokens = 0;
  bool over = false;
  Ended ended;

  int64_t prompt() const { return static_cast<int64_t>(request.prompt.size()); }
  int64_t total() const { return prompt() + request.max_tokens; }
  ModePiece piece(int64_t row, int64_t begin, int64_t count) const {
    ModePiece p{.row = row, .column = 0, .length = count, .start = begin, .context = {}};
    p.context.prompt_length = prompt();
    p.context.seed = static_cast<uint64_t>(request.sampling.seed);
    return p;
  }
  Routings route(int64_t begin, int64_t count) const { return request.schedule->route({piece(0, begin, count)}, 1, count); }
};

// Texts that are written side by side.
struct Engine::Batch {
  std::vector<Run*> runs;
  State state;  // its sequence j is that of runs[j]
};

struct Engine::Impl {
  const LanguageModel& model;
  const EngineOptions& options;
  // The empty state that all others are forked from: one budget counts them.
  State root;
  int64_t fixed = 0, page_bytes = 0;
  PrefixTree prefixes;

  // Of the thread that runs the model.
  std::vector<std::unique_ptr<Run>> running;  // in the order of admission
  std::deque<Run*> reading;                   // the first one's turn is next
  std::vector<Batch> batches;

  // Of all threads.
  mutable std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::unique_ptr<Run>> queue;
  std::set<int64_t> cancelled;
  bool closed = false;
  int64_t next_id = 1;
  EngineStats stats;

  Impl(const LanguageModel& m, const EngineOptions& o) : model(m), options(o), root(m.make_state(1, o.state)) {
    const StateBytes none = state_bytes(model.config(), 0, model.compute_dtype(), options.state);
    fixed = none.recurrent + none.tails;
    page_bytes = root.row_pool().page_bytes;
    stats.budget_bytes = options.state.budget;
  }

  // ---- bytes

  int64_t pages(int64_t tokens) const { return (tokens + options.state.page_tokens - 1) / options.state.page_tokens; }
  bool bounded() const { return root.row_bound().on(); }
  int64_t region_bytes(int64_t tokens) const { return page_bytes * std::min(RowStore::region_pages(root.row_bound(), options.state.page_tokens), pages(tokens)); }
  // Of a request of `tokens` tokens that begins at a kept prefix of `reused`. Under a bound a region may be replaced: both stand for a moment.
  int64_t need(int64_t tokens, int64_t reused) const {
    if (bounded()) return fixed + 2 * region_bytes(tokens);
    return fixed + page_bytes * (pages(tokens) - reused / options.state.page_tokens);
  }
  int64_t left() const { return options.state.budget - root.budget().used(); }
  // Drops kept prefixes, the least recently used first, until so many bytes are free.
  bool make_room(int64_t bytes, const PrefixTree::Node* spared = nullptr) {
    while (left() < bytes) {
      if (!prefixes.drop_one(spared)) return false;
    }
    return true;
  }

  // ---- admission

  void check(const Request& r) const {
    if (r.prompt.empty()) fail("the prompt is empty; there is nothing to go on from");
    for (const int32_t id : r.prompt) {
      if (id < 0 || id >= model.config().vocab_size) fail("token id {} is outside of the model's vocabulary of {}", id, model.config().vocab_size);
    }
    if (r.max_tokens < 1) fail("max_tokens is {}, expected an integer of at least 1", r.max_tokens);
    const auto prompt = static_cast<int64_t>(r.prompt.size());
    if (r.max_tokens > std::numeric_limits<int32_t>::max() - prompt) fail("max_tokens is {}, expected at most {} after this prompt", r.max_tokens, std::numeric_limits<int32_t>::max() - prompt);
    if (r.vocab_size < 0 || r.vocab_size > model.config().vocab_size) fail("vocab_size is {}, expected 0 to {}", r.vocab_size, model.config().vocab_size);
    r.sampling.validate();
    TORCH_CHECK(r.schedule != nullptr, "serve: a request without a schedule");
    if (!r.schedule->needs().empty()) fail("the schedule '{}' wants to know the whole prompt before it runs, which serving does not read twice; expected a schedule of places", r.schedule->text());
    const int64_t tokens = prompt + r.max_tokens, bytes = need(tokens, 0), most = options.state.budget - fixed;
    if (bytes > most) {
      fail("{} tokens of prompt and {} of text need {} of state, but the whole budget is {}; shorten the prompt or max_tokens, or raise --state-budget", prompt, r.max_tokens,
           in_bytes(bytes), in_bytes(most));
    }
    if (options.state.drop_rows && tokens > std::min(options.piece, prompt)) {
      ModePiece later{.row = 0, .column = 0, .length = tokens - std::min(options.piece, prompt), .start = std::min(options.piece, prompt), .context = {}};
      later.context.prompt_length = prompt;
      later.context.seed = static_cast<uint64_t>(r.sampling.seed);
      if (looks_back(model, r.schedule->route({later}, 1, later.length))) {
        fail("the schedule '{}' looks back at tokens whose keys and values this server drops (--kv drop); expected linear modes behind the first {} tokens", r.schedule->text(), options.piece);
      }
    }
  }

  // A state for the run, with room for all its tokens: forked from the longest kept prefix, or fresh. False when the budget does not allow it now.
  bool find_room(Run& run) {
    const int64_t total = run.total();
    // The last token of the prompt runs in any case: its logits are wanted.
    PrefixTree::Node* node = run.keys.empty() ? nullptr : prefixes.find(run.keys);
    int64_t reused = node != nullptr ? node->chunks * options.keep_every : 0;
    if (node != nullptr && make_room(need(total, reused), node)) {
      run.state = node->state->fork({0});
    } else if (node != nullptr && make_room(need(total, reused) - fixed, node)) {
      run.state = prefixes.take(node);  // it and its fork would be one too many
    } else if (make_room(need(total, 0))) {
      run.state = root.fork({0});
      reused = 0;
    } else {
      return false;
    }
    run.length = reused;
    // What later forks share stands in memory of its own, so that they do not hold the rest.
    for (size_t i = static_cast<size_t>(reused / std::max<int64_t>(1, options.keep_every)); i < run.keys.size() && !bounded(); ++i) {
      run.state->reserve_behind(static_cast<int64_t>(i + 1) * options.keep_every);
    }
    run.state->reserve_behind(total);
    return true;
  }

  void admit() {
    while (static_cast<int64_t>(running.size()) < options.max_running) {
      std::unique_ptr<Run> run;
      {
        const std::lock_guard lock(mutex);
        if (queue.empty()) return;
        run = std::move(queue.front());
        queue.pop_front();
      }
      if (!find_room(*run)) {
        const std::lock_guard lock(mutex);
        queue.push_front(std::move(run));
        return;
      }
      run->started = Clock::now();
      run->ended.queue_seconds = seconds_between(run->arrived, run->started);
      {
        const std::lock_guard lock(mutex);
        stats.queue_time.add(run->ended.queue_seconds);
        ++stats.running;
      }
      reading.push_back(run.get());
      running.push_back(std::move(run));
    }
  }

  // ---- the end of a request

  void end(Run& run, Outcome outcome, std::string error = {}) {
    if (run.over) return;
    run.over = true;
    run.state.reset();
    const auto ran = static_cast<double>(run.read + std::max<int64_t>(0, run.length - run.prompt()));
    run.ended.outcome = outcome;
    run.ended.error = std::move(error);
    run.ended.prompt_tokens = run.prompt();
    run.ended.attention_share = ran > 0 ? run.attention_tokens / ran : 0;
    run.ended.total_seconds = seconds_between(run.arrived, Clock::now());
    {
      const std::lock_guard lock(mutex);
      ++(outcome == Outcome::kCancelled ? stats.cancelled : outcome == Outcome::kFailed ? stats.failed : stats.finished);
    }
    if (run.request.on_end) run.request.on_end(run.ended);
  }

  void take_cancellations() {
    std::vector<std::unique_ptr<Run>> waiting;
    std::set<int64_t> ids;
    {
      const std::lock_guard lock(mutex);
      ids.swap(cancelled);
      for (auto& run : queue) {
        if (ids.count(run->id) > 0) waiting.push_back(std::move(run));
      }
      std::erase(queue, nullptr);
    }
    for (auto& run : waiting) end(*run, Outcome::kCancelled);
    for (auto& run : running) {
      if (ids.count(run->id) > 0) end(*run, Outcome::kCancelled);
    }
  }

  // ---- reading

  void count(Run& run, const Routings& routings, int64_t tokens) { run.attention_tokens += oryx::attention_share(model.config(), routings) * static_cast<double>(tokens); }

  // A prompt that began alike may have come further meanwhile: prompts of a kind that arrive together are read once.
  void jump(Run& run) {
    const PrefixTree::Node* node = run.keys.empty() ? nullptr : prefixes.find(run.keys);
    if (node == nullptr || node->chunks * options.keep_every <= run.length) return;
    run.state.reset();  // its bytes are enough for what takes its place
    TORCH_CHECK(find_room(run), "serve: no room for a state in place of a larger one");
  }

  void read_piece() {
    std::erase_if(reading, [](const Run* run) { return run->over; });
    if (reading.empty()) return;
    Run& run = *reading.front();
    reading.pop_front();
    try {
      jump(run);
      const int64_t begin = run.length, n = std::min(options.piece, run.prompt() - begin);
      if (bounded()) make_room(region_bytes(run.total()));
      ModelInput input;
      const auto first = run.request.prompt.begin() + begin;
      input.input_ids = at::tensor(std::vector<int64_t>(first, first + n), at::kLong).view({1, n});
      input.routing = run.route(begin, n);
      input.state = &*run.state;
      const at::Tensor last = model.hidden(input).squeeze(0).narrow(0, n - 1, 1);  // [1, D]
      run.length += n;
      run.read += n;
      count(run, input.routing, n);
      {
        const std::lock_guard lock(mutex);
        ++stats.passes;
        stats.tokens_read += n;
      }
      keep_prefix(run);
      if (run.length < run.prompt()) return reading.push_back(&run);
      run.ended.reused_tokens = run.prompt() - run.read;
      {
        const std::lock_guard lock(mutex);
        ++(run.ended.reused_tokens > 0 ? stats.prefix_hits : stats.prefix_misses);
        stats.tokens_reused += run.ended.reused_tokens;
      }
      take_token(run, model.logits(last.clone()).squeeze(0).cpu());
    } catch (const std::exception& e) {
      end(run, Outcome::kFailed, e.what());
    }
  }

  void keep_prefix(Run& run) {
    if (options.keep_every == 0 || run.length % options.keep_every != 0) return;
    const auto chunks = static_cast<size_t>(run.length / options.keep_every);
    if (chunks > run.keys.size() || prefixes.holds(run.keys, chunks)) return;
    // A last, partly filled page is copied.
    const int64_t bytes = fixed + (run.length % options.state.page_tokens > 0 ? page_bytes : 0);
    if (!make_room(bytes)) return;
    prefixes.keep(run.keys, chunks, run.state->fork({0}));
  }

  // ---- writing

  // Draws the next token from logits [V] on the CPU, and says whether the request goes on.
  void take_token(Run& run, const at::Tensor& all) {
    const Request& r = run.request;
    const auto next = static_cast<int32_t>(sample_token(r.vocab_size > 0 ? all.narrow(0, 0, r.vocab_size) : all, r.sampling, static_cast<uint64_t>(run.length)));
    const auto now = Clock::now();
    {
      const std::lock_guard lock(mutex);
      ++stats.tokens_written;
      if (run.ended.new_tokens == 0) {
        stats.first_token.add(run.ended.first_token_seconds = seconds_between(run.arrived, now));
      } else {
        stats.between_tokens.add(seconds_between(run.last_token, now));
      }
    }
    run.last_token = now;
    ++run.ended.new_tokens;
    run.next = next;
    if (next == r.eos_id) return end(run, Outcome::kEos);
    if (r.on_token && !r.on_token(next)) return end(run, Outcome::kStopped);
    if (run.ended.new_tokens == r.max_tokens) end(run, Outcome::kLength);
  }

  // Which requests are written side by side: those that look back apart from those that do not, in the order of their admission.
  std::vector<std::vector<Run*>> grouped() const {
    const int64_t most = model.device().is_cpu() && model.compute_dtype() == at::kFloat ? ops::kFewRows : options.max_running;
    std::vector<std::vector<Run*>> groups;
    for (const bool back : {false, true}) {
      int64_t longest = 0;
      bool open = false;
      for (const auto& run : running) {
        if (run->over || run->next < 0 || looks_back(model, run->route(run->length, 1)) != back) continue;
        longest = std::max(longest, run->length);
        open = open && static_cast<int64_t>(groups.back().size()) < most;
        open = open && (!back || longest * static_cast<int64_t>(groups.back().size() + 1) <= kRowsSideBySide);
        if (!open) {
          groups.emplace_back();
          longest = run->length;
          open = true;
        }
        groups.back().push_back(run.get());
      }
    }
    return groups;
  }

  void form_batches() {
    const auto groups = grouped();
    bool same = groups.size() == batches.size();
    for (size_t i = 0; i < groups.size() && same; ++i) same = groups[i] == batches[i].runs;
    if (same) return;
    std::vector<State> sources;
    std::map<const Run*, State::SequencePlace> places;
    for (Batch& batch : batches) {
      for (size_t j = 0; j < batch.runs.size(); ++j) places[batch.runs[j]] = {sources.size(), static_cast<int64_t>(j)};
      sources.push_back(std::move(batch.state));
    }
    batches.clear();
    for (const auto& run : running) {
      if (run->over || run->next < 0 || !run->state) continue;
      places[run.get()] = {sources.size(), 0};
      sources.push_back(std::move(*run->state));
      run->state.reset();
    }
    std::vector<std::vector<State::SequencePlace>> targets;
    for (const auto& group : groups) {
      targets.emplace_back();
      for (const Run* run : group) targets.back().push_back(places.at(run));
    }
    auto states = State::regroup(std::move(sources), targets);
    for (size_t i = 0; i < groups.size(); ++i) batches.push_back({groups[i], std::move(states[i])});
  }

  void write_one(Batch& batch) {
    const auto N = static_cast<int64_t>(batch.runs.size());
    ModelInput input;
    std::vector<int64_t> ids;
    int64_t regions = 0;
    for (const Run* run : batch.runs) {
      ids.push_back(run->next);
      if (bounded()) regions += region_bytes(run->total());
    }
    if (regions > 0) make_room(regions);
    input.input_ids = at::tensor(ids, at::kLong).view({N, 1});
    input.routing = route_rows(batch.runs);
    input.state = &batch.state;
    const at::Tensor logits = model.logits(model.hidden(input).squeeze(1)).cpu();  // [N, V]
    {
      const std::lock_guard lock(mutex);
      ++stats.passes;
      ++stats.decode_passes;
      stats.decode_rows += N;
    }
    for (int64_t j = 0; j < N; ++j) {
      Run& run = *batch.runs[static_cast<size_t>(j)];
      count(run, run.route(run.length, 1), 1);
      ++run.length;
      try {
        take_token(run, logits[j]);
      } catch (const std::exception& e) {
        end(run, Outcome::kFailed, e.what());
      }
    }
  }

  // Each row by its own schedule.
  Routings route_rows(const std::vector<Run*>& runs) const {
    std::vector<Routings> all;
    size_t layers = 1;
    for (const Run* run : runs) {
      all.push_back(run->route(run->length, 1));
      layers = std::max(layers, all.back().size());
    }
    Routings out;
    for (size_t i = 0; i < layers; ++i) {
      // The union of the mixers' names that these rows know, in which each row has its place.
      std::vector<std::string> mixers;
      std::vector<RoutedSpan> spans;
      for (size_t n = 0; n < all.size(); ++n) {
        const Routing& one = *all[n][all[n].size() == 1 ? 0 : i];
        const std::string& name = one.mixers()[static_cast<size_t>(one.spans().at(0).mixer)];
        const auto at = static_cast<size_t>(std::find(mixers.begin(), mixers.end(), name) - mixers.begin());
        if (at == mixers.size()) mixers.push_back(name);
        spans.push_back({static_cast<int32_t>(n), 0, 1, static_cast<int32_t>(at)});
      }
      out.push_back(std::make_shared<Routing>(static_cast<int64_t>(runs.size()), 1, std::move(mixers), std::move(spans)));
    }
    return out;
  }

  void write_tokens() {
    form_batches();
    for (Batch& batch : batches) {
      try {
        write_one(batch);
      } catch (const std::exception& e) {
        for (Run* run : batch.runs) end(*run, Outcome::kFailed, e.what());
      }
    }
  }

  // What has ended leaves, and with it its bytes.
  void leave() {
    form_batches();
    std::erase_if(reading, [](const Run* run) { return run->over; });
    std::erase_if(running, [](const auto& run) { return run->over; });
    const std::lock_guard lock(mutex);
    stats.running = static_cast<int64_t>(running.size());
    stats.prefixes = prefixes.states();
    stats.prefix_bytes = prefixes.states() * fixed;
    stats.recurrent_bytes = stats.running * fixed;
    stats.row_bytes = root.budget().used() - fixed - stats.prefix_bytes - stats.recurrent_bytes;
  }
};

Engine::Engine(const LanguageModel& model, const EngineOptions& options) : options_(options) {
  options_.validate();
  if (options_.state_budget == 0) options_.state_budget = static_cast<int64_t>(available_memory() / 4);
  options_.state.budget = options_.state_budget;
  options_.state.checkpoint_every = options_.state.ring = 0;
  const StateBytes none = state_bytes(model.config(), 0, model.compute_dtype(), options_.state);
  if (none.total() > options_.state_budget) fail("the budget of states is {}, but an empty one takes {} already", in_bytes(options_.state_budget), in_bytes(none.total()));
  impl_ = std::make_unique<Impl>(model, options_);
  if (const int64_t least = impl_->need(2, 0) + impl_->fixed; least > options_.state_budget) {
    fail("the budget of states is {}, but a request of two tokens takes {}", in_bytes(options_.state_budget), in_bytes(least));
  }
}

Engine::~Engine() = default;

int64_t Engine::predicted_bytes(int64_t tokens) const { return impl_->need(tokens, 0); }

int64_t Engine::submit(Request request) {
  Impl& impl = *impl_;
  auto run = std::make_unique<Run>();
  try {
    impl.check(request);
    run->request = std::move(request);
    const int64_t every = options_.keep_every;
    for (int64_t begin = 0; every > 0 && begin + every < run->prompt(); begin += every) {
      run->keys.push_back(chunk_key(std::span(run->request.prompt).subspan(static_cast<size_t>(begin), static_cast<size_t>(every)), run->route(begin, every)));
    }
  } catch (const Error&) {
    const std::lock_guard lock(impl.mutex);
    ++impl.stats.refused;
    throw;
  }
  const std::lock_guard lock(impl.mutex);
  if (impl.closed || static_cast<int64_t>(impl.queue.size()) >= options_.max_queue + std::max<int64_t>(0, options_.max_running - impl.stats.running)) {
    ++impl.stats.refused;
    if (impl.closed) throw Busy("the server is closing; nothing more is accepted");
    throw Busy(fmt::format("{} requests run and {} wait, which is all that may; try again later", impl.stats.running, impl.queue.size()));
  }
  run->id = impl.next_id++;
  run->arrived = Clock::now();
  const int64_t id = run->id;
  impl.queue.push_back(std::move(run));
  ++impl.stats.accepted;
  impl.wake.notify_all();
  return id;
}

void Engine::cancel(int64_t id) {
  const std::lock_guard lock(impl_->mutex);
  impl_->cancelled.insert(id);
  impl_->wake.notify_all();
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(impl_->mutex);
  EngineStats stats = impl_->stats;
  stats.queued = static_cast<int64_t>(impl_->queue.size());
  return stats;
}

bool Engine::step() {
  const at::NoGradGuard no_grad;
  Impl& impl = *impl_;
  impl.take_cancellations();
  impl.leave();
  impl.admit();
  if (impl.running.empty()) return false;
  impl.read_piece();
  impl.write_tokens();
  impl.leave();
  return true;
}

void Engine::wait(double seconds) {
  std::unique_lock lock(impl_->mutex);
  impl_->wake.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return !impl_->queue.empty(); });
}

void Engine::run() {
  while (true) {
    if (step()) continue;
    std::unique_lock lock(impl_->mutex);
    impl_->wake.wait(lock, [this] { return impl_->closed || !impl_->queue.empty(); });
    if (impl_->closed && impl_->queue.empty()) return;
  }
}

void Engine::close(bool abort) {
  const std::lock_guard lock(impl_->mutex);
  impl_->closed = true;
  if (abort) {
    // Numbers of what has ended mean nothing any more.
    for (int64_t id = 1; id < impl_->next_id; ++id) impl_->cancelled.insert(id);
  }
  impl_->wake.notify_all();
}

}  // namespace oryx::serve
