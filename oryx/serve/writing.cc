// Texts, side by side.
#include <ATen/ATen.h>

#include <algorithm>

#include "oryx/ops/few_rows/few_rows.h"
#include "oryx/serve/engine_internal.h"

namespace oryx::serve {

namespace {

// Where keys and values of all sequences that look back in one pass are gathered side by side, padded to the longest: at
// most so many rows, unless one has more by itself.
constexpr int64_t kRowsSideBySide = 1 << 16;

}  // namespace

// By its spans alone: there may be very many tokens.
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
      const auto at = static_cast<size_t>(
          std::find(names.begin(), names.end(), routing.mixers()[static_cast<size_t>(s.mixer)]) - names.begin());
      if (layer.mixer(at == names.size() ? 0 : at).keeps_tokens()) return true;
    }
  }
  return false;
}

void Engine::Impl::take_token(Run& run, const at::Tensor& all, const at::Tensor& hidden) {
  const Request& r = run.request;
  const at::Tensor own = r.vocab_size > 0 ? all.narrow(0, 0, r.vocab_size) : all;
  const auto next = static_cast<int32_t>(sample_token(own, r.sampling, static_cast<uint64_t>(run.length)));
  tell_scores(run, own, next);
  take_next(run, next);
  if (run.over || !run.routed) return;
  run.routed->after(hidden);
  run.routed->before({&run.next, 1});
}

void Engine::Impl::tell_scores(const Run& run, const at::Tensor& logits, int32_t next) const {
  const Request& r = run.request;
  if (r.top_logprobs >= 0 && r.on_scores && next != r.eos_id) r.on_scores(score_token(logits, next, r.top_logprobs));
}

void Engine::Impl::take_next(Run& run, int32_t next) {
  const Request& r = run.request;
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

int64_t Engine::Impl::most_in_a_batch() const {
  return model.device().is_cpu() && model.compute_dtype() == at::kFloat ? ops::kFewRows : options.max_running;
}

std::vector<std::vector<Engine::Run*>> Engine::Impl::grouped() const {
  if (!reads_in_place()) return grouped_apart();
  const auto most = static_cast<size_t>(most_in_a_batch());
  std::deque<Run*> joining;
  for (const auto& run : running) {
    if (writes(*run) && !slotted(*run)) joining.push_back(run.get());
  }
  const size_t needed = (joining.size() + most - 1) / most;
  std::vector<std::vector<Run*>> groups;
  for (const Batch& batch : batches) {
    if (groups.size() == needed) break;
    groups.emplace_back();
    for (Run* run : batch.runs) groups.back().push_back(writes(*run) ? run : nullptr);
    for (Run* run : groups.back()) std::erase(joining, run);
  }
  groups.resize(needed);
  const auto join = [&](Run*& place) {
    place = joining.front();
    joining.pop_front();
  };
  for (auto& group : groups) {
    for (Run*& place : group) {
      if (place == nullptr && !joining.empty()) join(place);
    }
  }
  for (auto& group : groups) {
    while (group.size() < most && !joining.empty()) join(group.emplace_back());
    // The last ones fill what is still empty.
    for (size_t j = 0; j < group.size(); ++j) {
      while (!group.empty() && group.back() == nullptr) group.pop_back();
      if (j < group.size() && group[j] == nullptr) group[j] = group.back(), group.pop_back();
    }
  }
  std::erase_if(groups, [](const auto& group) { return group.empty(); });
  return groups;
}

std::vector<std::vector<Engine::Run*>> Engine::Impl::grouped_apart() const {
  const int64_t most = most_in_a_batch();
  std::vector<std::vector<Run*>> groups;
  for (const bool back : {false, true}) {
    int64_t longest = 0;
    bool open = false;
    for (const auto& run : running) {
      if (!writes(*run) || slotted(*run) || looks_back(model, run->route(run->length, 1)) != back) continue;
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

void Engine::Impl::form_batches() {
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
    if (!writes(*run) || slotted(*run) || !run->state) continue;
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

void Engine::Impl::write_one(Batch& batch) {
  const auto N = static_cast<int64_t>(batch.runs.size());
  ModelInput input;
  std::vector<int64_t> ids;
  int64_t regions = 0;
  for (const Run* run : batch.runs) {
    ids.push_back(run->next);
    if (bounded() && !pooled()) regions += region_bytes(run->total());
  }
  if (regions > 0) make_room({regions});
  input.input_ids = at::tensor(ids, at::kLong).view({N, 1});
  input.routing = route_rows(batch.runs);
  input.state = &batch.state;
  at::Tensor hidden = model.hidden(input).squeeze(1);      // [N, D]
  const at::Tensor logits = model.logits(hidden).cpu();  // [N, V]
  const bool routed = std::any_of(batch.runs.begin(), batch.runs.end(), [](const Run* run) { return run->routed != nullptr; });
  if (routed) hidden = hidden.cpu();  // at once
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
      take_token(run, logits[j], hidden[j]);
    } catch (const std::exception& e) {
      end(run, Outcome::kFailed, e.what());
    }
  }
}

Routings Engine::Impl::route_rows(const std::vector<Run*>& runs) const {
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

void Engine::Impl::write_tokens() {
  if (slots) write_slots();
  form_batches();
  if (!batches.empty()) pace.launched();
  for (Batch& batch : batches) {
    try {
      write_one(batch);
    } catch (const std::exception& e) {
      for (Run* run : batch.runs) end(*run, Outcome::kFailed, e.what());
    }
  }
  if (!batches.empty()) pace.came(Clock::now());
}

void Engine::Impl::leave() {
  form_batches();
  std::erase_if(reading, [](const Run* run) { return run->over; });
  if (slots) clear_slots();
  int64_t states = slots ? slots->state.sequences() : 0, alive = 0;
  for (const Batch& batch : batches) states += batch.state.sequences() + batch.state.spare_sequences();
  std::erase_if(running, [](const auto& run) { return run->over && run->flights == 0; });
  for (const auto& run : running) states += run->state ? 1 : 0, alive += run->over ? 0 : 1;
  const std::lock_guard lock(mutex);
  stats.running = alive;
  stats.prefixes = prefixes.states();
  stats.prefix_bytes = prefixes.states() * fixed;
  stats.recurrent_bytes = states * fixed;
  stats.row_bytes = pooled() ? page_bytes * (options.state.row_pages - root.free_pages())
                             : root.budget().used() - fixed - stats.prefix_bytes - stats.recurrent_bytes;
}

}  // namespace oryx::serve
