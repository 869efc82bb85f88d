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
    if (bounded()) make_room({region_bytes(run.total())});
    ModelInput input;
    input.input_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).view({1, n});
    ModePiece piece{.row = 0, .column = 0, .length = n, .start = begin, .context = {}};
    piece.context.prompt_length = run.prompt();
    input.routing = linear.route({piece}, 1, n);
    input.state = &*run.state;
    run.routed->look_ahead(ids, model.hidden(input).squeeze(0));
    run.looked += n;
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

void Engine::Impl::read_piece() {
  std::erase_if(reading, [](const Run* run) { return run->over; });
  if (reading.empty()) return;
  Run& run = *reading.front();
  reading.pop_front();
  try {
    if (run.looked >= 0 && !look_ahead(run)) return reading.push_back(&run);
    jump(run);
    const int64_t begin = run.length, n = std::min(options.piece, run.prompt() - begin);
    if (bounded()) make_room({region_bytes(run.total())});
    ModelInput input;
    const auto first = run.request.prompt.begin() + begin;
    input.input_ids = at::tensor(std::vector<int64_t>(first, first + n), at::kLong).view({1, n});
    if (run.routed) {
      // A kept prefix spares the model tokens that routers are told of nevertheless.
      const int64_t told = run.routed->length();
      run.routed->before(std::span(run.request.prompt).subspan(static_cast<size_t>(told), static_cast<size_t>(begin + n - told)));
    }
    input.routing = run.route(begin, n);
    input.state = &*run.state;
    const at::Tensor hidden = model.hidden(input).squeeze(0), last = hidden.narrow(0, n - 1, 1);  // [n, D], [1, D]
    run.length += n;
    run.read += n;
    count(run, input.routing, n);
    {
      const std::lock_guard lock(mutex);
      ++stats.passes;
      stats.tokens_read += n;
    }
    if (run.request.score_prompt && run.request.on_scores) score_piece(run, begin, hidden);
    keep_prefix(run);
    if (run.length < run.prompt()) return reading.push_back(&run);
    run.ended.reused_tokens = run.prompt() - run.read;
    {
      const std::lock_guard lock(mutex);
      ++(run.ended.reused_tokens > 0 ? stats.prefix_hits : stats.prefix_misses);
      stats.tokens_reused += run.ended.reused_tokens;
    }
    if (run.request.max_tokens == 0) return end(run, Outcome::kLength);
    take_token(run, model.logits(last.clone()).squeeze(0).cpu(), last[0]);
  } catch (const std::exception& e) {
    end(run, Outcome::kFailed, e.what());
  }
}

void Engine::Impl::score_piece(const Run& run, int64_t begin, const at::Tensor& hidden) const {
  constexpr int64_t kRows = 64;  // of logits at once
  const Request& r = run.request;
  if (begin == 0) r.on_scores({r.prompt.front(), std::numeric_limits<double>::quiet_NaN(), {}});
  const int64_t count = std::min(hidden.size(0), run.prompt() - 1 - begin);
  for (int64_t from = 0; from < count; from += kRows) {
    const int64_t rows = std::min(kRows, count - from);
    const at::Tensor logits = model.logits(hidden.narrow(0, from, rows)).cpu();
    for (int64_t j = 0; j < rows; ++j) {
      const int32_t id = r.prompt[static_cast<size_t>(begin + from + j + 1)];
      const bool known = r.vocab_size > 0 && id < r.vocab_size;  // a prompt may hold ids that the tokeniser does not know
      r.on_scores(score_token(known ? logits[j].narrow(0, 0, r.vocab_size) : logits[j], id, std::max<int64_t>(0, r.top_logprobs)));
    }
  }
}

void Engine::Impl::keep_prefix(Run& run) {
  if (options.keep_every == 0 || run.length % options.keep_every != 0) return;
  const auto chunks = static_cast<size_t>(run.length / options.keep_every);
  if (chunks > run.keys.size() || prefixes.holds(run.keys, chunks)) return;
  // A last, partly filled page is copied.
  if (!make_room(with_rows(fixed, run.length % options.state.page_tokens > 0 ? 1 : 0))) return;
  prefixes.keep(run.keys, chunks, run.state->fork({0}));
}

}  // namespace oryx::serve
