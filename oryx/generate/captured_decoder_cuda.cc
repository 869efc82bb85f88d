// Captured decoding: the FusedDecoder of the models that the fused kernels do not know, over the chain of captured_chain_cuda.h.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "oryx/common/error.h"
#include "oryx/generate/capture_graph_cuda.h"
#include "oryx/generate/captured_chain_cuda.h"
#include "oryx/generate/captured_decoder.h"
#include "oryx/generate/fused_chain_cuda.h"
#include "oryx/ops/cuda/launch.h"

namespace oryx::captured {
namespace {

class CapturedDecoder : public FusedDecoder {
 public:
  CapturedDecoder(const LanguageModel& model, State& state, int64_t tokens)
      : model_(model), state_(state), N_(state.sequences()), layers_(model.config().num_layers), capacity_(tokens), vocab_(model.config().vocab_size), chain_(model, N_) {
    const auto ints = at::device(model.device()).dtype(at::kInt);
    tokens_ = at::zeros({N_}, ints), positions_ = at::zeros({N_}, ints), lengths_ = at::ones({N_}, ints), likeliest_ = at::zeros({N_}, ints), feed_back_ = at::zeros({1}, ints);
    below_ = at::full({N_}, vocab_, ints);
    modes_ = at::zeros({chain_.mode_bytes(N_)}, ints.dtype(at::kByte));
  }

  bool fits() override {
    state_.prepare(std::vector<int64_t>(static_cast<size_t>(N_), 1));
    const int64_t i = first_with_rows();
    if (i < 0) return true;
    // A copy has another address each time. All slots have the same pages.
    const at::Tensor once = rows(i, "keys");
    return once.data_ptr() == rows(i, "keys").data_ptr();
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
    state_.prepare(std::vector<int64_t>(static_cast<size_t>(N_), 1));
    if (slots_.empty() || moved()) {
      TORCH_CHECK(fits(), "captured decoder: the rows of the state do not lie side by side");
      attach();
    }
    if (state_.lengths() != expected_) place_sequences();
    if (!ids.empty()) tokens_.copy_(at::tensor(ids, at::kInt), /*non_blocking=*/true);
    if (modes != host_modes_) {
      host_modes_ = std::move(modes);
      modes_.copy_(at::tensor(host_modes_, at::kByte), /*non_blocking=*/true);
    }
    std::unique_ptr<ops::cuda::CapturedGraph>& graph = graphs_[looks_back ? 1 : 0];
    if (graph == nullptr) graph = fused::capture_graph(model_.device(), [&] { chain_.launch(chain_step(), looks_back); });
    graph->replay();
    fed_back_ = feeds_back_;
    state_.advance(std::vector<int64_t>(static_cast<size_t>(N_), 1));
    expected_ = state_.lengths();
    return chain_.logits(N_);
  }

  at::Tensor likeliest() const override { return likeliest_; }

  void feed_back(bool on, int64_t below) override {
    below_.fill_(below > 0 ? std::min(below, vocab_) : vocab_);
    feeds_back_ = on;
    feed_back_.fill_(on ? 1 : 0);
  }

  int64_t weight_bytes(int64_t place) const override { return chain_.weight_bytes(place); }

 private:
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
      TORCH_CHECK(!here || state_.layer(i).has("keys"), "captured decoder: layer ", i, " is to look back and keeps no rows");
      looks_back |= here;
    }
    return out;
  }

  // Rows to write into. A state whose pages do not lie side by side hands out copies.
  at::Tensor rows(int64_t i, const std::string& name) const { return state_.rows(i, name, capacity_); }
  int64_t first_with_rows() const {
    for (int64_t i = 0; i < layers_; ++i) {
      if (state_.layer(i).has("keys")) return i;
    }
    return -1;
  }

  // Whether the captures point to other places than the state's.
  bool moved() const {
    if (const int64_t i = first_with_rows(); i >= 0 && rows(i, "keys").data_ptr() != slots_[static_cast<size_t>(i)].keys.data_ptr()) return true;
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
    id_rows_ = state_.layer(layers_).has("ids") ? rows(layers_, "ids") : at::Tensor();
    place_sequences();
    chain_.allocate(chain_step());
  }

  Step chain_step() const {
    const auto ints = [](const at::Tensor& t) { return t.mutable_data_ptr<int32_t>(); };
    Step s;
    s.N = N_, s.capacity = capacity_, s.slots = &slots_, s.id_rows = id_rows_;
    s.tokens = ints(tokens_), s.positions = ints(positions_), s.lengths = ints(lengths_), s.likeliest = ints(likeliest_), s.below = ints(below_), s.feed_back = ints(feed_back_);
    s.modes = modes_.const_data_ptr<uint8_t>();
    return s;
  }

  const LanguageModel& model_;
  State& state_;
  int64_t N_, layers_, capacity_, vocab_;
  bool feeds_back_ = false, fed_back_ = false;
  Chain chain_;
  at::Tensor tokens_, positions_, lengths_, likeliest_, feed_back_, below_, modes_, id_rows_;
  std::vector<Slots> slots_;
  std::vector<uint8_t> host_modes_;
  std::vector<int64_t> expected_;  // lengths that the device counts with
  std::unique_ptr<ops::cuda::CapturedGraph> graphs_[2];  // of steps in which nobody looks back, and of all others
};

std::unique_ptr<FusedDecoder> make_captured(const LanguageModel& model, State& state, int64_t tokens, std::string* why) {
  *why = fused::device_refusal(model.device());
  if (why->empty()) *why = refusal(model);
  if (why->empty() && state.row_bound().on()) *why = "the state keeps some tokens' rows alone (a bounded one)";
  if (why->empty() && state.options().ring > 0) *why = "the state keeps a ring of convolution inputs";
  if (why->empty() && state.sequences() > Chain::kMost) *why = fmt::format("{} sequences, expected at most {}", state.sequences(), Chain::kMost);
  if (!why->empty()) return nullptr;
  return std::make_unique<CapturedDecoder>(model, state, tokens);
}

const bool registered_captured = detail::register_captured_decoder(make_captured);

}  // namespace
}  // namespace oryx::captured
