#include "oryx/state/kept_rows.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"

namespace oryx {

namespace {

// Of two rows the one that goes first: the lower score, of equals the later token.
bool goes_before(const KeptRow& a, const KeptRow& b) { return a.score < b.score || (a.score == b.score && a.position > b.position); }

std::vector<int64_t> rows_of_shape(std::initializer_list<int64_t> front, const std::vector<int64_t>& shape) {
  std::vector<int64_t> all(front);
  all.insert(all.end(), shape.begin(), shape.end());
  return all;
}

}  // namespace

KeptRows::KeptRows(const std::vector<std::vector<SlotSpec>>& layers, int64_t sequences, const KeptRule& rule, int64_t first, int64_t window, int64_t back,
                   std::shared_ptr<ByteBudget> budget, at::Device device)
    : rule_(rule), first_(first), window_(window), back_(back), budget_(std::move(budget)), device_(device), lost_(static_cast<size_t>(sequences), 0) {
  if (!on()) return;
  for (const auto& slots : layers) {
    Layer& layer = layers_.emplace_back();
    layer.sequences.resize(static_cast<size_t>(sequences));
    for (const SlotSpec& spec : slots) {
      const at::Tensor none = at::zeros(rows_of_shape({sequences, 0}, spec.shape), at::device(device).dtype(spec.dtype));
      layer.slots.emplace(spec.name, Slot{spec, none});
      layer.row_bytes += spec.bytes();
    }
    if (!slots.empty()) layer.row_bytes += kRowBytes;
  }
}

std::pair<int64_t, int64_t> KeptRows::leaving(int64_t length, int64_t count) const {
  const int64_t begin = std::max(first_, length - window_);
  return {begin, std::max(begin, length + count - window_)};
}

// Whether a row can not be seen again, nor be wanted by a trim, when `length` tokens were read.
bool KeptRows::over(const KeptRow& row, int64_t length) const {
  return row.until != KeptRow::kAlive && (back_ > 0 ? row.until < length - back_ : row.until <= length);
}

void KeptRows::drop(Sequence& s, int64_t n, int64_t length) {
  for (const KeptRow& row : s.rows) {
    if (over(row, length)) lost_[static_cast<size_t>(n)] = std::max<int64_t>(lost_[static_cast<size_t>(n)], row.until);
  }
  std::erase_if(s.rows, [&](const KeptRow& row) { return over(row, length); });
}

void KeptRows::choose(int64_t i, const std::vector<int64_t>& lengths, const std::vector<int64_t>& counts, const std::vector<std::vector<float>>& measured) {
  Layer& layer = layers_[static_cast<size_t>(i)];
  const RowPolicy* policy = find_row_policy(rule_.by);
  TORCH_CHECK(policy != nullptr && measured.size() == layer.sequences.size(), "state: measures of ", measured.size(), " sequences");
  const auto later = [](const KeptRow& a, const KeptRow& b) { return goes_before(b, a); };  // a heap whose front goes first
  for (size_t n = 0; n < layer.sequences.size(); ++n) {
    Sequence& s = layer.sequences[n];
    s.fresh.clear();
    const auto [begin, end] = leaving(lengths[n], counts[n]);
    if (counts[n] == 0 || begin >= end) continue;
    TORCH_CHECK(policy->wants == TokenMeasure::kNone || static_cast<int64_t>(measured[n].size()) == end - begin, "state: measures of ", measured[n].size(), " tokens, expected ",
                end - begin);
    std::vector<KeptRow> alive, rows;
    for (const KeptRow& row : s.rows) (row.until == KeptRow::kAlive ? alive : rows).push_back(row);
    std::make_heap(alive.begin(), alive.end(), later);
    for (int64_t t = begin; t < end; ++t) {
      const float value = policy->wants != TokenMeasure::kNone ? measured[n][static_cast<size_t>(t - begin)] : 0;
      const float score = policy->score({i, t, value, rule_.seed});
      if (!std::isfinite(score)) fail("the score of token {} in layer {} by '{}' is {}; the model's weights are damaged or overflow", t, i, rule_.by, score);
      if (rule_.threshold && score < *rule_.threshold) continue;
      alive.push_back({static_cast<int32_t>(t), KeptRow::kAlive, score, -1});
      std::push_heap(alive.begin(), alive.end(), later);
      if (static_cast<int64_t>(alive.size()) <= rule_.limit(t - first_ + 1)) continue;
      std::pop_heap(alive.begin(), alive.end(), later);
      KeptRow gone = alive.back();
      alive.pop_back();
      if (gone.position == t) continue;  // it was never seen beyond the window
      gone.until = static_cast<int32_t>(t + window_);
      rows.push_back(gone);
    }
    rows.insert(rows.end(), alive.begin(), alive.end());
    std::sort(rows.begin(), rows.end(), [](const KeptRow& a, const KeptRow& b) { return a.position < b.position; });
    s.rows = std::move(rows);
    drop(s, static_cast<int64_t>(n), lengths[n]);  // what ends with the first query is not seen by this call
    const auto needed = static_cast<int64_t>(s.rows.size());
    if (needed > layer.capacity) {
      const int64_t room = needed + needed / 4 + 16;
      resize(layer, rule_.budget > 0 && needed <= rule_.budget ? std::min(room, rule_.budget) : room);
    }
    std::vector<bool> taken(static_cast<size_t>(layer.capacity), false);
    for (const KeptRow& row : s.rows) {
      if (row.row >= 0) taken[static_cast<size_t>(row.row)] = true;
    }
    int64_t free = 0;
    for (KeptRow& row : s.rows) {
      if (row.row >= 0) continue;
      while (taken[static_cast<size_t>(free)]) ++free;
      row.row = free++;
      s.fresh.push_back(row.position);
    }
  }
}

void KeptRows::resize(Layer& layer, int64_t capacity) {
  if (capacity == layer.capacity || layer.slots.empty()) return;
  const auto N = static_cast<int64_t>(layer.sequences.size());
  auto charge = std::make_shared<Charge>(budget_, N * capacity * layer.row_bytes);
  // Rows move to the front, in their order.
  std::vector<at::Tensor> from(static_cast<size_t>(N));
  for (size_t n = 0; n < layer.sequences.size(); ++n) {
    std::vector<int64_t> index;
    for (KeptRow& row : layer.sequences[n].rows) {
      if (row.row < 0) continue;
      index.push_back(row.row);
      row.row = static_cast<int64_t>(index.size()) - 1;
    }
    from[n] = at::tensor(index, at::kLong).to(device_);
  }
  for (auto& [name, slot] : layer.slots) {
    const at::Tensor data = at::zeros(rows_of_shape({N, capacity}, slot.spec.shape), slot.data.options());
    for (int64_t n = 0; n < N; ++n) {
      const at::Tensor& index = from[static_cast<size_t>(n)];
      if (index.numel() > 0) data[n].narrow(0, 0, index.numel()).copy_(slot.data[n].index_select(0, index));
    }
    slot.data = data;
  }
  layer.capacity = capacity;
  layer.charge = std::move(charge);
}

const std::vector<int64_t>& KeptRows::fresh(int64_t i, int64_t n) const { return layers_[static_cast<size_t>(i)].sequences[static_cast<size_t>(n)].fresh; }

void KeptRows::write(int64_t i, const std::string& slot, int64_t n, const at::Tensor& rows) {
  Layer& layer = layers_[static_cast<size_t>(i)];
  const Sequence& s = layer.sequences[static_cast<size_t>(n)];
  if (s.fresh.empty()) return;
  TORCH_CHECK(rows.size(0) == static_cast<int64_t>(s.fresh.size()), "state: ", rows.size(0), " rows for ", s.fresh.size(), " tokens");
  std::vector<int64_t> index;
  auto next = s.fresh.begin();
  for (const KeptRow& row : s.rows) {
    if (next == s.fresh.end() || row.position != *next) continue;
    index.push_back(row.row);
    ++next;
  }
  layer.slots.at(slot).data[n].index_copy_(0, at::tensor(index, at::kLong).to(device_), rows);
}

const at::Tensor& KeptRows::rows(int64_t i, const std::string& slot) const { return layers_[static_cast<size_t>(i)].slots.at(slot).data; }

KeptRows::Places KeptRows::places(int64_t i) const {
  const Layer& layer = layers_[static_cast<size_t>(i)];
  const auto N = static_cast<int64_t>(layer.sequences.size());
  const auto zeros = [&] { return at::zeros({N, layer.capacity}, at::kInt); };
  Places p{zeros(), zeros(), zeros()};
  for (int64_t n = 0; n < N; ++n) {
    for (const KeptRow& row : layer.sequences[static_cast<size_t>(n)].rows) {
      const int64_t at = n * layer.capacity + row.row;
      p.positions.mutable_data_ptr<int32_t>()[at] = row.position;
      p.from.mutable_data_ptr<int32_t>()[at] = row.position + static_cast<int32_t>(window_);
      p.until.mutable_data_ptr<int32_t>()[at] = row.until;
    }
  }
  return p;
}

void KeptRows::check_room(const std::vector<int64_t>& lengths, const std::vector<int64_t>& counts) const {
  if (!on() || budget_->limit() == 0) return;
  int64_t bytes = 0;
  for (const Layer& layer : layers_) {
    int64_t needed = 0;
    for (size_t n = 0; n < layer.sequences.size(); ++n) {
      const auto [begin, end] = leaving(lengths[n], counts[n]);
      needed = std::max(needed, static_cast<int64_t>(layer.sequences[n].rows.size()) + (counts[n] > 0 ? end - begin : 0));
    }
    const bool settled = back_ == 0 && std::all_of(counts.begin(), counts.end(), [](int64_t c) { return c <= 1; });
    if (settled && rule_.budget > 0) needed = std::min(needed, rule_.budget);
    if (needed > layer.capacity) bytes += static_cast<int64_t>(layer.sequences.size()) * (needed + needed / 4 + 16) * layer.row_bytes;
  }
  budget_->check(bytes);
}

void KeptRows::settle(int64_t n, int64_t length) {
  for (Layer& layer : layers_) {
    Sequence& s = layer.sequences[static_cast<size_t>(n)];
    s.fresh.clear();
    drop(s, n, length);
  }
}

void KeptRows::shrink() {
  for (Layer& layer : layers_) {
    size_t wanted = 0;
    for (const Sequence& s : layer.sequences) wanted = std::max(wanted, s.rows.size());
    const auto rows = static_cast<int64_t>(wanted);
    if (layer.capacity > rows + rows / 2 + 64 || (rule_.budget > 0 && rows <= rule_.budget && layer.capacity > rule_.budget)) {
      resize(layer, rule_.budget > 0 ? std::max(rows, std::min(rule_.budget, rows + rows / 8)) : rows + rows / 8);
    }
  }
}

bool KeptRows::holds(int64_t n, int64_t query) const { return !on() || query <= first_ + window_ || lost_[static_cast<size_t>(n)] < query; }

void KeptRows::trim(int64_t n, int64_t length) {
  if (!on()) return;
  for (Layer& layer : layers_) {
    auto& rows = layer.sequences[static_cast<size_t>(n)].rows;
    std::erase_if(rows, [&](const KeptRow& row) { return row.position + window_ >= length; });  // in the window again
    for (KeptRow& row : rows) {
      if (row.until >= length) row.until = KeptRow::kAlive;
    }
  }
  if (length <= first_ + window_) lost_[static_cast<size_t>(n)] = 0;
}

KeptRows KeptRows::fork(const std::vector<int64_t>& from) const {
  KeptRows fork;
  fork.rule_ = rule_;
  fork.first_ = first_, fork.window_ = window_, fork.back_ = back_;
  fork.budget_ = budget_;
  fork.device_ = device_;
  for (const int64_t n : from) fork.lost_.push_back(lost_[static_cast<size_t>(n)]);
  const at::Tensor index = at::tensor(from, at::kLong).to(device_);
  for (const Layer& layer : layers_) {
    Layer& own = fork.layers_.emplace_back();
    own.capacity = layer.capacity;
    own.row_bytes = layer.row_bytes;
    own.charge = std::make_shared<Charge>(budget_, static_cast<int64_t>(from.size()) * layer.capacity * layer.row_bytes);
    for (const int64_t n : from) own.sequences.push_back(layer.sequences[static_cast<size_t>(n)]);
    for (const auto& [name, slot] : layer.slots) own.slots.emplace(name, Slot{slot.spec, slot.data.index_select(0, index)});
  }
  return fork;
}

KeptRows KeptRows::view(int64_t n) const {
  KeptRows one;
  one.rule_ = rule_;
  one.first_ = first_, one.window_ = window_, one.back_ = back_;
  one.budget_ = budget_;
  one.device_ = device_;
  if (!on()) return one;
  one.lost_ = {lost_[static_cast<size_t>(n)]};
  for (const Layer& layer : layers_) {
    Layer& own = one.layers_.emplace_back();
    own.capacity = layer.capacity;
    own.row_bytes = layer.row_bytes;
    own.sequences = {layer.sequences[static_cast<size_t>(n)]};
    for (const auto& [name, slot] : layer.slots) own.slots.emplace(name, Slot{slot.spec, slot.data.narrow(0, n, 1)});
  }
  return one;
}

int64_t KeptRows::bytes() const {
  int64_t bytes = 0;
  for (const Layer& layer : layers_) {
    for (const Sequence& s : layer.sequences) bytes += static_cast<int64_t>(s.rows.size()) * layer.row_bytes;
  }
  return bytes;
}

int64_t KeptRows::reserved_bytes() const {
  int64_t bytes = 0;
  for (const Layer& layer : layers_) bytes += static_cast<int64_t>(layer.sequences.size()) * layer.capacity * layer.row_bytes;
  return bytes;
}

int64_t KeptRows::most_rows(const KeptRule& rule, int64_t first, int64_t window, int64_t tokens) {
  const int64_t left = std::max<int64_t>(0, tokens - window - first);
  return rule.on() ? std::min(left, rule.limit(left)) : 0;
}

void KeptRows::save(int64_t n, const std::string& prefix, std::vector<std::pair<std::string, at::Tensor>>& out) const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    if (layer.slots.empty()) continue;
    const auto& rows = layer.sequences[static_cast<size_t>(n)].rows;
    std::vector<int32_t> places;
    std::vector<float> scores;
    std::vector<int64_t> index;
    for (const KeptRow& row : rows) {
      places.insert(places.end(), {row.position, row.until});
      scores.push_back(row.score);
      index.push_back(row.row);
    }
    const std::string at = fmt::format("{}{}.kept", prefix, i);
    out.emplace_back(at + ".places", at::tensor(places, at::kInt).view({-1, 2}));
    out.emplace_back(at + ".scores", at::tensor(scores, at::kFloat));
    for (const auto& [name, slot] : layer.slots) out.emplace_back(at + "." + name, slot.data[n].index_select(0, at::tensor(index, at::kLong).to(device_)));
  }
}

void KeptRows::load(int64_t n, int64_t length, int64_t lost, const std::string& prefix,
                    const std::function<at::Tensor(const std::string& name, const SlotSpec& spec)>& get) {
  lost_[static_cast<size_t>(n)] = lost;
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    if (layer.slots.empty()) continue;
    const std::string at = fmt::format("{}{}.kept", prefix, i);
    const at::Tensor places = get(at + ".places", {"places", SlotKind::kPerToken, {2}, at::kInt}).contiguous().cpu();
    const at::Tensor scores = get(at + ".scores", {"scores", SlotKind::kPerToken, {}, at::kFloat}).contiguous().cpu();
    const int64_t count = scores.size(0);
    if (places.size(0) != count) fail("'{}': {} places and {} scores of kept rows", at, places.size(0), count);
    std::vector<KeptRow> rows;
    int64_t alive = 0, last = first_ - 1;
    for (int64_t k = 0; k < count; ++k) {
      const auto* place = places.const_data_ptr<int32_t>() + 2 * k;
      const float score = scores.const_data_ptr<float>()[k];
      const bool here = place[0] > last && place[0] + window_ < length && std::isfinite(score);
      const bool ends = place[1] == KeptRow::kAlive || (place[1] > place[0] + window_ && place[1] <= length);
      if (!here || !ends) fail("'{}': a kept row of token {} until {} with score {}, which a sequence of {} tokens does not have", at, place[0], place[1], score, length);
      alive += place[1] == KeptRow::kAlive ? 1 : 0;
      last = place[0];
      rows.push_back({place[0], place[1], score, k});
    }
    if (alive > most_rows(rule_, first_, window_, length)) fail("'{}': {} kept rows, expected at most {}", at, alive, most_rows(rule_, first_, window_, length));
    if (count > layer.capacity) resize(layer, count);
    layer.sequences[static_cast<size_t>(n)].rows = std::move(rows);
    for (auto& [name, slot] : layer.slots) {
      const at::Tensor x = get(at + "." + name, slot.spec);
      if (x.size(0) != count) fail("'{}.{}': {} rows, expected {}", at, name, x.size(0), count);
      slot.data[n].narrow(0, 0, count).copy_(x);
    }
  }
}

}  // namespace oryx
