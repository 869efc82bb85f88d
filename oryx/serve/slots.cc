// Texts that are written by captured launches on a GPU: each has a place in one state, from its first token to its last.
#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "oryx/serve/engine_internal.h"

namespace oryx::serve {

namespace {

constexpr int64_t kTokensAhead = 64;  // whose modes are resolved at once: resolving costs the host as much for one

}  // namespace

void Engine::Impl::make_slots() {
  const auto places = static_cast<size_t>(options.max_running);
  slots.emplace(Slots{root.fork(std::vector<int64_t>(places, 0)), std::vector<Run*>(places, nullptr), {}, {}});
  decoder->attach(slots->state);
}

size_t Engine::Impl::modes_ahead(Run& run, int64_t position) const {
  const auto known = static_cast<int64_t>(run.ahead_attention.size());
  if (position >= run.ahead_from && position < run.ahead_from + known) return static_cast<size_t>(position - run.ahead_from);
  // One token back: a step's results are looked at when the next one has been launched.
  run.ahead_from = std::max<int64_t>(0, position - 1);
  // Not all texts in the same step.
  const int64_t most = kTokensAhead + run.id % kTokensAhead;
  const int64_t layers = model.config().num_layers, count = std::min(most, run.total() - run.ahead_from);
  const Routings routings = run.route(run.ahead_from, count);
  run.ahead_modes.assign(static_cast<size_t>(count * layers), 0);
  run.ahead_attention.assign(static_cast<size_t>(count), 0);
  for (int64_t i = 0; i < layers; ++i) {
    const auto& names = model.layer(i).mixer_names();
    const auto attention = std::find(names.begin(), names.end(), "attention") - names.begin();
    // Where all mixers' outputs are averaged each token attends (oryx::attention_share).
    const bool always = model.config().layer.combine == "mean" && attention < static_cast<int64_t>(names.size());
    const at::Tensor places = routings[routings.size() == 1 ? 0 : static_cast<size_t>(i)]->places(names).contiguous();
    for (int64_t t = 0; t < count; ++t) {
      const int8_t place = places.const_data_ptr<int8_t>()[t];
      run.ahead_modes[static_cast<size_t>(t * layers + i)] = static_cast<uint8_t>(place);
      run.ahead_attention[static_cast<size_t>(t)] += always || place == attention ? 1 / static_cast<double>(layers) : 0;
    }
  }
  return static_cast<size_t>(position - run.ahead_from);
}

void Engine::Impl::seat_texts() {
  for (const auto& run : running) {
    if (!writes(*run) || !slotted(*run) || run->slot >= 0) continue;
    const auto place = std::find(slots->runs.begin(), slots->runs.end(), nullptr);
    TORCH_CHECK(place != slots->runs.end(), "serve: no slot for a text that was admitted");
    const int64_t slot = place - slots->runs.begin();
    try {
      slots->state.seat(slot, std::move(*run->state));
    } catch (const std::exception& e) {
      slots->state.clear(slot);
      end(*run, Outcome::kFailed, e.what());
      continue;
    }
    run->slot = slot;
    run->state.reset();
    *place = run.get();
  }
}

void Engine::Impl::clear_slots() {
  for (Run*& run : slots->runs) {
    if (run == nullptr || !run->over || run->flights > 0) continue;
    slots->state.clear(run->slot);
    run->slot = -1;
    run = nullptr;
  }
}

std::vector<SlotDecoder::Row> Engine::Impl::next_rows(std::vector<Run*>& runs) {
  std::vector<SlotDecoder::Row> rows;
  for (Run* run : slots->runs) {
    if (run == nullptr || run->over) continue;
    const bool flies = run->flights > 0;
    // The token that is under way is its last one.
    if (flies && run->ended.new_tokens + 1 >= run->request.max_tokens) continue;
    runs.push_back(run);
    const int64_t position = run->length + (flies ? 1 : 0);
    const size_t at = modes_ahead(*run, position) * static_cast<size_t>(model.config().num_layers);
    rows.push_back({.slot = run->slot,
                    .id = flies ? SlotDecoder::kGiven : run->next,
                    .modes = run->ahead_modes.data() + at,
                    .below = run->request.vocab_size,
                    .sampling = &run->request.sampling,
                    .logits = wants_logits(*run)});
  }
  return rows;
}

void Engine::Impl::take_results(const SlotDecoder::Pending& pending, const std::vector<Run*>& runs) {
  SlotDecoder::Results results;
  std::string error;
  try {
    results = pending();
  } catch (const std::exception& e) {
    error = e.what();
  }
  pace.came(Clock::now());
  for (Run* run : runs) --run->flights;
  if (!error.empty()) {
    for (Run* run : runs) end(*run, Outcome::kFailed, error);
    return;
  }
  {
    const std::lock_guard lock(mutex);
    ++stats.passes;
    ++stats.decode_passes;
    stats.decode_rows += static_cast<int64_t>(runs.size());
  }
  for (size_t j = 0; j < runs.size(); ++j) {
    Run& run = *runs[j];
    if (run.over) continue;
    run.attention_tokens += run.ahead_attention[modes_ahead(run, run.length)];
    ++run.length;
    if (results.tokens[j] < 0) {
      end(run, Outcome::kFailed, "a logit is NaN or infinite; the model's weights or state are damaged");
      continue;
    }
    if (results.logits[j].defined()) {
      const int64_t below = run.request.vocab_size > 0 ? run.request.vocab_size : results.logits[j].size(0);
      tell_scores(run, results.logits[j].narrow(0, 0, below), results.tokens[j]);
    }
    take_next(run, results.tokens[j]);
  }
}

void Engine::Impl::land() {
  if (!slots || !slots->pending) return;
  const SlotDecoder::Pending pending = std::exchange(slots->pending, {});
  take_results(pending, std::exchange(slots->flying, {}));
}

void Engine::Impl::write_slots() {
  seat_texts();
  std::vector<Run*> runs;
  SlotDecoder::Pending pending;
  try {
    const auto rows = next_rows(runs);
    if (!rows.empty()) pending = decoder->step(rows), pace.launched();
  } catch (const std::exception& e) {
    land();
    for (Run* run : runs) end(*run, Outcome::kFailed, e.what());
    return;
  }
  for (Run* run : runs) ++run->flights;
  const SlotDecoder::Pending before = std::exchange(slots->pending, std::move(pending));
  const std::vector<Run*> flown = std::exchange(slots->flying, std::move(runs));
  if (before) take_results(before, flown);
}

}  // namespace oryx::serve
