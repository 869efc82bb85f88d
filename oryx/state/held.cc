// Positions to come back to at once: before a draft, and behind each token of the pass that verifies it.
#include <ATen/ATen.h>

#include "oryx/state/state.h"

namespace oryx {

void State::hold() {
  TORCH_CHECK(sequences() == 1, "state: hold of ", sequences(), " sequences");
  if (held_.marks.empty()) held_.marks.resize(1);
  held_.from = lengths_[0];
  held_.count = 1;
  take(0, held_.marks[0]);
}

void State::hold_steps(int64_t tokens) {
  TORCH_CHECK(sequences() == 1 && tokens > 0, "state: hold of ", tokens, " tokens of ", sequences(), " sequences");
  if (held_.places.empty()) {
    size_t at = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
      for (const auto& [name, slot] : layers_[i].slots_) {
        if (slot.spec.kind != SlotKind::kPerToken) held_.places[{static_cast<int64_t>(i), name}] = at++;
      }
    }
  }
  held_.from = lengths_[0] + 1;
  held_.count = tokens - 1;  // behind the last one the state itself stands
  if (static_cast<int64_t>(held_.marks.size()) < held_.count) held_.marks.resize(static_cast<size_t>(held_.count));
  for (int64_t t = 0; t < held_.count; ++t) {
    Mark& mark = held_.marks[static_cast<size_t>(t)];
    if (mark.page == nullptr) mark.page = pool_->take();
    mark.length = held_.from + t;
  }
}

void State::keep_step(int64_t i, const std::string& name, int64_t t) {
  if (t >= held_.count) return;
  const auto place = held_.places.find({i, name});
  TORCH_CHECK(place != held_.places.end(), "state: no recurrent slot or tail '", name, "' in layer ", i);
  held_.marks[static_cast<size_t>(t)].page->values[place->second].copy_(layers_[static_cast<size_t>(i)].tensor(name)[0]);
}

void State::back(int64_t length) {
  TORCH_CHECK(sequences() == 1, "state: back in ", sequences(), " sequences");
  if (length == lengths_[0]) return;
  const int64_t at = length - held_.from;
  TORCH_CHECK(at >= 0 && at < held_.count && length < lengths_[0], "state: back to ", length, " of ", lengths_[0], " tokens, held are ", held_.from, " to ", held_.from + held_.count - 1);
  TORCH_CHECK(sees_what_it_must(0, length), "state: back to ", length, " of ", lengths_[0], " tokens, of whose window rows are gone");
  size_t k = 0;
  const std::vector<at::Tensor>& values = held_.marks[static_cast<size_t>(at)].page->values;
  ops::Copies copies;
  for_each_fixed([&](const LayerState::Slot& slot) { copies.add(slot.data[0], values[k++]); });
  copies.run();
  forget(0, length);
}

}  // namespace oryx
