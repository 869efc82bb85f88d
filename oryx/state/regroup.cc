// Sequences that join and leave a batch: side by side in new states.
#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "oryx/state/state.h"

namespace oryx {

namespace {

// All memory of a slot whose tensor is its first rows.
at::Tensor with_room(const at::Tensor& data, int64_t room) {
  std::vector<int64_t> shape = data.sizes().vec();
  shape[0] = room;
  return data.as_strided(shape, data.strides(), 0);
}

}  // namespace

RowStore State::rows_of(std::vector<State>& sources, const std::vector<SequencePlace>& places) {
  const State& like = sources[places.at(0).first];
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
  return rows;
}

void State::take_histories(std::vector<State>& sources, const std::vector<SequencePlace>& places) {
  std::vector<int64_t> lengths;
  std::vector<Marks> marks;
  for (const auto& [source, n] : places) {
    lengths.push_back(std::exchange(sources[source].lengths_[static_cast<size_t>(n)], -1));
    marks.push_back(std::move(sources[source].marks_[static_cast<size_t>(n)]));
  }
  lengths_ = std::move(lengths);
  marks_ = std::move(marks);
}

State State::joined(std::vector<State>& sources, const std::vector<SequencePlace>& places) {
  State& like = sources[places.at(0).first];
  const auto N = static_cast<int64_t>(places.size());
  RowStore rows = rows_of(sources, places);
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
  out.take_histories(sources, places);
  return out;
}

State State::joined_in(size_t base, std::vector<State>& sources, const std::vector<SequencePlace>& places) {
  State& s = sources[base];
  const auto N = static_cast<int64_t>(places.size());
  RowStore rows = rows_of(sources, places);
  for (size_t i = 0; i < s.layers_.size(); ++i) {
    for (auto& [name, slot] : s.layers_[i].slots_) {
      for (at::Tensor LayerState::Slot::*member : {&LayerState::Slot::data, &LayerState::Slot::recent}) {
        if (!(slot.*member).defined()) continue;
        const at::Tensor memory = with_room(slot.*member, s.room_);
        for (int64_t j = 0; j < N; ++j) {
          const auto& [source, n] = places[static_cast<size_t>(j)];
          if (source == base && n == j) continue;
          memory[j].copy_(source == base ? memory[n] : (sources[source].layers_[i].slots_.at(name).*member)[n]);
        }
        slot.*member = memory.narrow(0, 0, N);
      }
    }
  }
  s.rows_ = std::move(rows);
  s.kept_ = s.kept_.fork(std::vector<int64_t>(places.size(), 0));
  s.take_histories(sources, places);
  return std::move(s);
}

std::optional<size_t> State::base_of(const std::vector<State>& sources,
                                     const std::vector<std::vector<SequencePlace>>& targets, size_t target) {
  const auto& places = targets[target];
  std::optional<size_t> best;
  size_t most = 0;  // sequences that stay where they are
  for (size_t s = 0; s < sources.size(); ++s) {
    if (!sources[s].options_.device.is_cpu() || sources[s].room_ < static_cast<int64_t>(places.size())) continue;
    bool possible = true;
    for (size_t k = 0; k < targets.size() && possible; ++k)
      possible = k == target || std::none_of(targets[k].begin(), targets[k].end(), [&](const auto& p) { return p.first == s; });
    size_t stay = 0;
    for (size_t j = 0; j < places.size() && possible; ++j) {
      const auto& [source, n] = places[j];
      if (source != s) continue;
      stay += n == static_cast<int64_t>(j) ? 1 : 0;
      // Who moves within the memory must not be written over before.
      possible = n == static_cast<int64_t>(j) || n >= static_cast<int64_t>(places.size());
    }
    if (possible && stay > most) best = s, most = stay;
  }
  return best;
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
  std::vector<std::optional<size_t>> bases(targets.size());  // of each target: the source that becomes it
  std::vector<bool> wholes(targets.size()), moves(sources.size(), false);
  for (size_t k = 0; k < targets.size(); ++k) {
    wholes[k] = whole(targets[k]);
    bases[k] = wholes[k] ? std::optional(targets[k][0].first) : base_of(sources, targets, k);
    if (bases[k]) moves[*bases[k]] = true;
  }
  // The slots of the others go with them: for a moment old and new stand together, but no more sequences than before
  // are charged for.
  for (size_t i = 0; i < sources.size(); ++i) {
    if (!moves[i]) sources[i].charge_ = Charge();
  }
  std::vector<State> out;
  for (size_t k = 0; k < targets.size(); ++k) {
    if (wholes[k]) {
      out.push_back(std::move(sources[*bases[k]]));
    } else {
      out.push_back(bases[k] ? joined_in(*bases[k], sources, targets[k]) : joined(sources, targets[k]));
    }
  }
  return out;
}

void State::seat(int64_t n, State one) {
  TORCH_CHECK(one.sequences() == 1 && one.budget_ == budget_ && one.pool_ == pool_, "state: a seat for a state that was not forked from this one's");
  TORCH_CHECK(lengths_[static_cast<size_t>(n)] == 0, "state: seat ", n, " is taken");
  TORCH_CHECK(!kept_.on() && options_.ring == 0 && options_.checkpoint_every == 0, "state: seats of a state with rows kept by choice or marks");
  std::vector<at::Tensor> to, from;
  for_each_fixed([&](const LayerState::Slot& slot) { to.push_back(slot.data.narrow(0, n, 1)); });
  one.for_each_fixed([&](const LayerState::Slot& slot) { from.push_back(slot.data); });
  if (!to.empty()) at::_foreach_copy_(to, from);  // a few launches on a GPU
  rows_.take(one.rows_, 0, n);
  lengths_[static_cast<size_t>(n)] = one.lengths_[0];
}

State State::unseat(int64_t n) {
  TORCH_CHECK(n >= 0 && n < sequences(), "state: seat ", n, " of ", sequences());
  Charge charge(budget_, fixed_bytes());
  RowStore rows(0, budget_, options_.device, rows_.page_tokens(), rows_.bound());
  rows.take(rows_, n);
  State one(Empty{}, *this, std::move(rows), kept_.fork({n}), 1);
  one.charge_ = std::move(charge);
  for (auto& layer : one.layers_) {
    for (auto& [name, slot] : layer.slots_) {
      if (slot.data.defined()) slot.data = slot.data.narrow(0, n, 1).clone();
    }
  }
  one.lengths_[0] = std::exchange(lengths_[static_cast<size_t>(n)], 0);
  return one;
}

void State::clear(int64_t n) {
  rows_.clear(n);
  lengths_[static_cast<size_t>(n)] = 0;
}

void State::give_back_room() {
  if (spare_sequences() == 0) return;
  for (auto& layer : layers_) {
    for (auto& [name, slot] : layer.slots_) {
      for (at::Tensor LayerState::Slot::*member : {&LayerState::Slot::data, &LayerState::Slot::recent}) {
        if ((slot.*member).defined()) slot.*member = (slot.*member).clone();
      }
    }
  }
  charge_ = Charge();
  charge_ = Charge(budget_, sequences() * fixed_bytes());
  room_ = sequences();
}

}  // namespace oryx
