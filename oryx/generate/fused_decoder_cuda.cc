// The fused decoder on CUDA: one sequence by the persistent kernel of cuda/decode_step.h, several by the chain of kernels of fused_chain_cuda.h.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "oryx/common/error.h"
#include "oryx/generate/cuda/decode_step.h"
#include "oryx/generate/capture_graph_cuda.h"
#include "oryx/generate/fused_chain_cuda.h"
#include "oryx/generate/fused_decoder.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/rope/rope_rows_cuda.h"

namespace oryx {
namespace {

using fused::ChainStep;
using fused::DecodeChain;
using fused::LayerSlots;
using fused::PackedLayer;
using fused::PackedWeights;
using fused::pointer;
using ops::cuda::check;
using ops::cuda::stream_of;

class CudaDecoder : public FusedDecoder {
 public:
  CudaDecoder(const LanguageModel& model, State& state, int64_t tokens)
      : model_(model), state_(state), N_(state.sequences()), capacity_(tokens), persistent_(one_kernel(model, state)) {
    if (persistent_) {
      packed_.emplace(model, true);
    } else {
      chain_.emplace(model, N_);
    }
    const ModelConfig& c = model.config();
    const LayerConfig& layer = model.layer(0).config();
    D_ = layer.hidden_size, H_ = layer.num_heads, F_ = layer.intermediate_size, vocab_ = c.vocab_size, below_ = vocab_;
    const auto ints = at::device(model.device()).dtype(at::kInt);
    tokens_ = at::zeros({N_}, ints), positions_ = at::zeros({N_}, ints), lengths_ = at::ones({N_}, ints), likeliest_ = at::zeros({N_}, ints);
    feed_back_ = at::zeros({1}, ints);
    below_rows_ = at::full({N_}, vocab_, ints);
    modes_ = at::zeros({c.num_layers, N_}, ints.dtype(at::kByte));
    rope_ = ops::rope_rows_on(model.device(), std::max<int64_t>(capacity_, 2), layer.rope_theta, 128);
    scale_ = static_cast<float>(layer.attention_scale > 0 ? layer.attention_scale : 1 / std::sqrt(128.0));
    if (persistent_) allocate_step();
    host_modes_.assign(static_cast<size_t>(c.num_layers * N_), 0);
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
    TORCH_CHECK(static_cast<int64_t>(ids.size()) == N_ || (ids.empty() && fed_back_), "fused decoder: ", ids.size(), " ids for ", N_, " sequences");
    for (const int32_t id : ids) {
      if (id < 0 || id >= vocab_) fail("token id {} is outside of the model's vocabulary of {}; was the text encoded with another tokeniser?", id, vocab_);
    }
    for (const int64_t length : state_.lengths()) TORCH_CHECK(length < capacity_, "fused decoder: ", length + 1, " tokens, made for ", capacity_);
    const std::vector<uint8_t> modes = places(routing);
    state_.prepare(std::vector<int64_t>(static_cast<size_t>(N_), 1));
    if (graphs_[0] == nullptr || moved()) {
      TORCH_CHECK(fits(), "fused decoder: the rows of the state do not lie side by side");
      attach();
    }
    if (state_.lengths() != expected_) place_sequences();
    if (!ids.empty()) tokens_.copy_(at::tensor(ids, at::kInt), /*non_blocking=*/true);
    if (modes != host_modes_) {
      host_modes_ = modes;
      modes_.copy_(at::tensor(modes, at::kByte).view(modes_.sizes()), /*non_blocking=*/true);
    }
    graphs_[any_attends(modes) ? 1 : 0]->replay();
    fed_back_ = feeds_back_;
    state_.advance(std::vector<int64_t>(static_cast<size_t>(N_), 1));
    expected_ = state_.lengths();
    return persistent_ ? logits_ : chain_->logits(N_);
  }

  // Whether the persistent kernel knows this shape.
  static bool one_kernel(const LanguageModel& model, const State& state) {
    const LayerConfig& c = model.layer(0).config();
    return state.sequences() == 1 && c.hidden_size == c.num_heads * 128 && model.config().vocab_size % 4 == 0 &&
           oryx_decode_supports(static_cast<int32_t>(c.hidden_size), static_cast<int32_t>(c.num_heads), static_cast<int32_t>(c.intermediate_size)) != 0;
  }

  at::Tensor likeliest() const override { return likeliest_; }

  void feed_back(bool on, int64_t below) override {
    const int64_t limit = below > 0 ? std::min(below, vocab_) : vocab_;
    if (limit != below_ && persistent_) graphs_[0].reset();
    below_ = limit;
    below_rows_.fill_(limit);
    feeds_back_ = on;
    feed_back_.fill_(on ? 1 : 0);
  }

  int64_t weight_bytes(int64_t place) const override {
    (void)place;
    return persistent_ ? packed_->bytes() : chain_->weight_bytes();
  }

 private:
  // The mode of each (layer, sequence).
  std::vector<uint8_t> places(const std::vector<std::shared_ptr<const Routing>>& routing) const {
    const auto layers = static_cast<size_t>(model_.config().num_layers);
    TORCH_CHECK(routing.size() == 1 || routing.size() == layers, "fused decoder: ", routing.size(), " routings for ", layers, " layers");
    std::vector<uint8_t> out;
    for (size_t i = 0; i < layers; ++i) {
      const Routing& r = *routing[routing.size() == 1 ? 0 : i];
      TORCH_CHECK(r.rows() == N_ && r.length() == 1, "fused decoder: the routing is of another batch shape");
      const MultiMixerLayer& layer = model_.layer(static_cast<int64_t>(i));
      layer.check_past(r, state_);
      const at::Tensor& p = r.places(layer.mixer_names());
      for (int64_t n = 0; n < N_; ++n) out.push_back(static_cast<uint8_t>(p.const_data_ptr<int8_t>()[n]));
    }
    return out;
  }

  std::vector<LayerSlots> read_slots() {
    std::vector<LayerSlots> all;
    for (int64_t i = 0; i < model_.config().num_layers; ++i) {
      const LayerState& slots = state_.layer(i);
      LayerSlots s{slots.tensor("k_conv"), slots.tensor("v_conv"), slots.tensor("gated_delta_net.S"), {}, {}, {}, {}, {}};
      if (slots.has("keys")) {
        s.keys = rows(i, "keys"), s.values = rows(i, "values"), s.g = rows(i, "gated_delta_net.g"), s.beta = rows(i, "gated_delta_net.beta");
        if (slots.has("mode")) s.modes = rows(i, "mode");
      }
      all.push_back(std::move(s));
    }
    return all;
  }

  // Rows to write into. A state whose pages do not lie side by side hands out copies.
  at::Tensor rows(int64_t i, const char* name) const { return state_.rows(i, name, capacity_); }
  int64_t first_with_rows() const {
    for (int64_t i = 0; i < model_.config().num_layers; ++i) {
      if (state_.layer(i).has("keys")) return i;
    }
    return -1;
  }

  // Whether the capture points to other places than the state's.
  bool moved() const {
    if (const int64_t i = first_with_rows(); i >= 0 && rows(i, "keys").data_ptr() != slots_[static_cast<size_t>(i)].keys.data_ptr()) return true;
    for (int64_t i = 0; i < static_cast<int64_t>(slots_.size()); ++i) {
      const LayerState& now = state_.layer(i);
      const LayerSlots& s = slots_[static_cast<size_t>(i)];
      if (now.tensor("gated_delta_net.S").data_ptr() != s.S.data_ptr() || now.tensor("k_conv").data_ptr() != s.k_tail.data_ptr() ||
          now.tensor("v_conv").data_ptr() != s.v_tail.data_ptr()) {
        return true;
      }
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
    slots_ = read_slots();
    const bool has_ids = state_.layer(model_.config().num_layers).has("ids");
    ids_ = has_ids ? rows(model_.config().num_layers, "ids") : at::Tensor();
    place_sequences();
    persistent_ ? fill_table() : chain_->allocate(chain_step());
    for (auto& graph : graphs_) graph.reset();
    // A chain without the kernels of attention, for steps in which nobody attends, and one with them. The persistent kernel needs no other.
    for (const bool attention : {false, true}) {
      graphs_[attention ? 1 : 0] = fused::capture_graph(model_.device(), [&] { persistent_ ? launch_step() : chain_->launch(chain_step(), attention); });
    }
  }

  static bool any_attends(const std::vector<uint8_t>& modes) {
    return std::any_of(modes.begin(), modes.end(), [](uint8_t m) { return m != 0; });
  }

  // ---- one sequence
  void allocate_step() {
    const auto bytes = at::device(model_.device()).dtype(at::kByte);
    workspace_ = at::zeros({oryx_decode_workspace(static_cast<int32_t>(D_), static_cast<int32_t>(model_.config().num_layers))}, bytes);
    table_ = at::zeros({static_cast<int64_t>(sizeof(OryxDecodeLayer)) * model_.config().num_layers}, bytes);
    maps_ = at::zeros({2 * kOryxDecodeMapBytes * model_.config().num_layers}, bytes);
    logits_ = at::empty({1, vocab_}, bytes.dtype(at::kFloat));
  }

  void fill_table() {
    std::vector<OryxDecodeLayer> table;
    for (size_t i = 0; i < slots_.size(); ++i) {
      const PackedLayer& w = packed_->layers[i];
      const LayerSlots& s = slots_[i];
      table.push_back({w.in.data_ptr(), pointer<float>(w.narrow), w.out.data_ptr(), w.gate_up.data_ptr(), w.down.data_ptr(), pointer<float>(w.norm1), pointer<float>(w.norm2),
                       pointer<float>(w.k_conv), pointer<float>(w.v_conv), pointer<float>(w.A_log), pointer<float>(w.dt_bias), pointer<float>(w.o_norm), s.k_tail.data_ptr(),
                       s.v_tail.data_ptr(), pointer<float>(s.S), pointer<void>(s.keys), pointer<void>(s.values), pointer<float>(s.g), pointer<float>(s.beta),
                       pointer<int8_t>(s.modes)});
    }
    for (const OryxDecodeLayer& layer : table) {
      for (const void* p : {layer.k_tail, layer.v_tail, static_cast<void*>(layer.S), layer.keys, layer.values}) {
        TORCH_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, "fused decoder: a slot of the state does not begin at a multiple of 16 bytes");
      }
    }
    for (const LayerSlots& slots : slots_) {
      for (const at::Tensor& rows : {slots.keys, slots.values}) TORCH_CHECK(!rows.defined() || rows.is_contiguous(), "fused decoder: rows of an odd layout");
    }
    at::Tensor host = at::zeros({maps_.numel()}, at::kByte);
    check("oryx_decode_maps", oryx_decode_maps(table.data(), static_cast<int32_t>(table.size()), static_cast<int32_t>(D_), capacity_, host.mutable_data_ptr()));
    maps_.copy_(host);
    host = at::empty({table_.numel()}, at::kByte);
    std::memcpy(host.mutable_data_ptr(), table.data(), static_cast<size_t>(table_.numel()));
    table_.copy_(host);
  }

  void launch_step() {
    const LayerConfig& c = model_.layer(0).config();
    OryxDecodeStep a{};
    a.layers = static_cast<const OryxDecodeLayer*>(table_.data_ptr()), a.maps = maps_.data_ptr();
    a.num_layers = static_cast<int32_t>(packed_->layers.size()), a.vocab_size = static_cast<int32_t>(vocab_), a.below = static_cast<int32_t>(below_);
    a.capacity = capacity_;
    a.embed = packed_->embed.data_ptr(), a.head = packed_->head.data_ptr(), a.final_norm = pointer<float>(packed_->final_norm), a.rope = pointer<float>(rope_);
    a.token = pointer<int32_t>(tokens_), a.position = pointer<int32_t>(positions_), a.modes = pointer<uint8_t>(modes_), a.feed_back = pointer<int32_t>(feed_back_);
    a.id_rows = pointer<int32_t>(ids_), a.likeliest = pointer<int32_t>(likeliest_), a.logits = pointer<float>(logits_), a.workspace = workspace_.data_ptr();
    a.norm_eps = static_cast<float>(c.norm_eps), a.head_norm_eps = static_cast<float>(c.o_norm_eps()), a.attention_scale = scale_;
    check("oryx_decode_step", oryx_decode_step(&a, static_cast<int32_t>(D_), static_cast<int32_t>(F_), stream_of(logits_)));
  }

  // ---- several sequences
  ChainStep chain_step() const {
    ChainStep s;
    s.N = N_, s.capacity = capacity_, s.slots = &slots_, s.id_rows = ids_;
    s.tokens = pointer<int32_t>(tokens_), s.positions = pointer<int32_t>(positions_), s.lengths = pointer<int32_t>(lengths_), s.likeliest = pointer<int32_t>(likeliest_);
    s.below = pointer<int32_t>(below_rows_), s.feed_back = pointer<int32_t>(feed_back_), s.modes = pointer<uint8_t>(modes_), s.rope = pointer<float>(rope_);
    return s;
  }

  const LanguageModel& model_;
  State& state_;
  int64_t N_, capacity_, D_ = 0, H_ = 0, F_ = 0, vocab_ = 0, below_ = 0;
  bool persistent_, feeds_back_ = false, fed_back_ = false;
  std::optional<PackedWeights> packed_;  // of the persistent kernel
  std::optional<DecodeChain> chain_;     // else
  float scale_ = 0;
  at::Tensor tokens_, positions_, lengths_, likeliest_, feed_back_, below_rows_, modes_, rope_, logits_, workspace_, table_, maps_, ids_;
  std::vector<uint8_t> host_modes_;
  std::vector<LayerSlots> slots_;
  std::vector<int64_t> expected_;  // lengths that the device counts with
  std::unique_ptr<ops::cuda::CapturedGraph> graphs_[2];  // of steps in which nobody attends, and of all others
};

std::unique_ptr<FusedDecoder> make_cuda_decoder(const LanguageModel& model, State& state, int64_t tokens, std::string* why) {
  *why = fused::device_refusal(model.device());
  if (why->empty() && !CudaDecoder::one_kernel(model, state)) {
    *why = DecodeChain::refusal(model);
    if (state.sequences() > DecodeChain::kMost) *why = fmt::format("{} sequences, expected at most {}", state.sequences(), DecodeChain::kMost);
  }
  if (!why->empty()) return nullptr;
  return std::make_unique<CudaDecoder>(model, state, tokens);
}

const bool registered = detail::register_fused_decoder(make_cuda_decoder);

}  // namespace
}  // namespace oryx
