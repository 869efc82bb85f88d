// Going back: checkpoints, the ring of the last calls, and trim.
#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "oryx/common/error.h"
#include "oryx/state/state.h"

namespace oryx {

namespace {

// What a restart can fall back on, for an error.
std::string way_out(bool marks) {
  return marks ? "checkpoint more often, or keep rows (keep_rows)"
               : "take checkpoints (checkpoint_every), a ring, or keep rows (keep_rows)";
}

}  // namespace

void State::take(int64_t n, Mark& mark) const {
  mark.length = lengths_[static_cast<size_t>(n)];
  // The tensors of an entry that fell out of the ring are written again, unless a fork holds them.
  if (mark.page == nullptr || mark.page.use_count() > 1) mark.page = pool_->take();
  size_t at = 0;
  ops::Copies copies;
  for_each_fixed([&](const LayerState::Slot& slot) { copies.add(mark.page->values[at++], slot.data[n]); });
  copies.run();
}

bool State::checkpoint_due(int64_t n, int64_t length) const {
  return options_.checkpoint_every > 0 && length - marks_[static_cast<size_t>(n)].last_checkpoint >= options_.checkpoint_every;
}

void State::take_marks(int64_t n) {
  Marks& m = marks_[static_cast<size_t>(n)];
  const int64_t length = lengths_[static_cast<size_t>(n)];
  // Nothing can be replayed from a checkpoint before rows that are gone.
  while (!m.checkpoints.empty() && m.checkpoints.front().length < rows_.from(n)) m.checkpoints.pop_front();
  if (checkpoint_due(n, length)) {
    take(n, m.checkpoints.emplace_back());
    m.last_checkpoint = length;
  }
  if (options_.ring == 0) return;
  m.recent_from = std::max(m.recent_from, length - recent_);
  Mark entry;
  // One more than the ring: to drop R calls, the end of the one before them must stand.
  if (static_cast<int64_t>(m.ring.size()) > options_.ring) {
    entry = std::move(m.ring.front());
    m.ring.pop_front();
  }
  take(n, entry);
  m.ring.push_back(std::move(entry));
}

void State::thin_checkpoints(int64_t every) {
  for (Marks& m : marks_) {
    int64_t last = 0;
    std::deque<Mark> kept;
    for (Mark& mark : m.checkpoints) {
      if (every == 0 || mark.length - last < every) continue;
      last = mark.length;
      kept.push_back(std::move(mark));
    }
    m.checkpoints = std::move(kept);
  }
}

const State::Mark* State::nearest_mark(int64_t n, int64_t length) const {
  const Marks& m = marks_[static_cast<size_t>(n)];
  const Mark* best = nullptr;
  for (const auto* marks : {&m.checkpoints, &m.ring}) {
    for (const Mark& mark : *marks) {
      if (mark.length <= length && (best == nullptr || mark.length > best->length)) best = &mark;
    }
  }
  return best;
}

bool State::rows_determine() const {
  bool all = true;
  for_each_fixed([&](const LayerState::Slot& slot) { all = all && slot.spec.from_rows; });
  return all;
}

bool State::replayable() const {
  for (int64_t n = 0; n < sequences(); ++n) {
    if (rows_.from(n) > 0) return false;
  }
  return rows_determine();
}

// Whether the rows that tokens from `length` on look back at are held.
bool State::sees_what_it_must(int64_t n, int64_t length) const {
  if (!looked_at_) return true;
  // A choice among rows begins with the one that leaves the window next.
  const int64_t seen = options_.bound.window - (kept_.on() ? 0 : 1);
  return rows_.holds(n, std::max<int64_t>(0, length - seen), length) && kept_.holds(n, length);
}

std::optional<State::Way> State::way_to(int64_t n, int64_t length) const {
  const Mark* exact = nearest_mark(n, length);
  if ((exact != nullptr ? exact->length : 0) == length) {
    if (!sees_what_it_must(n, length)) return {};
    return Way{exact, length, true};
  }
  if (!rows_determine()) return {};
  const bool in_ring = options_.ring > 0 && tails_in_ring(n, length);
  const int64_t scanned = in_ring ? length : std::max<int64_t>(0, length - refill_);
  const Mark* base = nearest_mark(n, scanned);
  bool any = false;  // without a recurrent slot or tail nothing is replayed
  for_each_fixed([&](const LayerState::Slot&) { any = true; });
  if (any && !rows_.holds(n, base != nullptr ? base->length : 0, length)) return {};
  if (!sees_what_it_must(n, scanned)) return {};
  return Way{base, scanned, in_ring};
}

int64_t State::reachable(int64_t sequence, int64_t length) const {
  const int64_t held = lengths_[static_cast<size_t>(sequence)];
  if (length >= held) return held;
  // Not every position: where rows are missing there are few ways, and all of them end at a mark or in the rows held.
  const int64_t from = rows_.from(sequence);
  int64_t best = 0;
  const auto try_from = [&](int64_t begin, int64_t end) {
    for (int64_t p = std::min(length, end); p >= begin && p > best; --p) {
      if (way_to(sequence, p)) best = p;
    }
  };
  if (rows_determine()) {
    try_from(from, held);
    try_from(0, options_.bound.first);
  }
  const Marks& m = marks_[static_cast<size_t>(sequence)];
  for (const auto* marks : {&m.checkpoints, &m.ring}) {
    for (const Mark& mark : *marks) {
      if (mark.length <= length && mark.length > best && way_to(sequence, mark.length)) best = mark.length;
    }
  }
  return best;
}

State::State(Empty, const State& like, RowStore rows, KeptRows kept, int64_t sequences)
    : options_(like.options_),
      budget_(like.budget_),
      pool_(like.pool_),
      rows_(std::move(rows)),
      kept_(std::move(kept)),
      layers_(like.layers_),
      lengths_(static_cast<size_t>(sequences), 0),
      marks_(static_cast<size_t>(sequences)),
      room_(sequences),
      recent_(like.recent_),
      tail_(like.tail_),
      refill_(like.refill_),
      looked_at_(like.looked_at_) {}

// A state of the one sequence, which shares its rows and has recurrent slots and tails of its own, those of the mark (zeros without one). It takes no marks
// and lives shorter than a call: no budget counts it.
State State::one_sequence(int64_t n, const Mark* from) const {
  State one(Empty{}, *this, rows_.view(n), kept_.view(n), 1);
  one.options_.ring = one.options_.checkpoint_every = 0;
  one.lengths_[0] = from != nullptr ? from->length : 0;
  size_t at = 0;
  for (auto& layer : one.layers_) {
    for (auto& [name, slot] : layer.slots_) {
      slot.recent = at::Tensor();
      if (slot.spec.kind == SlotKind::kPerToken) continue;
      slot.data = from != nullptr ? from->page->values[at++].unsqueeze(0).clone() : at::zeros_like(slot.data.narrow(0, n, 1));
    }
  }
  return one;
}

State State::fork(const std::vector<int64_t>& from) const {
  for (const int64_t n : from) TORCH_CHECK(n >= 0 && n < sequences(), "state: fork of sequence ", n, " of ", sequences());
  TORCH_CHECK(!from.empty(), "state: a fork of no sequence");
  Charge charge(budget_, static_cast<int64_t>(from.size()) * fixed_bytes());
  State fork(Empty{}, *this, rows_.fork(from, lengths_), kept_.fork(from), static_cast<int64_t>(from.size()));
  fork.charge_ = std::move(charge);
  // Copies together: on a GPU a launch for each slot takes the host longer than a text of few tokens is read.
  ops::Copies copies;
  for (auto& layer : fork.layers_) {
    for (auto& [name, slot] : layer.slots_) {
      for (at::Tensor* tensor : {&slot.data, &slot.recent}) {
        if (!tensor->defined()) continue;
        std::vector<int64_t> shape = tensor->sizes().vec();
        shape[0] = static_cast<int64_t>(from.size());
        const at::Tensor own = std::exchange(*tensor, at::empty(shape, tensor->options()));
        for (size_t j = 0; j < from.size(); ++j) copies.add_rows(*tensor, static_cast<int64_t>(j), own, from[j], 1);
      }
    }
  }
  copies.run();
  for (size_t j = 0; j < from.size(); ++j) {
    fork.lengths_[j] = lengths_[static_cast<size_t>(from[j])];
    fork.marks_[j] = marks_[static_cast<size_t>(from[j])];
  }
  return fork;
}

State State::snapshot() const {
  std::vector<int64_t> all(lengths_.size());
  std::iota(all.begin(), all.end(), 0);
  return fork(all);
}

void State::adopt(int64_t n, int64_t length, const State& one) {
  std::vector<at::Tensor> values;
  one.for_each_fixed([&](const LayerState::Slot& slot) { values.push_back(slot.data[0]); });
  size_t at = 0;
  for_each_fixed([&](const LayerState::Slot& slot) { slot.data[n].copy_(values[at++]); });
  forget(n, length);
}

// Sequence n ends at `length`, whose recurrent slots and tails stand in their places.
void State::forget(int64_t n, int64_t length) {
  lengths_[static_cast<size_t>(n)] = length;
  rows_.trim(n, length);
  kept_.trim(n, length);
  Marks& m = marks_[static_cast<size_t>(n)];
  for (auto* marks : {&m.checkpoints, &m.ring}) {
    while (!marks->empty() && marks->back().length > length) marks->pop_back();
  }
  // Without one, checkpoints count from the start, or from here where rows before are gone.
  m.last_checkpoint = !m.checkpoints.empty() ? m.checkpoints.back().length : rows_.from(n) > 0 ? std::min(m.last_checkpoint, length) : 0;
  if (options_.ring > 0 && !tails_in_ring(n, length)) restart_ring(n);
}

void State::refuse_trim(int64_t sequence, int64_t length) const {
  const int64_t held = lengths_[static_cast<size_t>(sequence)], nearest = reachable(sequence, length), from = rows_.from(sequence);
  const bool marks = options_.ring > 0 || options_.checkpoint_every > 0;
  if (!rows_determine()) {
    fail(
        "cannot trim to {} of {} tokens: a layer keeps no rows to replay, so that only checkpoints can be reached, the "
        "nearest one below at {}; {}",
        length, held, nearest, way_out(marks));
  }
  if (kept_.on() && !kept_.holds(sequence, length)) {
    fail(
        "cannot trim to {} of {} tokens: rows that were kept there were dropped since for more surprising ones, the nearest position below that can be reached is {}; hold "
        "such rows for longer (back), or keep all rows",
        length, held, nearest);
  }
  fail(
      "cannot trim to {} of {} tokens: the rows of tokens {} to {} were dropped, the nearest position below that can be reached is {}; keep more rows behind "
      "the window (back) and checkpoints among them (checkpoint_every), or all rows",
      length, held, options_.bound.first, from - 1, nearest);
}

void State::trim(int64_t sequence, int64_t length, const Replay& model) {
  TORCH_CHECK(sequence >= 0 && sequence < sequences(), "state: sequence ", sequence, " of ", sequences());
  const int64_t held = lengths_[static_cast<size_t>(sequence)];
  if (length < 0 || length > held)
    fail("cannot trim to {} tokens: the sequence holds {}, expected 0 to {}", length, held, held);
  if (length == held) return;
  const std::optional<Way> way = way_to(sequence, length);
  if (!way) refuse_trim(sequence, length);
  const int64_t scanned = way->scanned;
  State one = one_sequence(sequence, way->mark);
  if (one.lengths_[0] == length) {
    one.rows_.trim(0, 0);  // what is let go is nobody else's then
    return adopt(sequence, length, one);
  }
  model.scan(one, one.lengths_[0], scanned);
  one.lengths_[0] = scanned;
  if (way->tails_in_ring) {
    read_tails(sequence, length, one);
  } else if (scanned < length) {
    // The tokens before the refilled ones are not to be seen through the tails of another place.
    one.for_each_fixed([](const LayerState::Slot& slot) {
      if (slot.spec.kind == SlotKind::kTail) slot.data.zero_();
    });
    model.refill(one, length);
  }
  one.rows_.trim(0, 0);
  adopt(sequence, length, one);
}

// ---- the ring of convolution inputs ----

void State::record(int64_t i, const std::string& name, const at::Tensor& inputs,
                   const std::vector<int64_t>* cu_seqlens) {
  const auto it = layers_[static_cast<size_t>(i)].slots_.find(name);
  TORCH_CHECK(it != layers_[static_cast<size_t>(i)].slots_.end(), "state: no slot '", name, "' in layer ", i);
  const at::Tensor& recent = it->second.recent;
  if (!recent.defined()) return;
  const int64_t size = recent.size(1);
  for (int64_t n = 0; n < sequences(); ++n) {
    const int64_t begin = cu_seqlens != nullptr ? (*cu_seqlens)[n] : 0;
    const int64_t end = cu_seqlens != nullptr ? (*cu_seqlens)[n + 1] : inputs.size(1);
    const at::Tensor row = inputs[cu_seqlens != nullptr ? 0 : n];
    // Runs of the circle, at most two: what a device copies without an index.
    for (int64_t t = std::max(begin, end - size); t < end;) {
      const int64_t slot = (lengths_[n] + t - begin) % size, run = std::min(end - t, size - slot);
      recent[n].narrow(0, slot, run).copy_(row.narrow(0, t, run));
      t += run;
    }
  }
}

void State::read_tails(int64_t n, int64_t length, State& one) const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    for (const auto& [name, slot] : layers_[i].slots_) {
      if (slot.spec.kind != SlotKind::kTail) continue;
      const at::Tensor tail = one.layers_[i].slots_.at(name).data[0];  // [C, w - 1]
      const int64_t width = slot.spec.shape[1];
      for (int64_t j = 0; j < width; ++j) {
        const int64_t t = length - width + j;
        t < 0 ? tail.select(1, j).zero_() : tail.select(1, j).copy_(slot.recent[n][t % slot.recent.size(1)]);
      }
    }
  }
}

// The ring of inputs holds what the tails hold, and nothing before it.
void State::restart_ring(int64_t n) {
  const int64_t length = lengths_[static_cast<size_t>(n)];
  for_each_fixed([&](const LayerState::Slot& slot) {
    if (slot.spec.kind != SlotKind::kTail) return;
    const int64_t width = slot.spec.shape[1];
    for (int64_t j = 0; j < width; ++j) {
      const int64_t t = length - width + j;
      if (t >= 0) slot.recent[n][t % slot.recent.size(1)].copy_(slot.data[n].select(1, j));
    }
  });
  marks_[static_cast<size_t>(n)].recent_from = std::max<int64_t>(0, length - tail_);
}

}  // namespace oryx
