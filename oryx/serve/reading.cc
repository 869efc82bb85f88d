// Prompts, piece by piece and in turns.
#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "oryx/serve/engine_internal.h"

namespace oryx::serve {

std::string chunk_key(std::span<const int32_t> ids, const Routings& routings) {
  std::string key(reinterpret_cast<const char*>(ids.data()), ids.size_bytes());
  const Routing* last = nullptr;
  for (const auto& routing : routings) {
    key += '|';
    if (routing.get() == last) continue;
    last = routing.get();
    for (const RoutedSpan& s : routing->spans())
      key += fmt::format("{}-{}:{};", s.begin, s.end, routing->mixers()[static_cast<size_t>(s.mixer)]);
  }
  return key;
}

void Engine::Impl::make_keys(Run& run) const {
  const int64_t every = run.request.score_prompt ? 0 : options.keep_every;
  for (int64_t begin = 0; every > 0 && begin + every < run.prompt(); begin += every) {
    run.keys.push_back(
        chunk_key(std::span(run.request.prompt).subspan(static_cast<size_t>(begin), static_cast<size_t>(every)),
                  run.route(begin, every)));
  }
}

bool Engine::Impl::look_ahead(Run& run) {
  const std::span<const int32_t> prompt(run.request.prompt);
  const bool reading = run.routed->wants_reading();
  if (!reading) {
    run.routed->look_ahead(prompt, {});
  } else {
    const int64_t begin = run.looked, n = std::min(options.piece, run.prompt() - begin);
    const auto ids = prompt.subspan(static_cast<size_t>(begin), static_cast<size_t>(n));
    ModePiece piece{.row = 0, .column = 0, .length = n, .start = begin, .context = {}};
    piece.context.prompt_length = run.prompt();
    run.routed->look_ahead(ids, run_piece(run, ids, linear.route({piece}, 1, n)));
    run.looked += n;
    pace.read(n);
    const std::lock_guard lock(mutex);
    ++stats.passes;
    stats.tokens_ahead += n;
  }
  if (run.routed->wants_prompt()) return false;
  if (reading) run.state->trim(0, 0, model);  // as if nothing had been read
  run.looked = -1;
  make_keys(run);
  return !reading;
}

void Engine::Impl::count(Run& run, const Routings& routings, int64_t tokens) {
  run.attention_tokens += oryx::attention_share(model.config(), routings) * static_cast<double>(tokens);
}

void Engine::Impl::jump(Run& run) {
  const PrefixTree::Node* node = run.keys.empty() ? nullptr : prefixes.find(run.keys);
  if (node == nullptr || node->chunks * options.keep_every <= run.length) return;
  run.state.reset();  // its bytes are enough for what takes its place
  TORCH_CHECK(find_room(run), "serve: no room for a state in place of a larger one");
}

at::Tensor Engine::Impl::run_piece(Run& run, std::span<const int32_t> ids, const Routings& routing) {
  const auto n = static_cast<int64_t>(ids.size());
  if (pieces != nullptr && pieces->takes(routing, n)) return pieces->read(*run.state, ids);
  if (bounded() && !pooled()) make_room({region_bytes(run.total())});
  ModelInput input;
  input.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).view({1, n});
  input.routing = routing;
  input.state = &*run.state;
  return model.hidden(input).squeeze(0);
}

namespace {

// Of what was measured before; the newest counts for a quarter.
double blended(double before, double now) { return before == 0 ? now : 0.75 * before + 0.25 * now; }

}  // namespace

void Pace::came(Clock::time_point now) {
  if (flying_.empty()) return;
  const int64_t tokens = flying_.front();
  flying_.pop_front();
  if (last_) {
    const double seconds = seconds_between(*last_, now);
    if (tokens == 0) {
      step_ = blended(step_, seconds);
    } else if (seconds > step_) {
      token_ = blended(token_, (seconds - step_) / static_cast<double>(tokens));
    }
  }
  last_ = now;
}

void Pace::begin_round(double gap, int64_t piece) {
  // Prompts are read at a tenth of the time at least, however long the steps take. What a round does not use is saved up only for a piece that wants more than one: else the next would
  // be as much too long.
  const double share = std::max(gap - step_, 0.1 * gap);
  credit_ = std::min(std::max(credit_, 0.0) + share, std::max(share, seconds_of(piece)));
}

void Engine::Impl::read_pieces() {
  if (reading.empty()) return;
  const bool waits = std::any_of(running.begin(), running.end(), [this](const auto& run) { return writes(*run); });
  if (!waits) pace.pause();
  if (options.gap_seconds == 0 || !waits) {
    land();  // tokens that are there do not wait for a piece of a prompt
    return void(read_piece());
  }
  pace.begin_round(options.gap_seconds, options.piece);
  if (pace.allows(options.piece)) land();
  while (pace.allows(options.piece)) {
    const int64_t tokens = read_piece();
    if (tokens == 0) break;
    pace.spend(tokens);
  }
}

int64_t Engine::Impl::read_piece() {
  std::erase_if(reading, [](const Run* run) { return run->over; });
  if (reading.empty()) return 0;
  Run& run = *reading.front();
  reading.pop_front();
  int64_t tokens = 0;
  try {
    if (run.looked >= 0 && !look_ahead(run)) {
      reading.push_back(&run);
      return std::min(options.piece, run.prompt());
    }
    jump(run);
    const int64_t begin = run.length, n = std::min(options.piece, run.prompt() - begin);
    if (run.routed) {
      // A kept prefix spares the model tokens that routers are told of nevertheless.
      const int64_t told = run.routed->length();
      run.routed->before(std::span(run.request.prompt).subspan(static_cast<size_t>(told), static_cast<size_t>(begin + n - told)));
    }
    const Routings routing = run.route(begin, n);
    const at::Tensor hidden = run_piece(run, std::span(run.request.prompt).subspan(static_cast<size_t>(begin), static_cast<size_t>(n)), routing);
    const at::Tensor last = hidden.narrow(0, n - 1, 1);  // [1, D]
    run.length += n;
    run.read += n;
    pace.read(tokens = n);
    count(run, routing, n);
    {
      const std::lock_guard lock(mutex);
      ++stats.passes;
      stats.tokens_read += n;
    }
    if (run.request.score_prompt && run.request.on_scores) score_piece(run, begin, hidden);
    keep_prefix(run);
    if (run.length < run.prompt()) {
      reading.push_back(&run);
      return tokens;
    }
    run.ended.reused_tokens = run.prompt() - run.read;
    {
      const std::lock_guard lock(mutex);
      ++(run.ended.reused_tokens > 0 ? stats.prefix_hits : stats.prefix_misses);
      stats.tokens_reused += run.ended.reused_tokens;
    }
    if (run.request.max_tokens == 0) {
      end(run, Outcome::kLength);
    } else {
      take_token(run, model.logits(last.clone()).squeeze(0).cpu(), last[0]);
    }
  } catch (const std::exception& e) {
    end(run, Outcome::kFailed, e.what());
  }
  return tokens;
}

void Engine::Impl::score_piece(const Run& run, int64_t begin, const at::Tensor& hidden) const {
  constexpr int64_t kRows = 64;  // of logits at once
  const Request& r = run.request;
  const int64_t top = std::max<int64_t>(0, r.top_logprobs);
  if (begin == 0) r.on_scores({r.prompt.front(), std::numeric_limits<double>::quiet_NaN(), {}});
  const int64_t count = std::min(hidden.size(0), run.prompt() - 1 - begin);
  for (int64_t from = 0; from < count; from += kRows) {
    const int64_t rows = std::min(kRows, count - from);
    const std::span ids = std::span(r.prompt).subspan(static_cast<size_t>(begin + from + 1), static_cast<size_t>(rows));
    const at::Tensor logits = model.logits(hidden.narrow(0, from, rows));
    // A prompt may hold ids that the tokeniser does not know: among all that the model knows.
    const bool known = r.vocab_size > 0 && std::all_of(ids.begin(), ids.end(), [&](int32_t id) { return id < r.vocab_size; });
    if (known || r.vocab_size == 0) {
      for (TokenScores& scores : score_rows(known ? logits.narrow(1, 0, r.vocab_size) : logits, ids, top)) r.on_scores(std::move(scores));
      continue;
    }
    const at::Tensor here = logits.cpu();
    for (int64_t j = 0; j < rows; ++j) {
      const int32_t id = ids[static_cast<size_t>(j)];
      r.on_scores(score_token(id < r.vocab_size ? here[j].narrow(0, 0, r.vocab_size) : here[j], id, top));
    }
  }
}

void Engine::Impl::keep_prefix(Run& run) {
  if (options.keep_every == 0 || run.length % options.keep_every != 0) return;
  const auto chunks = static_cast<size_t>(run.length / options.keep_every);
  if (chunks > run.keys.size() || prefixes.holds(run.keys, chunks)) return;
  // A last, partly filled page is copied. Of a pool a bounded sequence has pages in place of those that it shares now.
  const bool replaces = bounded() && pooled();
  const int64_t own = replaces ? region_pages(run.total()) : 0;
  if (!make_room(with_rows(fixed, own + (run.length % options.state.page_tokens > 0 ? 1 : 0)))) return;
  prefixes.keep(run.keys, chunks, run.state->fork({0}));
  if (replaces) run.state->reserve_behind(run.total());
}

}  // namespace oryx::serve
