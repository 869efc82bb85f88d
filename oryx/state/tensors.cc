// A state as named tensors, and back.
#include <ATen/ATen.h>
#include <fmt/format.h>

#include "oryx/state/state.h"

namespace oryx {

std::vector<std::vector<int64_t>> State::checkpoints() const {
  std::vector<std::vector<int64_t>> all;
  for (const Marks& m : marks_) {
    all.emplace_back();
    for (const Mark& mark : m.checkpoints) all.back().push_back(mark.length);
  }
  return all;
}

std::vector<std::pair<std::string, at::Tensor>> State::tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (int64_t n = 0; n < sequences(); ++n) {
    const RowStore rows = rows_.view(n);
    const int64_t length = lengths_[static_cast<size_t>(n)];
    const Marks& m = marks_[static_cast<size_t>(n)];
    size_t fixed = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
      for (const auto& [name, slot] : layers_[i].slots_) {
        const std::string full = fmt::format("{}.{}", i, name);
        if (slot.rows >= 0) {
          out.emplace_back(fmt::format("sequence{}.{}", n, full), rows.read(slot.rows, length)[0]);
          continue;
        }
        out.emplace_back(fmt::format("sequence{}.{}", n, full), slot.data[n]);
        for (size_t k = 0; k < m.checkpoints.size(); ++k) out.emplace_back(fmt::format("sequence{}.checkpoint{}.{}", n, k, full), m.checkpoints[k].values[fixed]);
        ++fixed;
      }
    }
  }
  return out;
}

void State::assign(const std::vector<int64_t>& lengths, const std::vector<std::vector<int64_t>>& checkpoints,
                   const std::function<at::Tensor(const std::string& name, const SlotSpec& spec, int64_t rows)>& get) {
  TORCH_CHECK(lengths.size() == lengths_.size() && checkpoints.size() == lengths_.size(), "state: ", lengths.size(), " lengths for ", lengths_.size());
  TORCH_CHECK(std::all_of(lengths_.begin(), lengths_.end(), [](int64_t length) { return length == 0; }), "state: only a fresh one takes over tensors");
  rows_.make_room(lengths_, lengths, /*exact=*/true);
  for (int64_t n = 0; n < sequences(); ++n) {
    Marks& m = marks_[static_cast<size_t>(n)];
    for (const int64_t at : checkpoints[static_cast<size_t>(n)]) {
      m.checkpoints.push_back({at, {}, std::make_shared<Charge>(budget_, mark_bytes(SlotKind::kRecurrent) + mark_bytes(SlotKind::kTail))});
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
      for (auto& [name, slot] : layers_[i].slots_) {
        const std::string full = fmt::format("{}.{}", i, name);
        const at::Tensor x = get(fmt::format("sequence{}.{}", n, full), slot.spec, slot.rows >= 0 ? lengths[static_cast<size_t>(n)] : -1);
        if (slot.rows >= 0) {
          rows_.write(slot.rows, n, 0, x);
          continue;
        }
        slot.data[n].copy_(x);
        for (size_t k = 0; k < m.checkpoints.size(); ++k) m.checkpoints[k].values.push_back(get(fmt::format("sequence{}.checkpoint{}.{}", n, k, full), slot.spec, -1));
      }
    }
    lengths_[static_cast<size_t>(n)] = lengths[static_cast<size_t>(n)];
    if (options_.ring > 0) restart_ring(n);
  }
}

}  // namespace oryx
