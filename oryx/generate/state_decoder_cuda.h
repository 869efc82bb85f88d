// The FusedDecoder over a chain of kernels: a step of all sequences of a state, captured once without and once with what those need that look back. What varies from token to token
// is device data: tokens, positions, modes and, of a bounded state, the pages in which rows stand.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/generate/capture_graph_cuda.h"
#include "oryx/generate/chain_step_cuda.h"
#include "oryx/generate/fused_decoder.h"
#include "oryx/ops/norm/norm.h"

namespace oryx::fused {

// A `Chain` has Slots, slots_of(), moved(), rows_name(), mode_bytes(), write_modes(), allocate(), launch(), logits() and weight_bytes() as captured::Chain, and stream() where it can give the
// sums that the final norm reads. kReadsStretches: of a bounded state it takes stretches_of() in place of a table of pages.
template <typename Chain>
class StateDecoder : public FusedDecoder {
 public:
  StateDecoder(const LanguageModel& model, State& state, int64_t tokens)
      : model_(model), state_(state), N_(state.sequences()), layers_(model.config().num_layers), capacity_(tokens), vocab_(model.config().vocab_size), chain_(model, N_),
        bounded_(state.row_bound().on()), places_(Chain::kReadsStretches ? OryxBatchPlaces{} : pages_of_bound(state)) {
    const auto ints = at::device(model.device()).dtype(at::kInt);
    tokens_ = at::zeros({N_}, ints), positions_ = at::zeros({N_}, ints), lengths_ = at::ones({N_}, ints), likeliest_ = at::zeros({N_}, ints), feed_back_ = at::zeros({1}, ints);
    below_ = at::full({N_}, vocab_, ints);
    modes_ = at::zeros({chain_.mode_bytes(N_)}, ints.dtype(at::kByte));
    if (!bounded_) return;
    if (Chain::kReadsStretches) {
      table_ = at::zeros({3}, ints);
    } else {
      table_ = at::zeros({N_, places_.most_blocks}, ints);
      places_.blocks = table_.template const_data_ptr<int32_t>();
    }
  }

  bool fits() override {
    state_.prepare(one_each());
    const auto [i, name] = kept_rows();
    if (i < 0) return true;
    const at::Tensor once = rows(i, name);
    if (bounded_) return once.defined() && (!Chain::kReadsStretches || stretches_of(state_).has_value());
    // A copy has another address each time. All slots have the same pages.
    return once.data_ptr() == rows(i, name).data_ptr();
  }

  at::Tensor step(const std::vector<int32_t>& ids, const std::vector<std::shared_ptr<const Routing>>& routing) override {
    const at::NoGradGuard no_grad;
    const c10::cuda::CUDAGuard guard(model_.device());
    TORCH_CHECK(static_cast<int64_t>(ids.size()) == N_ || (ids.empty() && fed_back_), "captured decoder: ", ids.size(), " ids for ", N_, " sequences");
    for (const int32_t id : ids) {
      if (id < 0 || id >= vocab_) fail("token id {} is outside of the model's vocabulary of {}; was the text encoded with another tokeniser?", id, vocab_);
    }
    for (const int64_t length : state_.lengths()) TORCH_CHECK(length < capacity_, "captured decoder: ", length + 1, " tokens, made for ", capacity_);
    bool looks_back = false;
    std::vector<uint8_t> modes = modes_of(routing, looks_back);
    state_.prepare(one_each());
    if (slots_.empty() || moved()) {
      TORCH_CHECK(fits(), "captured decoder: the rows of the state do not lie where it can write into them");
      attach();
    }
    place_pages();
    if (state_.lengths() != expected_) place_sequences();
    if (!ids.empty()) tokens_.copy_(at::tensor(ids, at::kInt), /*non_blocking=*/true);
    if (modes != host_modes_) {
      host_modes_ = std::move(modes);
      modes_.copy_(at::tensor(host_modes_, at::kByte), /*non_blocking=*/true);
    }
    std::unique_ptr<ops::cuda::CapturedGraph>& graph = graphs_[looks_back ? 1 : 0];
    if (graph == nullptr) graph = capture_graph(model_.device(), [&] { chain_.launch(chain_step(), looks_back); });
    graph->replay();
    fed_back_ = feeds_back_;
    state_.advance(one_each());
    expected_ = state_.lengths();
    return chain_.logits(N_);
  }

  at::Tensor hidden() const override {
    if constexpr (requires { chain_.stream(N_); }) {
      const LayerConfig& c = model_.config().layer;
      return ops::rms_norm(chain_.stream(N_), norm_factor(c, model_.parameter("final_norm.weight")), c.norm_eps).to(model_.compute_dtype());
    } else {
      TORCH_CHECK(false, "captured decoder: this one has no hidden states");
    }
  }

  at::Tensor likeliest() const override { return likeliest_; }

  void feed_back(bool on, int64_t below) override {
    below_.fill_(below > 0 ? std::min(below, vocab_) : vocab_);
    feeds_back_ = on;
    feed_back_.fill_(on ? 1 : 0);
  }

  int64_t weight_bytes(int64_t place) const override { return chain_.weight_bytes(place); }

 private:
  using Slots = typename Chain::Slots;

  std::vector<int64_t> one_each() const { return std::vector<int64_t>(static_cast<size_t>(N_), 1); }

  std::vector<uint8_t> modes_of(const std::vector<std::shared_ptr<const Routing>>& routing, bool& looks_back) const {
    TORCH_CHECK(routing.size() == 1 || static_cast<int64_t>(routing.size()) == layers_, "captured decoder: ", routing.size(), " routings for ", layers_, " layers");
    std::vector<uint8_t> out(static_cast<size_t>(modes_.numel()));
    for (int64_t i = 0; i < layers_; ++i) {
      const Routing& r = *routing[routing.size() == 1 ? 0 : static_cast<size_t>(i)];
      TORCH_CHECK(r.rows() == N_ && r.length() == 1, "captured decoder: the routing is of another batch shape");
      const MultiMixerLayer& layer = model_.layer(i);
      layer.check_past(r, state_);
      const at::Tensor& places = r.places(layer.mixer_names());
      bool here = false;
      for (int64_t n = 0; n < N_; ++n) here |= chain_.write_modes(out.data(), N_, i, n, static_cast<uint8_t>(places.const_data_ptr<int8_t>()[n]));
      TORCH_CHECK(!here || !chain_.rows_name(state_.layer(i), i).empty(), "captured decoder: layer ", i, " is to look back and keeps no rows");
      looks_back |= here;
    }
    return out;
  }

  // Rows to write into: all that may come, or the pages of a bounded state, undefined where they stand apart. An unbounded state whose pages do not lie side by side hands out copies.
  at::Tensor rows(int64_t i, const std::string& name) const { return bounded_ ? state_.row_memory(i, name) : state_.rows(i, name, capacity_); }
  std::pair<int64_t, std::string> kept_rows() const {
    for (int64_t i = 0; i < layers_; ++i) {
      if (std::string name = chain_.rows_name(state_.layer(i), i); !name.empty()) return {i, std::move(name)};
    }
    return {-1, ""};
  }
  const void* address_of_rows() const {
    const auto [i, name] = kept_rows();
    if (i < 0) return nullptr;
    const at::Tensor r = rows(i, name);
    return r.defined() ? r.data_ptr() : nullptr;
  }

  // Whether the captures point to other places than the state's.
  bool moved() const {
    if (address_of_rows() != rows_at_) return true;
    for (int64_t i = 0; i < layers_; ++i) {
      if (chain_.moved(state_.layer(i), i, slots_[static_cast<size_t>(i)])) return true;
    }
    return false;
  }

  void place_sequences() {
    const at::Tensor lengths = state_.lengths_tensor();
    positions_.copy_(lengths);
    lengths_.copy_(lengths + 1);
    expected_ = state_.lengths();
  }

  // A window's pages come and go, and move within their memory.
  void place_pages() {
    if (!bounded_ || pages_version_ == state_.pages_version()) return;
    const at::Tensor host = at::zeros(table_.sizes(), at::device(at::kCPU).dtype(at::kInt).pinned_memory(true));
    auto* row = host.mutable_data_ptr<int32_t>();
    if (Chain::kReadsStretches) {
      const auto stretches = stretches_of(state_);
      TORCH_CHECK(stretches.has_value(), "captured decoder: the rows of the state do not lie where it can write into them");
      std::copy(stretches->begin(), stretches->end(), row);
    } else {
      for (int64_t n = 0; n < N_; ++n, row += places_.most_blocks) {
        for (const RowStore::NumberedPage& page : state_.numbered_pages(n)) row[page_entry(places_, page.index)] = page.number;
      }
    }
    table_.copy_(host, /*non_blocking=*/true);
    pages_version_ = state_.pages_version();
  }

  void attach() {
    for (auto& graph : graphs_) graph.reset();
    slots_.clear();
    for (int64_t i = 0; i < layers_; ++i) {
      slots_.push_back(chain_.slots_of(state_.layer(i), i, [&](const std::string& name) {
        at::Tensor r = rows(i, name);
        TORCH_CHECK(r[0].is_contiguous(), "captured decoder: rows of an odd layout");
        return r;
      }));
    }
    rows_at_ = address_of_rows();
    id_rows_ = state_.layer(layers_).has("ids") ? rows(layers_, "ids") : at::Tensor();
    place_sequences();
    chain_.allocate(chain_step());
  }

  ChainStep<Slots> chain_step() const {
    ChainStep<Slots> s;
    s.N = N_, s.capacity = capacity_, s.slots = &slots_, s.id_rows = id_rows_;
    s.tokens = pointer<int32_t>(tokens_), s.positions = pointer<int32_t>(positions_), s.lengths = pointer<int32_t>(lengths_), s.likeliest = pointer<int32_t>(likeliest_);
    s.below = pointer<int32_t>(below_), s.feed_back = pointer<int32_t>(feed_back_), s.modes = pointer<uint8_t>(modes_), s.places = places_;
    if (bounded_) s.bound = state_.options().bound, s.stretches = Chain::kReadsStretches ? pointer<int32_t>(table_) : nullptr;
    return s;
  }

  const LanguageModel& model_;
  State& state_;
  int64_t N_, layers_, capacity_, vocab_;
  bool feeds_back_ = false, fed_back_ = false;
  Chain chain_;
  bool bounded_;
  OryxBatchPlaces places_;  // of a bounded state, where the chain reads its rows by pages
  at::Tensor tokens_, positions_, lengths_, likeliest_, feed_back_, below_, modes_, id_rows_, table_;
  int64_t pages_version_ = -1;
  const void* rows_at_ = nullptr;
  std::vector<Slots> slots_;
  std::vector<uint8_t> host_modes_;
  std::vector<int64_t> expected_;  // lengths that the device counts with
  std::unique_ptr<ops::cuda::CapturedGraph> graphs_[2];  // of steps in which nobody looks back, and of all others
};

}  // namespace oryx::fused
