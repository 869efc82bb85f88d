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
  TORCH_CHECK(it != slots_.end(), "state: no slot '", name, "' in this layer");
  return it->second.data;
}

State::State(const std::vector<std::vector<SlotSpec>>& layers, int64_t sequences, const StateOptions& options)
    : options_(options),
      layers_(layers.size()),
      lengths_(static_cast<size_t>(sequences), 0),
      marks_(static_cast<size_t>(sequences)) {
  TORCH_CHECK(options.checkpoint_every >= 0 && options.ring >= 0, "state: checkpoints every ", options.checkpoint_every,
              " tokens, a ring of ", options.ring);
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const auto& spec : layers[i]) {
      const bool per_token = spec.kind == SlotKind::kPerToken;
      const auto shape = per_token ? with_front({sequences, 0}, spec.shape) : with_front({sequences}, spec.shape);
      LayerState::Slot slot{spec, at::zeros(shape, spec.dtype), {}};
      if (spec.kind == SlotKind::kTail) {
        TORCH_CHECK(tail_ == 0 || tail_ == spec.shape[1], "state: tails of ", tail_, " and ", spec.shape[1], " tokens");
        tail_ = spec.shape[1];
        recent_ = options.ring + tail_;
        if (options.ring > 0) slot.recent = at::zeros({sequences, recent_, spec.shape[0]}, spec.dtype);
      }
      const bool fresh = layers_[i].slots_.emplace(spec.name, std::move(slot)).second;
      TORCH_CHECK(fresh, "state: slot '", spec.name, "' is declared twice in layer ", i);
    }
  }
}

at::Tensor State::lengths_tensor() const { return at::tensor(lengths_, at::kLong).to(at::kInt); }

void State::reserve(int64_t tokens) {
  if (tokens <= capacity_) return;
  const int64_t held = lengths_.empty() ? 0 : *std::max_element(lengths_.begin(), lengths_.end());
  for (auto& layer : layers_) {
    for (auto& [name, slot] : layer.slots_) {
      if (slot.spec.kind != SlotKind::kPerToken) continue;
      at::Tensor grown = at::empty(with_front({sequences(), tokens}, slot.spec.shape), slot.spec.dtype);
      if (held > 0) grown.narrow(1, 0, held).copy_(slot.data.narrow(1, 0, held));
      slot.data = grown;
    }
  }
  capacity_ = tokens;
}

void State::append(int64_t i, const std::string& name, const at::Tensor& rows, const std::vector<int64_t>* cu_seqlens) {
  auto begin = [&](int64_t n) { return cu_seqlens != nullptr ? (*cu_seqlens)[n] : 0; };
  auto count = [&](int64_t n) { return cu_seqlens != nullptr ? (*cu_seqlens)[n + 1] - begin(n) : rows.size(1); };
  // Room for every sequence before the first row is written: growing later would lose what this call wrote already.
  int64_t need = 0;
  for (int64_t n = 0; n < sequences(); ++n) need = std::max(need, lengths_[n] + count(n));
  // Growth by a quarter: appending token by token stays linear, the reserve small.
  if (need > capacity_) reserve(std::max(need, capacity_ + capacity_ / 4 + 64));
  const at::Tensor& data = layers_[static_cast<size_t>(i)].tensor(name);
  for (int64_t n = 0; n < sequences(); ++n) {
    data[n].narrow(0, lengths_[n], count(n)).copy_(rows[cu_seqlens != nullptr ? 0 : n].narrow(0, begin(n), count(n)));
  }
}

at::Tensor State::rows(int64_t i, const std::string& name, int64_t length) const {
  return layers_[static_cast<size_t>(i)].tensor(name).narrow(1, 0, length);
}

void State::advance(const std::vector<int64_t>& counts) {
  TORCH_CHECK(counts.size() == lengths_.size(), "state: ", counts.size(), " counts for ", lengths_.size(),
              " sequences");
  for (size_t n = 0; n < counts.size(); ++n) {
    if (counts[n] == 0) continue;
    lengths_[n] += counts[n];
    take_marks(static_cast<int64_t>(n));
  }
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
  const int64_t tokens =
      reserved ? capacity_ * sequences() : std::accumulate(lengths_.begin(), lengths_.end(), int64_t{0});
  b.recurrent = mark_bytes(SlotKind::kRecurrent) * sequences();
  b.tails = mark_bytes(SlotKind::kTail) * sequences();
  b.tokens = mark_bytes(SlotKind::kPerToken) * tokens;
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
