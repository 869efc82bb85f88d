// Sequences that join and leave a batch: side by side in a new state.
#include <ATen/ATen.h>

#include "oryx/state/state.h"

namespace oryx {

State State::regroup(std::vector<State> sources, const std::vector<std::pair<size_t, int64_t>>& picks) {
  TORCH_CHECK(!sources.empty() && !picks.empty(), "state: ", picks.size(), " sequences of ", sources.size(), " states");
  bool same = sources.size() == 1 && static_cast<int64_t>(picks.size()) == sources[0].sequences();
  for (size_t j = 0; j < picks.size() && same; ++j) same = picks[j].second == static_cast<int64_t>(j);
  if (same) return std::move(sources[0]);
  const State& like = sources[0];
  for (const State& s : sources) {
    TORCH_CHECK(s.budget_ == like.budget_ && s.pool_ == like.pool_, "state: regroup of states that were not forked from one");
    TORCH_CHECK(!s.kept_.on(), "state: regroup of states with rows kept by choice");
  }
  const auto N = static_cast<int64_t>(picks.size());
  RowStore rows(0, like.budget_, like.options_.device, like.rows_.page_tokens(), like.rows_.bound());
  for (const auto& [source, n] : picks) rows.take(sources[source].rows_, n);
  State out(Empty{}, like, std::move(rows), like.kept_.fork(std::vector<int64_t>(picks.size(), 0)), N);
  // The old slots go with the sources: for a moment both stand, but no more sequences than before are charged for.
  for (State& s : sources) s.charge_ = Charge();
  out.charge_ = Charge(like.budget_, N * like.fixed_bytes());
  for (size_t i = 0; i < out.layers_.size(); ++i) {
    for (auto& [name, slot] : out.layers_[i].slots_) {
      const auto gathered = [&](at::Tensor LayerState::Slot::*member) {
        if (!(slot.*member).defined()) return at::Tensor();
        std::vector<at::Tensor> parts;
        for (const auto& [source, n] : picks) parts.push_back((sources[source].layers_[i].slots_.at(name).*member).narrow(0, n, 1));
        return at::cat(parts);
      };
      const at::Tensor data = gathered(&LayerState::Slot::data), recent = gathered(&LayerState::Slot::recent);
      slot.data = data;
      slot.recent = recent;
    }
  }
  for (size_t j = 0; j < picks.size(); ++j) {
    State& source = sources[picks[j].first];
    const auto n = static_cast<size_t>(picks[j].second);
    TORCH_CHECK(source.lengths_[n] >= 0, "state: sequence ", n, " is picked twice");
    out.lengths_[j] = std::exchange(source.lengths_[n], -1);
    out.marks_[j] = std::move(source.marks_[n]);
  }
  return out;
}

}  // namespace oryx
