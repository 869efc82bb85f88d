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

std::vector<int64_t> State::rows_from() const {
  std::vector<int64_t> all;
  for (int64_t n = 0; n < sequences(); ++n) all.push_back(rows_.from(n));
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
          const int64_t from = rows_.from(n);
          at::Tensor x = from > 0 ? at::cat({rows.read(slot.rows, options_.bound.first), rows.read(slot.rows, {from}, {length})}, 1) : rows.read(slot.rows, length);
          out.emplace_back(fmt::format("sequence{}.{}", n, full), x[0]);
          continue;
        }
        out.emplace_back(fmt::format("sequence{}.{}", n, full), slot.data[n]);
        for (size_t k = 0; k < m.checkpoints.size(); ++k) out.emplace_back(fmt::format("sequence{}.checkpoint{}.{}", n, k, full), m.checkpoints[k].page->values[fixed]);
        ++fixed;
      }
    }
    kept_.save(n, fmt::format("sequence{}.", n), out);
  }
  return out;
}

void State::assign(const std::vector<int64_t>& lengths, const std::vector<int64_t>& rows_from, const std::vector<std::vector<int64_t>>& checkpoints,
                   const std::vector<int64_t>& kept_lost, const std::function<at::Tensor(const std::string& name, const SlotSpec& spec, int64_t rows)>& get) {
  TORCH_CHECK(lengths.size() == lengths_.size() && checkpoints.size() == lengths_.size(), "state: ", lengths.size(), " lengths for ", lengths_.size());
  TORCH_CHECK(std::all_of(lengths_.begin(), lengths_.end(), [](int64_t length) { return length == 0; }), "state: only a fresh one takes over tensors");
  rows_.make_room(lengths_, lengths, /*exact=*/!rows_.bound().on());
  for (int64_t n = 0; n < sequences(); ++n) {
    Marks& m = marks_[static_cast<size_t>(n)];
    const int64_t length = lengths[static_cast<size_t>(n)], from = rows_from[static_cast<size_t>(n)];
    rows_.retire(n, length);
    TORCH_CHECK(rows_.from(n) <= from && from <= length, "state: rows from ", from, " of ", length, " tokens");
    rows_.set_from(n, from);
    for (const int64_t at : checkpoints[static_cast<size_t>(n)]) {
      m.checkpoints.push_back({at, pool_->take()});
    }
    size_t fixed = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
      for (auto& [name, slot] : layers_[i].slots_) {
        const std::string full = fmt::format("{}.{}", i, name);
        const at::Tensor x = get(fmt::format("sequence{}.{}", n, full), slot.spec, slot.rows >= 0 ? (from > 0 ? options_.bound.first + length - from : length) : -1);
        if (slot.rows >= 0) {
          const int64_t head = from > 0 ? options_.bound.first : 0;
          rows_.write(slot.rows, n, 0, x.narrow(0, 0, head));
          rows_.write(slot.rows, n, from, x.narrow(0, head, x.size(0) - head));
          continue;
        }
        slot.data[n].copy_(x);
        for (size_t k = 0; k < m.checkpoints.size(); ++k) m.checkpoints[k].page->values[fixed].copy_(get(fmt::format("sequence{}.checkpoint{}.{}", n, k, full), slot.spec, -1));
        ++fixed;
      }
    }
    if (kept_.on()) {
      kept_.load(n, length, kept_lost[static_cast<size_t>(n)], fmt::format("sequence{}.", n),
                 [&](const std::string& name, const SlotSpec& spec) { return get(name, spec, kAnyRows); });
    }
    lengths_[static_cast<size_t>(n)] = lengths[static_cast<size_t>(n)];
    m.last_checkpoint = !m.checkpoints.empty() ? m.checkpoints.back().length : from > 0 ? length : 0;
    if (options_.ring > 0) restart_ring(n);
  }
}

}  // namespace oryx
