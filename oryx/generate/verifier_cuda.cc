// The captured pass over a few tokens of one sequence: the chain of fused_chain_cuda.h, whose rows are then the tokens, with the kernels of cuda/decode_verify.h between its products.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "oryx/common/error.h"
#include "oryx/generate/capture_graph_cuda.h"
#include "oryx/generate/cuda/decode_verify.h"
#include "oryx/generate/fused_chain_cuda.h"
#include "oryx/generate/verifier.h"
#include "oryx/ops/cuda/launch.h"

namespace oryx::fused {
namespace {

using ops::cuda::check;
using ops::cuda::stream_of;

class CudaVerifier : public DraftVerifier {
 public:
  CudaVerifier(const LanguageModel& model, State& state, int64_t tokens)
      : model_(model), state_(state), layers_(model.config().num_layers), capacity_(tokens), vocab_(model.config().vocab_size), H_(model.layer(0).config().num_heads), chain_(model, kOryxVerifyMost) {
    const auto ints = at::device(model.device()).dtype(at::kInt);
    numbers_ = at::zeros({3, kOryxVerifyMost}, ints);  // tokens, positions, lengths
    likeliest_ = at::zeros({kOryxVerifyMost}, ints);
    below_ = at::full({kOryxVerifyMost}, vocab_, ints);
    modes_ = at::zeros({layers_ * kOryxVerifyMost}, ints.dtype(at::kByte));
    // Of each layer what keep() goes by.
    const int64_t D = H_ * 128;
    left_ = at::empty({layers_, 4, kOryxVerifyMost, D}, ints.dtype(at::kBFloat16));  // k, v, and the convolutions' inputs side by side
    scalars_ = at::empty({layers_, 2, kOryxVerifyMost, H_}, ints.dtype(at::kFloat));
    table_ = at::empty({layers_ * static_cast<int64_t>(sizeof(OryxVerifyLayer))}, ints.dtype(at::kByte));
  }

  int64_t most() const override { return kOryxVerifyMost; }

  bool fits(int64_t tokens) override {
    state_.prepare({tokens});
    const int64_t i = first_with_rows();
    if (i < 0) return true;
    const at::Tensor once = rows(i, "keys");  // a copy has another address each time
    return once.data_ptr() == rows(i, "keys").data_ptr();
  }

  at::Tensor run(const std::vector<int32_t>& ids, const std::vector<std::shared_ptr<const Routing>>& routing) override {
    const at::NoGradGuard no_grad;
    const c10::cuda::CUDAGuard guard(model_.device());
    const auto T = static_cast<int64_t>(ids.size());
    const int64_t length = state_.lengths()[0];
    TORCH_CHECK(T >= 2 && T <= kOryxVerifyMost && length + T <= capacity_, "draft verifier: ", T, " tokens behind ", length, ", made for 2 to ", int{kOryxVerifyMost}, " and ", capacity_, " in all");
    for (const int32_t id : ids) {
      if (id < 0 || id >= vocab_) fail("token id {} is outside of the model's vocabulary of {}; was the text encoded with another tokeniser?", id, vocab_);
    }
    bool looks_back = false;
    const at::Tensor modes = modes_of(routing, T, looks_back);
    state_.prepare({T});
    if (slots_.empty() || moved()) {
      TORCH_CHECK(fits(T), "draft verifier: the rows of the state do not lie side by side");
      attach();
    }
    const at::Tensor host = at::zeros({3, kOryxVerifyMost}, at::device(at::kCPU).dtype(at::kInt).pinned_memory(true));
    int32_t* const numbers = host.mutable_data_ptr<int32_t>();
    for (int64_t t = 0; t < T; ++t) {
      numbers[t] = ids[static_cast<size_t>(t)];
      numbers[kOryxVerifyMost + t] = static_cast<int32_t>(length + t);
      numbers[2 * kOryxVerifyMost + t] = static_cast<int32_t>(length + t + 1);
    }
    numbers_.copy_(host, /*non_blocking=*/true);
    modes_.narrow(0, 0, modes.numel()).copy_(modes, /*non_blocking=*/true);
    auto& graph = graphs_[static_cast<size_t>(T)][looks_back ? 1 : 0];
    if (graph == nullptr) {
      if (looks_back) chain_.allocate(step_of(kOryxVerifyMost));
      graph = capture_graph(model_.device(), [&] { chain_.launch(step_of(T), looks_back); });
    }
    graph->replay();
    pending_ = T;
    return chain_.logits(T);
  }

  void keep(int64_t count) override {
    const c10::cuda::CUDAGuard guard(model_.device());
    TORCH_CHECK(count >= 1 && count <= pending_, "draft verifier: to keep ", count, " of ", pending_, " tokens");
    check("oryx_verify_keep", oryx_verify_keep(static_cast<const OryxVerifyLayer*>(table_.data_ptr()), layers_, H_, count, stream_of(numbers_)));
    pending_ = 0;
    state_.advance({count});
  }

 private:
  // [layers, T] bytes: 0 linear, 1 attention.
  at::Tensor modes_of(const std::vector<std::shared_ptr<const Routing>>& routing, int64_t T, bool& looks_back) const {
    TORCH_CHECK(routing.size() == 1 || static_cast<int64_t>(routing.size()) == layers_, "draft verifier: ", routing.size(), " routings for ", layers_, " layers");
    at::Tensor out = at::empty({layers_ * T}, at::device(at::kCPU).dtype(at::kByte).pinned_memory(true));
    auto* const modes = out.mutable_data_ptr<uint8_t>();
    for (int64_t i = 0; i < layers_; ++i) {
      const Routing& r = *routing[routing.size() == 1 ? 0 : static_cast<size_t>(i)];
      TORCH_CHECK(r.rows() == 1 && r.length() == T, "draft verifier: the routing is of another batch shape");
      const MultiMixerLayer& layer = model_.layer(i);
      layer.check_past(r, state_);
      const at::Tensor& places = r.places(layer.mixer_names());
      for (int64_t t = 0; t < T; ++t) looks_back |= chain_.write_modes(modes, T, i, t, static_cast<uint8_t>(places.const_data_ptr<int8_t>()[t]));
    }
    return out;
  }

  at::Tensor rows(int64_t i, const std::string& name) const { return state_.rows(i, name, capacity_); }
  int64_t first_with_rows() const {
    for (int64_t i = 0; i < layers_; ++i) {
      if (state_.layer(i).has("keys")) return i;
    }
    return -1;
  }
  const void* address_of_rows() const {
    const int64_t i = first_with_rows();
    return i < 0 ? nullptr : rows(i, "keys").data_ptr();
  }
  bool moved() const {
    if (address_of_rows() != rows_at_) return true;
    for (int64_t i = 0; i < layers_; ++i) {
      if (chain_.moved(state_.layer(i), i, slots_[static_cast<size_t>(i)])) return true;
    }
    return false;
  }

  void attach() {
    for (auto& both : graphs_) both[0].reset(), both[1].reset();
    slots_.clear(), verify_.clear();
    for (int64_t i = 0; i < layers_; ++i) {
      slots_.push_back(chain_.slots_of(state_.layer(i), i, [&](const std::string& name) { return rows(i, name); }));
      const LayerSlots& l = slots_.back();
      TORCH_CHECK(!l.keys.defined() || (l.keys.is_contiguous() && l.values.is_contiguous()), "draft verifier: rows of an odd layout");
      const at::Tensor left = left_[i], scalars = scalars_[i];
      verify_.push_back({pointer<float>(l.S), l.k_tail.data_ptr(), l.v_tail.data_ptr(), left[0].data_ptr(), left[1].data_ptr(), left[2].data_ptr(), pointer<float>(scalars[0]),
                         pointer<float>(scalars[1])});
    }
    rows_at_ = address_of_rows();
    id_rows_ = state_.layer(layers_).has("ids") ? rows(layers_, "ids") : at::Tensor();
    const at::Tensor host = at::empty({table_.numel()}, at::kByte);
    std::memcpy(host.mutable_data_ptr(), verify_.data(), static_cast<size_t>(table_.numel()));
    table_.copy_(host);
  }

  GatedDeltaStack::Step step_of(int64_t T) const {
    GatedDeltaStack::Step s;
    s.N = T, s.capacity = capacity_, s.slots = &slots_, s.id_rows = id_rows_, s.verify = &verify_;
    int32_t* numbers = pointer<int32_t>(numbers_);
    s.tokens = numbers, s.positions = numbers + kOryxVerifyMost, s.lengths = numbers + 2 * kOryxVerifyMost, s.likeliest = pointer<int32_t>(likeliest_);
    s.below = pointer<int32_t>(below_), s.modes = pointer<uint8_t>(modes_);
    return s;
  }

  const LanguageModel& model_;
  State& state_;
  int64_t layers_, capacity_, vocab_, H_, pending_ = 0;
  DecodeChain chain_;
  at::Tensor numbers_, likeliest_, below_, modes_, left_, scalars_, table_, id_rows_;
  const void* rows_at_ = nullptr;
  std::vector<LayerSlots> slots_;
  std::vector<OryxVerifyLayer> verify_;
  std::array<std::array<std::unique_ptr<ops::cuda::CapturedGraph>, 2>, kOryxVerifyMost + 1> graphs_;  // by tokens, without and with what those need that look back
};

std::unique_ptr<DraftVerifier> make_cuda_verifier(const LanguageModel& model, State& state, int64_t tokens, std::string* why) {
  *why = device_refusal(model.device());
  if (why->empty()) *why = DecodeChain::refusal(model);
  if (why->empty() && state.row_bound().on()) *why = "the state keeps some tokens' rows alone";
  if (why->empty() && model.config().num_layers > 65535) *why = "too many layers";
  if (!why->empty()) return nullptr;
  return std::make_unique<CudaVerifier>(model, state, tokens);
}

const bool verifier_registered = detail::register_draft_verifier(make_cuda_verifier);

}  // namespace
}  // namespace oryx::fused
