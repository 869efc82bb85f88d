#include "oryx/state/state.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

namespace oryx {

namespace {

std::vector<int64_t> with_front(std::vector<int64_t> front, const std::vector<int64_t>& shape) {
  front.insert(front.end(), shape.begin(), shape.end());
  return front;
}

}  // namespace

int64_t SlotSpec::bytes() const {
  return std::accumulate(shape.begin(), shape.end(), static_cast<int64_t>(at::elementSize(dtype)), std::multiplies<>());
}

const at::Tensor& LayerState::tensor(const std::string& name) const {
  const auto it = slots_.find(name);
  TORCH_CHECK(it != slots_.end() && it->second.data.defined(), "state: no recurrent slot or tail '", name, "' in this layer");
  return it->second.data;
}

namespace {

// Recurrent slots and tails in the order of State::for_each_fixed.
std::vector<SlotSpec> fixed_slots(const std::vector<std::vector<SlotSpec>>& layers) {
  std::vector<SlotSpec> all;
  for (const auto& layer : layers) {
    std::map<std::string, SlotSpec> by_name;
    for (const auto& spec : layer) {
      if (spec.kind != SlotKind::kPerToken) by_name.emplace(spec.name, spec);
    }
    for (const auto& [name, spec] : by_name) all.push_back(spec);
  }
  return all;
}

// What later tokens look at, by layer.
std::vector<std::vector<SlotSpec>> looked_at_slots(const std::vector<std::vector<SlotSpec>>& layers) {
  std::vector<std::vector<SlotSpec>> all;
  for (const auto& layer : layers) {
    all.emplace_back();
    for (const auto& spec : layer) {
      if (spec.kind == SlotKind::kPerToken && spec.looked_at) all.back().push_back(spec);
    }
  }
  return all;
}

}  // namespace

State::State(const std::vector<std::vector<SlotSpec>>& layers, int64_t sequences, const StateOptions& options, int64_t refill)
    : options_(options),
      budget_(std::make_shared<ByteBudget>(options.budget)),
      rows_(sequences, budget_, options.device, options.page_tokens, options.row_bound(refill)),
      kept_(looked_at_slots(layers), sequences, options.kept, options.bound.first, options.bound.window, options.row_bound(refill).last - options.bound.window, budget_,
            options.device),
      layers_(layers.size()),
      lengths_(static_cast<size_t>(sequences), 0),
      marks_(static_cast<size_t>(sequences)),
      room_(sequences),
      refill_(refill) {
  options.validate();
  TORCH_CHECK(options.checkpoint_every >= 0 && options.ring >= 0 && options.budget >= 0, "state: checkpoints every ", options.checkpoint_every,
              " tokens, a ring of ", options.ring, ", a budget of ", options.budget);
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const auto& spec : layers[i]) {
      if (spec.kind == SlotKind::kTail) {
        tail_ = std::max(tail_, spec.shape[1]);  // layers may differ
        recent_ = options.ring + tail_;
      }
      looked_at_ |= spec.looked_at;
      const bool fresh = layers_[i].slots_.emplace(spec.name, LayerState::Slot{spec, {}, -1, {}}).second;
      TORCH_CHECK(fresh, "state: slot '", spec.name, "' is declared twice in layer ", i);
    }
  }
  charge_ = Charge(budget_, sequences * fixed_bytes());
  pool_ = std::make_shared<FixedPool>(fixed_slots(layers), budget_, options.device);
  for (auto& layer : layers_) {
    for (auto& [name, slot] : layer.slots_) {
      const SlotSpec& spec = slot.spec;
      if (spec.kind == SlotKind::kPerToken) {
        slot.rows = rows_.add(spec);
        continue;
      }
      slot.data = at::zeros(with_front({sequences}, spec.shape), at::device(options.device).dtype(spec.dtype));
      if (spec.kind == SlotKind::kTail && options.ring > 0) slot.recent = at::zeros({sequences, recent_, spec.shape[0]}, slot.data.options());
    }
  }
  if (options.row_pages > 0) rows_.make_pool(options.row_pages);
}

int64_t State::fixed_bytes() const {
  int64_t bytes = mark_bytes(SlotKind::kRecurrent) + mark_bytes(SlotKind::kTail);
  for_each_fixed([&](const LayerState::Slot& slot) {
    if (options_.ring > 0 && slot.spec.kind == SlotKind::kTail && tail_ > 0) bytes += slot.spec.shape[0] * recent_ * static_cast<int64_t>(at::elementSize(slot.spec.dtype));
  });
  return bytes;
}

at::Tensor State::lengths_tensor() const { return at::tensor(lengths_, at::kLong).to(at::kInt); }

void State::reserve(int64_t tokens) {
  std::vector<int64_t> needs(lengths_.size());
  for (size_t n = 0; n < needs.size(); ++n) needs[n] = std::max(tokens, lengths_[n]);
  rows_.make_room(lengths_, needs, /*exact=*/true);
}

void State::reserve_behind(int64_t tokens) {
  TORCH_CHECK(sequences() == 1, "state: room behind ", sequences(), " sequences");
  if (rows_.bound().on()) return reserve(tokens);
  rows_.add_room(0, tokens);
}

void State::prepare(const std::vector<int64_t>& counts) {
  TORCH_CHECK(counts.size() == lengths_.size(), "state: ", counts.size(), " counts for ", lengths_.size(), " sequences");
  std::vector<int64_t> needs(lengths_);
  int64_t marks = 0;
  for (size_t n = 0; n < counts.size(); ++n) {
    needs[n] += counts[n];
    if (counts[n] == 0) continue;
    marks += checkpoint_due(static_cast<int64_t>(n), needs[n]) ? 1 : 0;
    marks += options_.ring > 0 && static_cast<int64_t>(marks_[n].ring.size()) <= options_.ring ? 1 : 0;
  }
  kept_.check_room(lengths_, counts);
  rows_.make_room(lengths_, needs, /*exact=*/false);
  budget_->check(marks * (mark_bytes(SlotKind::kRecurrent) + mark_bytes(SlotKind::kTail)));
}

void State::append(int64_t i, const std::string& name, const at::Tensor& rows, const std::vector<int64_t>* cu_seqlens, ops::Copies* together) {
  const auto it = layers_[static_cast<size_t>(i)].slots_.find(name);
  TORCH_CHECK(it != layers_[static_cast<size_t>(i)].slots_.end() && it->second.rows >= 0, "state: no rows '", name, "' in layer ", i);
  for (int64_t n = 0; n < sequences(); ++n) {
    const int64_t begin = cu_seqlens != nullptr ? (*cu_seqlens)[n] : 0;
    const int64_t count = cu_seqlens != nullptr ? (*cu_seqlens)[n + 1] - begin : rows.size(1);
    const at::Tensor row = rows.select(0, cu_seqlens != nullptr ? 0 : n);
    rows_.write(it->second.rows, n, lengths_[n], count == row.size(0) ? row : row.narrow(0, begin, count), together);
  }
}

at::Tensor State::rows(int64_t i, const std::string& name, int64_t length) const {
  const auto it = layers_[static_cast<size_t>(i)].slots_.find(name);
  TORCH_CHECK(it != layers_[static_cast<size_t>(i)].slots_.end() && it->second.rows >= 0, "state: no rows '", name, "' in layer ", i);
  return rows_.read(it->second.rows, length);
}

at::Tensor State::rows(int64_t i, const std::string& name, const std::vector<int64_t>& begins, const std::vector<int64_t>& ends) const {
  const auto it = layers_[static_cast<size_t>(i)].slots_.find(name);
  TORCH_CHECK(it != layers_[static_cast<size_t>(i)].slots_.end() && it->second.rows >= 0, "state: no rows '", name, "' in layer ", i);
  return rows_.read(it->second.rows, begins, ends);
}

std::vector<at::Tensor> State::pools(int64_t i, const std::string& name, const RowStore::Pages& pages) const {
  const auto it = layers_[static_cast<size_t>(i)].slots_.find(name);
  TORCH_CHECK(it != layers_[static_cast<size_t>(i)].slots_.end() && it->second.rows >= 0, "state: no rows '", name, "' in layer ", i);
  return rows_.pools(it->second.rows, pages);
}

at::Tensor State::row_memory(int64_t i, const std::string& name) const {
  const auto it = layers_[static_cast<size_t>(i)].slots_.find(name);
  TORCH_CHECK(it != layers_[static_cast<size_t>(i)].slots_.end() && it->second.rows >= 0, "state: no rows '", name, "' in layer ", i);
  return rows_.memory(it->second.rows);
}

void State::advance(const std::vector<int64_t>& counts) {
  TORCH_CHECK(counts.size() == lengths_.size(), "state: ", counts.size(), " counts for ", lengths_.size(),
              " sequences");
  for (size_t n = 0; n < counts.size(); ++n) {
    if (counts[n] == 0) continue;
    lengths_[n] += counts[n];
    rows_.retire(static_cast<int64_t>(n), lengths_[n]);
    kept_.settle(static_cast<int64_t>(n), lengths_[n]);
    take_marks(static_cast<int64_t>(n));
  }
  kept_.shrink();
}

int64_t State::mark_bytes(SlotKind kind) const {
  int64_t bytes = 0;
  for (const auto& layer : layers_) {
    for (const auto& [name, slot] : layer.slots_) bytes += slot.spec.kind == kind ? slot.spec.bytes() : 0;
  }
  return bytes;
}

StateBytes State::count(bool reserved) const {
  StateBytes b;
  b.recurrent = mark_bytes(SlotKind::kRecurrent) * (reserved ? room_ : sequences());
  b.tails = mark_bytes(SlotKind::kTail) * (reserved ? room_ : sequences());
  b.tokens = reserved ? rows_.reserved_bytes() + kept_.reserved_bytes() : rows_.used_bytes(lengths_) + kept_.bytes();
  const int64_t mark = mark_bytes(SlotKind::kRecurrent) + mark_bytes(SlotKind::kTail);
  for (const auto& m : marks_) {
    b.checkpoints += mark * static_cast<int64_t>(m.checkpoints.size());
    b.ring += mark * static_cast<int64_t>(m.ring.size());
  }
  for (const auto& layer : layers_) {
    for (const auto& [name, slot] : layer.slots_)
      b.ring += slot.recent.defined() ? static_cast<int64_t>(slot.recent.nbytes()) : 0;
  }
  return b;
}

StateBytes State::bytes() const { return count(false); }
StateBytes State::reserved_bytes() const { return count(true); }

}  // namespace oryx
