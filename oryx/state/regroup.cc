// Sequences that join and leave a batch: side by side in new states.
#include <ATen/ATen.h>

#include <utility>

#include "oryx/state/state.h"

namespace oryx {

State State::joined(std::vector<State>& sources, const std::vector<SequencePlace>& places) {
  State& like = sources[places.at(0).first];
  const auto N = static_cast<int64_t>(places.size());
  RowStore rows(0, like.budget_, like.options_.device, like.rows_.page_tokens(), like.rows_.bound());
  for (const auto& [source, n] : places) {
    State& s = sources[source];
    TORCH_CHECK(s.budget_ == like.budget_ && s.pool_ == like.pool_,
                "state: regroup of states that were not forked from one");
    TORCH_CHECK(!s.kept_.on(), "state: regroup of states with rows kept by choice");
    TORCH_CHECK(n >= 0 && n < s.sequences() && s.lengths_[static_cast<size_t>(n)] >= 0, "state: sequence ", n, " of ",
                s.sequences(), " is not there, or was taken");
    rows.take(s.rows_, n);
  }
  State out(Empty{}, like, std::move(rows), like.kept_.fork(std::vector<int64_t>(places.size(), 0)), N);
  out.charge_ = Charge(like.budget_, N * like.fixed_bytes());
  for (size_t i = 0; i < out.layers_.size(); ++i) {
    for (auto& [name, slot] : out.layers_[i].slots_) {
      for (at::Tensor LayerState::Slot::*member : {&LayerState::Slot::data, &LayerState::Slot::recent}) {
        if (!(slot.*member).defined()) continue;
        std::vector<at::Tensor> parts;
        for (const auto& [source, n] : places)
          parts.push_back((sources[source].layers_[i].slots_.at(name).*member).narrow(0, n, 1));
        slot.*member = at::cat(parts);
      }
    }
  }
  for (size_t j = 0; j < places.size(); ++j) {
    State& source = sources[places[j].first];
    const auto n = static_cast<size_t>(places[j].second);
    out.lengths_[j] = std::exchange(source.lengths_[n], -1);
    out.marks_[j] = std::move(source.marks_[n]);
  }
  return out;
}

std::vector<State> State::regroup(std::vector<State> sources, const std::vector<std::vector<SequencePlace>>& targets) {
  // Whether a target is a source as it stands.
  const auto whole = [&](const std::vector<SequencePlace>& places) {
    const size_t source = places.at(0).first;
    for (size_t j = 0; j < places.size(); ++j) {
      if (places[j] != SequencePlace(source, static_cast<int64_t>(j))) return false;
    }
    return sources[source].sequences() == static_cast<int64_t>(places.size());
  };
  std::vector<bool> moves(sources.size(), false);
  for (const auto& places : targets) moves[places.at(0).first] = moves[places.at(0).first] || whole(places);
  // The slots of the others go with them: for a moment old and new stand together, but no more sequences than before
  // are charged for.
  for (size_t i = 0; i < sources.size(); ++i) {
    if (!moves[i]) sources[i].charge_ = Charge();
  }
  std::vector<State> out;
  for (const auto& places : targets)
    out.push_back(whole(places) ? std::move(sources[places[0].first]) : joined(sources, places));
  return out;
}

}  // namespace oryx
