// What a layer reads of a state's rows: all of them, or those that a bounded state keeps.
#include <ATen/ATen.h>

#include <algorithm>

#include "oryx/model/device.h"
#include "oryx/model/layer.h"

namespace oryx {

namespace {

// New tokens of a call by sequence; T of each where they are not packed.
std::vector<int64_t> new_tokens(const ForwardPass& pass, int64_t T) {
  std::vector<int64_t> counts(pass.state->lengths().size(), T);
  for (size_t n = 0; n + 1 < pass.cu_seqlens.size(); ++n) counts[n] = pass.cu_seqlens[n + 1] - pass.cu_seqlens[n];
  return counts;
}

// Of sequences whose rows begin at `begins`, `lengths` of them each, and of their `first` first rows.
RowPlaces row_places(const std::vector<int64_t>& begins, const std::vector<int64_t>& lengths, int64_t first, at::Device device) {
  const auto ints = [](const std::vector<int64_t>& x) { return at::tensor(x, at::kLong).to(at::kInt); };
  const auto N = static_cast<int64_t>(begins.size()), rows = *std::max_element(lengths.begin(), lengths.end());
  const auto there = at::device(device).dtype(at::kInt);
  RowPlaces p{ints(lengths), ints(begins), {}, at::arange(first, there).expand({N, first}), {}};
  const bool side_by_side = std::all_of(begins.begin(), begins.end(), [&](int64_t begin) { return begin == begins[0]; });
  p.positions = side_by_side ? at::arange(begins[0], begins[0] + rows, there).expand({N, rows}) : to_device(p.starts.unsqueeze(1) + at::arange(rows, at::kInt), device);
  p.lengths_there = to_device(p.lengths, device);
  return p;
}

}  // namespace

KeyValueCache MultiMixerLayer::past_and_present(const KeyValueGroup& group, const at::Tensor& k, const at::Tensor& v, ForwardPass& pass) const {
  const State& state = *pass.state;
  // Texts that are written side by side each have rows in places of their own: they are read there.
  if (k.device().is_cpu() && (k.size(1) == 1 || pass.as_steps) && pass.cu_seqlens.empty() && !state.kept().on()) return in_pages(group, k.size(1), pass);
  const std::vector<int64_t> counts = new_tokens(pass, k.size(1));
  std::vector<int64_t> lengths(state.lengths());
  for (size_t n = 0; n < counts.size(); ++n) lengths[n] += counts[n];
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  if (state.bounded(longest)) return bounded(group, k, v, counts, pass);
  if (!pass.places) pass.places = row_places(std::vector<int64_t>(counts.size(), 0), lengths, 0, k.device());
  KeyValueCache cache{state.rows(index_, group.prefix + "keys", longest), state.rows(index_, group.prefix + "values", longest), pass.places->lengths};
  cache.positions = pass.places->positions, cache.lengths_there = pass.places->lengths_there;
  return cache;
}

// One token of each sequence, or `tokens` of the one that there is: a row of lengths and pages for each of them.
KeyValueCache MultiMixerLayer::in_pages(const KeyValueGroup& group, int64_t tokens, ForwardPass& pass) const {
  const State& state = *pass.state;
  if (!pass.pages) pass.pages = state.pages();
  KeyValueCache cache;
  cache.lengths = state.lengths_tensor() + 1;
  if (tokens > 1) cache.lengths = cache.lengths + at::arange(tokens, at::kInt);
  cache.window = state.options().bound.window, cache.first = state.options().bound.first;
  cache.blocks = tokens > 1 ? pass.pages->blocks.expand({tokens, -1}) : pass.pages->blocks;
  cache.key_pools = state.pools(index_, group.prefix + "keys", *pass.pages);
  cache.value_pools = state.pools(index_, group.prefix + "values", *pass.pages);
  return cache;
}

// The last window - 1 rows of the past and those of this call, and the first rows.
KeyValueCache MultiMixerLayer::bounded(const KeyValueGroup& group, const at::Tensor& k, const at::Tensor& v, const std::vector<int64_t>& counts,
                                       ForwardPass& pass) const {
  const State& state = *pass.state;
  const RowWindow& bound = state.options().bound;
  const size_t N = counts.size();
  // A choice among rows begins with the one that leaves the window now.
  const int64_t before_first = bound.window - (state.kept().on() ? 0 : 1);
  std::vector<int64_t> begins(N), lengths(state.lengths()), ends(N), held(N), firsts(N);
  bool stored = true;
  for (size_t n = 0; n < N; ++n) {
    begins[n] = std::max<int64_t>(0, lengths[n] - before_first);
    ends[n] = lengths[n] + counts[n];
    held[n] = ends[n] - begins[n];
    firsts[n] = std::min(bound.first, ends[n]);
    // A call of many tokens leaves fewer rows than its own queries look at.
    stored = stored && (pass.refill || counts[n] <= state.row_bound().last);
  }
  const auto of = [&](const std::string& name, const at::Tensor& fresh) {
    const std::string slot = group.prefix + name;
    if (stored) return state.rows(index_, slot, begins, ends);
    const at::Tensor past = state.rows(index_, slot, begins, lengths);
    std::vector<int64_t> shape = past.sizes().vec();
    shape[1] = *std::max_element(held.begin(), held.end());
    at::Tensor all = at::empty(shape, past.options());
    for (size_t n = 0; n < N; ++n) {
      const auto row = static_cast<int64_t>(n);
      const int64_t before = lengths[n] - begins[n];
      const at::Tensor own = pass.cu_seqlens.empty() ? fresh[row] : fresh[0].narrow(0, pass.cu_seqlens[n], counts[n]);
      all[row].narrow(0, 0, before).copy_(past[row].narrow(0, 0, before));
      all[row].narrow(0, before, counts[n]).copy_(own);
    }
    return all;
  };
  const auto first = [&](const std::string& name) {
    at::Tensor rows = state.rows(index_, group.prefix + name, std::vector<int64_t>(N, 0), firsts);
    if (rows.size(1) == *std::min_element(firsts.begin(), firsts.end())) return rows;
    rows = rows.clone();  // nothing unspecified enters a product
    for (size_t n = 0; n < N; ++n) rows[static_cast<int64_t>(n)].narrow(0, firsts[n], rows.size(1) - firsts[n]).zero_();
    return rows;
  };
  if (!pass.places) pass.places = row_places(begins, held, *std::max_element(firsts.begin(), firsts.end()), k.device());
  const RowPlaces& places = *pass.places;
  KeyValueCache cache{of("keys", k), of("values", v), places.lengths, bound.window, places.starts};
  cache.positions = places.positions, cache.first_positions = places.first_positions, cache.lengths_there = places.lengths_there;
  cache.first_keys = first("keys"), cache.first_values = first("values");
  if (state.kept().on()) add_kept(group, begins, pass, cache);
  return cache;
}

// Lets the state choose which rows this layer keeps of the tokens that leave the window during this call. True when it takes some in: they are wanted then (add_kept), whoever
// looks at them.
bool MultiMixerLayer::choose_rows(const Projections& u, const std::vector<KeyValues>& kvs, ForwardPass& pass) const {
  State& state = *pass.state;
  KeptRows& kept = state.kept();
  if (!kept.on() || pass.refill || std::none_of(kvs.begin(), kvs.end(), [](const KeyValues& kv) { return kv.cached; })) return false;
  const std::vector<int64_t>& lengths = state.lengths();
  const std::vector<int64_t> counts = new_tokens(pass, u.input().size(1));
  const size_t N = counts.size();
  at::Tensor scores;  // [B, T]
  if (state.layer(index_).has("surprise")) {
    std::vector<at::Tensor> all;
    for (size_t m = 0; m < mixers_.size(); ++m) {
      const KeyValues& kv = kvs[config_.share_kv ? 0 : m];
      const MixerInput input{u.input(), u, {}, kv.k, kv.v, {}, pass.sequences, &state.layer(index_)};
      if (const auto score = mixers_[m]->surprise(input, state.options().kept.measure())) all.push_back(*score);
    }
    scores = (all.size() == 1 ? all[0] : at::stack(all).mean(0)).to(at::kFloat);
    keep("surprise", scores, pass);
  }
  std::vector<int64_t> begins(N, 0), ends(N, 0);  // of tokens that leave and that earlier calls have read
  bool any = false;
  for (size_t n = 0; n < N; ++n) {
    const auto [begin, end] = kept.leaving(lengths[n], counts[n]);
    if (counts[n] == 0 || begin >= end) continue;
    any = true;
    if (begin < lengths[n]) begins[n] = begin, ends[n] = std::min(end, lengths[n]);
  }
  if (!any) return false;
  std::vector<std::vector<float>> leaving(N);
  if (scores.defined()) {
    const at::Tensor own = scores.cpu().contiguous(), past = state.rows(index_, "surprise", begins, ends).cpu().contiguous();
    for (size_t n = 0; n < N; ++n) {
      const auto [begin, end] = kept.leaving(lengths[n], counts[n]);
      if (counts[n] == 0 || begin >= end) continue;
      const auto row = static_cast<int64_t>(n);
      const float* before = past.const_data_ptr<float>() + row * past.size(1);
      leaving[n].assign(before, before + (ends[n] - begins[n]));
      const int64_t from = std::max(begin, lengths[n]) - lengths[n], to = end - lengths[n];  // of this call's tokens
      const float* here = own.const_data_ptr<float>() + (pass.cu_seqlens.empty() ? row * own.size(1) : pass.cu_seqlens[n]);
      if (from < to) leaving[n].insert(leaving[n].end(), here + from, here + to);
    }
  }
  kept.choose(index_, lengths, counts, leaving);
  for (size_t n = 0; n < N; ++n) {
    if (!kept.fresh(index_, static_cast<int64_t>(n)).empty()) return true;
  }
  return false;
}

// The rows between the first and the last ones: those that were chosen during this call are written, from the cache's rows, which begin at `begins`.
void MultiMixerLayer::add_kept(const KeyValueGroup& group, const std::vector<int64_t>& begins, const ForwardPass& pass, KeyValueCache& cache) const {
  KeptRows& kept = pass.state->kept();
  const auto of = [&](const std::string& name, const at::Tensor& rows) {
    const std::string slot = group.prefix + name;
    for (size_t n = 0; n < begins.size(); ++n) {
      const auto row = static_cast<int64_t>(n);
      std::vector<int64_t> fresh = kept.fresh(index_, row);
      if (fresh.empty()) continue;
      for (int64_t& position : fresh) position -= begins[n];
      kept.write(index_, slot, row, rows[row].index_select(0, at::tensor(fresh, at::kLong).to(rows.device())));
    }
    return kept.rows(index_, slot);
  };
  const at::Tensor keys = of("keys", cache.keys), values = of("values", cache.values);
  if (keys.size(1) == 0) return;
  const KeptRows::Places places = kept.places(index_);
  cache.kept_keys = keys;
  cache.kept_values = values;
  cache.kept_positions = places.positions;
  cache.kept_from = places.from;
  cache.kept_until = places.until;
}

}  // namespace oryx
