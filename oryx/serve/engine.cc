#include "oryx/serve/engine.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <limits>

#include <c10/core/CachingDeviceAllocator.h>

#include "oryx/common/file.h"
#include "oryx/common/log.h"
#include "oryx/common/progress.h"
#include "oryx/serve/engine_internal.h"

namespace oryx::serve {

namespace {

std::string in_bytes(int64_t n) { return human_bytes(static_cast<double>(n)); }

int64_t default_budget(at::Device device) {
  if (device.is_cpu()) return static_cast<int64_t>(available_memory() / 4);
  // What the library holds back of freed tensors is free, too.
  auto* allocator = c10::getDeviceAllocator(device.type());
  const auto stats = allocator->getDeviceStats(device.index());
  const int64_t held = stats.reserved_bytes[0].current - stats.allocated_bytes[0].current;
  return (static_cast<int64_t>(allocator->getMemoryInfo(device.index()).first) + held) / 2;
}

// Slots stand for as long as the engine, and rows in a pool that is taken at once: how much of the budget is whose.
// Every request may have a state beside its slot while its prompt is read. A kept prefix takes a recurrent state for
// every keep_every tokens of rows; the pool leaves as much.
void divide_budget(const LanguageModel& model, EngineOptions& o) {
  const StateBytes none = state_bytes(model.config(), 0, model.compute_dtype(), o.state);
  const int64_t fixed = none.recurrent + none.tails;
  StateOptions all = o.state;  // a page holds what a bound drops, too
  all.bound = {};
  const int64_t page = state_bytes(model.config(), o.state.page_tokens, model.compute_dtype(), all).tokens;
  const int64_t most = page > 0 ? o.state_budget / 2 : o.state_budget;
  if (const int64_t running = fixed > 0 ? (most / fixed - 1) / 2 : o.max_running; running < o.max_running) {
    if (running < 1) {
      fail("the budget of states is {}, but one request that is written and one that is read take {}",
           in_bytes(o.state_budget), in_bytes(3 * fixed * (page > 0 ? 2 : 1)));
    }
    log::warn_once("{} requests side by side in place of {}: the budget of states, {}, has room for no more",
                   running, o.max_running, in_bytes(o.state_budget));
    o.max_running = running;
  }
  if (page == 0) return;
  const double left = static_cast<double>(o.state_budget - (1 + 2 * o.max_running) * fixed);
  const auto rows = static_cast<double>(o.keep_every * page) / static_cast<double>(o.state.page_tokens);
  const double share = o.keep_every > 0 ? rows / (rows + static_cast<double>(fixed)) : 1;
  o.state.row_pages = std::max<int64_t>(1, static_cast<int64_t>(left * share / static_cast<double>(page)));
}

}  // namespace

std::string to_string(Outcome outcome) {
  switch (outcome) {
    case Outcome::kEos:
      return "eos";
    case Outcome::kLength:
      return "length";
    case Outcome::kStopped:
      return "stopped";
    case Outcome::kCancelled:
      return "cancelled";
    case Outcome::kFailed:
      return "failed";
  }
  TORCH_CHECK(false, "Outcome");
}

void EngineOptions::validate() const {
  if (max_running < 0) fail("max_running is {}, expected an integer of at least 1, or 0 for the device's own", max_running);
  if (max_queue < 0) fail("max_queue is {}, expected an integer of at least 0", max_queue);
  if (piece < 0) fail("piece is {}, expected an integer of at least 1, or 0 for the device's own", piece);
  if (keep_every < -1 || (keep_every > 0 && piece > 0 && keep_every % piece != 0))
    fail("keep_every is {}, expected 0 or a multiple of piece, {}", keep_every, piece);
  if (!(gap_seconds >= 0 && gap_seconds <= 3600)) fail("gap_seconds is {}, expected 0 to 3600", gap_seconds);
  if (state_budget < 0) fail("state_budget is {}, expected an integer of at least 0", state_budget);
  if (state.kept.on())
    fail(
        "keys and values '{}' are not served: rows kept by choice stand in no batch; expected keep, drop or "
        "bounded:F+W",
        kv_text(state));
  state.validate();
}

void EngineOptions::settle(at::Device device, bool captured) {
  if (max_running == 0) max_running = captured ? 64 : 8;
  // A pass is some thousand launches on a GPU, however few its tokens.
  const int64_t usual = device.is_cpu() ? 256 : 1024;
  if (piece == 0) piece = keep_every > 0 && keep_every % usual != 0 ? keep_every : usual;
  if (keep_every < 0) keep_every = piece;
}

void Engine::Impl::check(const Request& r) const {
  if (r.prompt.empty()) fail("the prompt is empty; there is nothing to go on from");
  for (const int32_t id : r.prompt) {
    if (id < 0 || id >= model.config().vocab_size)
      fail("token id {} is outside of the model's vocabulary of {}", id, model.config().vocab_size);
  }
  if (r.max_tokens < (r.score_prompt ? 0 : 1)) fail("max_tokens is {}, expected an integer of at least 1", r.max_tokens);
  const auto prompt = static_cast<int64_t>(r.prompt.size());
  if (r.max_tokens > std::numeric_limits<int32_t>::max() - prompt)
    fail("max_tokens is {}, expected at most {} after this prompt", r.max_tokens,
         std::numeric_limits<int32_t>::max() - prompt);
  if (r.vocab_size < 0 || r.vocab_size > model.config().vocab_size)
    fail("vocab_size is {}, expected 0 to {}", r.vocab_size, model.config().vocab_size);
  r.sampling.validate();
  TORCH_CHECK(r.schedule != nullptr, "serve: a request without a schedule");
  const auto heads = r.schedule->gain_heads();
  for (const auto& [need, head] : heads) check_head(model.config(), identity, *head, need.substr(need.find(':') + 1));
  if (r.schedule->needs().size() > heads.size())
    fail(
        "the schedule '{}' wants scores of the whole prompt before it runs, which serving does not measure; expected "
        "places, and routers",
        r.schedule->text());
  const int64_t tokens = prompt + r.max_tokens;
  const Room room = need(tokens, 0), most = whole();
  // On a GPU keys and values have a part of the budget to themselves, the pool.
  if (room.pages > most.pages) {
    fail(
        "{} tokens of prompt and {} of text need {} of keys and values, but the pool for them is {} of a budget of {}; shorten the "
        "prompt or max_tokens, raise --state-budget, or lower --max-running",
        prompt, r.max_tokens, in_bytes(room.pages * page_bytes), in_bytes(most.pages * page_bytes), in_bytes(most.bytes + most.pages * page_bytes));
  }
  if (room.bytes > most.bytes) {
    fail(
        "{} tokens of prompt and {} of text need {} of state, but the whole budget is {}; shorten the prompt or "
        "max_tokens, or raise --state-budget",
        prompt, r.max_tokens, in_bytes(room.bytes + room.pages * page_bytes), in_bytes(most.bytes + most.pages * page_bytes));
  }
  if (options.state.drop_rows && !heads.empty()) {
    fail(
        "the schedule '{}' has a router, which may look back at any token, but this server drops keys and values (--kv "
        "drop); expected places, or a server that keeps them",
        r.schedule->text());
  }
  if (options.state.drop_rows && tokens > std::min(options.piece, prompt)) {
    ModePiece later{.row = 0,
                    .column = 0,
                    .length = tokens - std::min(options.piece, prompt),
                    .start = std::min(options.piece, prompt),
                    .context = {}};
    later.context.prompt_length = prompt;
    later.context.seed = static_cast<uint64_t>(r.sampling.seed);
    if (looks_back(model, r.schedule->route({later}, 1, later.length))) {
      fail(
          "the schedule '{}' looks back at tokens whose keys and values this server drops (--kv drop); expected linear "
          "modes behind the first {} tokens",
          r.schedule->text(), options.piece);
    }
  }
}

bool Engine::Impl::find_room(Run& run) {
  const int64_t total = run.total();
  // The last token of the prompt runs in any case: its logits are wanted.
  PrefixTree::Node* node = run.keys.empty() ? nullptr : prefixes.find(run.keys);
  int64_t reused = node != nullptr ? node->chunks * options.keep_every : 0;
  if (node != nullptr && make_room(need(total, reused), node)) {
    run.state = node->state->fork({0});
  } else if (node != nullptr && make_room({need(total, reused).bytes - fixed, need(total, reused).pages}, node)) {
    run.state = prefixes.take(node);  // it and its fork would be one too many
  } else if (make_room(need(total, 0))) {
    run.state = root.fork({0});
    reused = 0;
  } else {
    return false;
  }
  run.length = reused;
  // What later forks share stands in memory of its own, so that they do not hold the rest. Pages of a pool come back one
  // by one.
  for (size_t i = static_cast<size_t>(reused / std::max<int64_t>(1, options.keep_every));
       i < run.keys.size() && !bounded() && !pooled(); ++i) {
    run.state->reserve_behind(static_cast<int64_t>(i + 1) * options.keep_every);
  }
  run.state->reserve_behind(total);
  return true;
}

void Engine::Impl::admit() {
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

void Engine::Impl::end(Run& run, Outcome outcome, std::string error) {
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
    if (run.started != Clock::time_point{}) --stats.running;  // its place is free before anybody hears of the end
  }
  if (run.request.on_end) run.request.on_end(run.ended);
}

void Engine::Impl::take_cancellations() {
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

Engine::Engine(const LanguageModel& model, const EngineOptions& options, const Decoders& decoders)
    : options_(options) {
  options_.validate();
  options_.state.checkpoint_every = options_.state.ring = 0;
  std::unique_ptr<SlotDecoder> decoder;
  std::string why;
  if (options_.fused) decoder = decoders(model, options_.state, &why);
  if (decoder == nullptr && options_.fused && !model.device().is_cpu()) {
    log::warn_once("serving operator by operator, more slowly than by one captured launch a step: {} (docs/serving.md)",
                   why);
  }
  options_.settle(model.device(), decoder != nullptr);
  if (options_.state_budget == 0) options_.state_budget = default_budget(model.device());
  options_.state.budget = options_.state_budget;
  const StateBytes none = state_bytes(model.config(), 0, model.compute_dtype(), options_.state);
  if (none.total() > options_.state_budget)
    fail("the budget of states is {}, but an empty one takes {} already", in_bytes(options_.state_budget),
         in_bytes(none.total()));
  if (decoder != nullptr) divide_budget(model, options_);
  const bool captured = decoder != nullptr && model.device().is_cuda() && options_.captured_pieces;
  impl_ = std::make_unique<Impl>(model, options_, std::move(decoder));
  if (captured) {
    impl_->pieces = make_piece_reader(model, options_.state, options_.piece, &why);
    if (impl_->pieces == nullptr && !why.empty()) log::warn_once("prompts are read launch by launch, more slowly where they are short: {} (docs/serving.md)", why);
  }
  const Room least = impl_->need(2, 0), whole = impl_->whole();
  if (least.bytes > whole.bytes || least.pages > whole.pages) {
    fail("the budget of states is {}, but a request of two tokens takes {}", in_bytes(options_.state_budget),
         in_bytes(predicted_bytes(2) + impl_->base_bytes() - impl_->page_bytes * options_.state.row_pages));
  }
}

bool Engine::fused() const { return impl_->slots.has_value(); }

Engine::~Engine() = default;

int64_t Engine::predicted_bytes(int64_t tokens) const {
  const Room room = impl_->need(tokens, 0);
  return room.bytes + room.pages * impl_->page_bytes;
}

// What needs no lock: checks, and what the prompt's beginnings are kept under.
std::unique_ptr<Engine::Run> Engine::accepted(Request request) const {
  Impl& impl = *impl_;
  auto run = std::make_unique<Run>();
  impl.check(request);
  run->request = std::move(request);
  if (!run->request.schedule->gain_heads().empty()) {
    run->routed = std::make_unique<RoutedText>(impl.model, *run->request.schedule);
    if (impl.slots) log::warn_once("texts whose schedules have a router are written operator by operator, beside the captured launches: it reads each token's hidden state (docs/modes.md)");
    run->routed->begin_prompt(run->prompt());
    if (run->routed->wants_prompt()) run->looked = 0;
  }
  if (run->looked < 0) impl.make_keys(*run);
  return run;
}

int64_t Engine::submit(Request request) {
  std::vector<Request> one;
  one.push_back(std::move(request));
  return submit(std::move(one)).front();
}

std::vector<int64_t> Engine::submit(std::vector<Request> requests) {
  Impl& impl = *impl_;
  const auto count = static_cast<int64_t>(requests.size());
  std::vector<std::unique_ptr<Run>> runs;
  try {
    for (Request& request : requests) runs.push_back(accepted(std::move(request)));
  } catch (const Error&) {
    const std::lock_guard lock(impl.mutex);
    impl.stats.refused += count;
    throw;
  }
  const std::lock_guard lock(impl.mutex);
  const int64_t room = options_.max_queue + std::max<int64_t>(0, options_.max_running - impl.stats.running) - static_cast<int64_t>(impl.queue.size());
  if (impl.closed || count > room) {
    impl.stats.refused += count;
    if (impl.closed) throw Busy("the server is closing; nothing more is accepted");
    const std::string now = fmt::format("{} requests run and {} wait", impl.stats.running, impl.queue.size());
    throw Busy(count == 1 ? now + ", which is all that may; try again later" : fmt::format("{}, and {} more are too many; try again later", now, count));
  }
  std::vector<int64_t> ids;
  for (auto& run : runs) {
    run->id = impl.next_id++;
    run->arrived = Clock::now();
    ids.push_back(run->id);
    impl.queue.push_back(std::move(run));
  }
  impl.stats.accepted += count;
  impl.wake.notify_all();
  return ids;
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
  if (impl.running.empty()) {
    impl.pace.pause();
    return false;
  }
  impl.read_pieces();
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
