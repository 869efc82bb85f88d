// The fused decoder on CUDA: one sequence by the persistent kernel of cuda/decode_step.h, several by the chain of kernels of fused_chain_cuda.h.
#include <ATen/ATen.h>

#include <cstring>

#include "oryx/generate/cuda/decode_step.h"
#include "oryx/generate/fused_chain_cuda.h"
#include "oryx/generate/state_decoder_cuda.h"
#include "oryx/ops/cuda/launch.h"

namespace oryx::fused {
namespace {

using ops::cuda::check;
using ops::cuda::stream_of;

// The persistent kernel, as StateDecoder takes a chain.
class PersistentStep : public GatedDeltaStack {
 public:
  static constexpr bool kReadsStretches = true;

  PersistentStep(const LanguageModel& model, int64_t N) : GatedDeltaStack(model), packed_(PackedWeights::of(model, /*persistent=*/true)) {
    TORCH_CHECK(N == 1, "fused decoder: the persistent kernel for ", N, " sequences");
    const LayerConfig& layer = model.layer(0).config();
    D_ = layer.hidden_size, F_ = layer.intermediate_size, vocab_ = model.config().vocab_size;
    const int64_t layers = model.config().num_layers;
    const auto bytes = at::device(model.device()).dtype(at::kByte);
    workspace_ = at::zeros({oryx_decode_workspace(static_cast<int32_t>(D_), static_cast<int32_t>(layers))}, bytes);
    table_ = at::zeros({static_cast<int64_t>(sizeof(OryxDecodeLayer)) * layers}, bytes);
    maps_ = at::zeros({2 * kOryxDecodeMapBytes * layers}, bytes);
    logits_ = at::empty({1, vocab_}, bytes.dtype(at::kFloat));
  }

  static constexpr int64_t kMostLayers = 128;  // whose modes the kernel has room for (kMaxLayers in decode_step_ring.cuh)
  // Whether the kernel knows this shape.
  static bool knows(const LanguageModel& model, const State& state) {
    const LayerConfig& c = model.layer(0).config();
    return state.sequences() == 1 && c.hidden_size == c.num_heads * 128 && model.config().vocab_size % 4 == 0 && model.config().num_layers <= kMostLayers &&
           oryx_decode_supports(static_cast<int32_t>(c.hidden_size), static_cast<int32_t>(c.num_heads), static_cast<int32_t>(c.intermediate_size)) != 0;
  }

  // The table of what each layer reads and writes.
  void allocate(const Step& s) {
    reach(s.capacity);
    std::vector<OryxDecodeLayer> table;
    for (size_t i = 0; i < s.slots->size(); ++i) {
      const PackedLayer& w = packed_->layers[i];
      const LayerSlots& l = (*s.slots)[i];
      table.push_back({w.in.data_ptr(), pointer<float>(w.narrow), w.out.data_ptr(), w.gate_up.data_ptr(), w.down.data_ptr(), pointer<float>(w.norm1), pointer<float>(w.norm2),
                       pointer<float>(w.k_conv), pointer<float>(w.v_conv), pointer<float>(w.A_log), pointer<float>(w.dt_bias), pointer<float>(w.o_norm), l.k_tail.data_ptr(),
                       l.v_tail.data_ptr(), pointer<float>(l.S), pointer<void>(l.keys), pointer<void>(l.values), pointer<float>(l.g), pointer<float>(l.beta),
                       pointer<int8_t>(l.modes)});
      for (const at::Tensor& rows : {l.keys, l.values}) TORCH_CHECK(!rows.defined() || rows.is_contiguous(), "fused decoder: rows of an odd layout");
      const OryxDecodeLayer& layer = table.back();
      for (const void* p : {layer.k_tail, layer.v_tail, static_cast<void*>(layer.S), layer.keys, layer.values}) {
        TORCH_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, "fused decoder: a slot of the state does not begin at a multiple of 16 bytes");
      }
    }
    int64_t rows = s.capacity;
    for (const LayerSlots& l : *s.slots) rows = l.keys.defined() ? l.keys.numel() / D_ : rows;
    at::Tensor host = at::zeros({maps_.numel()}, at::kByte);
    check("oryx_decode_maps", oryx_decode_maps(table.data(), static_cast<int32_t>(table.size()), static_cast<int32_t>(D_), rows, host.mutable_data_ptr()));
    maps_.copy_(host);
    host = at::empty({table_.numel()}, at::kByte);
    std::memcpy(host.mutable_data_ptr(), table.data(), static_cast<size_t>(table_.numel()));
    table_.copy_(host);
  }

  // One launch, whatever the modes.
  void launch(const Step& s, bool looks_back) const {
    (void)looks_back;
    const LayerConfig& c = model_.layer(0).config();
    OryxDecodeStep a{};
    a.layers = static_cast<const OryxDecodeLayer*>(table_.data_ptr()), a.maps = maps_.data_ptr();
    a.num_layers = static_cast<int32_t>(packed_->layers.size()), a.vocab_size = static_cast<int32_t>(vocab_), a.capacity = s.capacity;
    a.embed = packed_->embed.data_ptr(), a.head = packed_->head.data_ptr(), a.final_norm = pointer<float>(packed_->final_norm), a.rope = pointer<float>(rope_);
    a.token = s.tokens, a.position = s.positions, a.modes = s.modes, a.feed_back = s.feed_back, a.below = s.below;
    a.stretches = s.stretches, a.first = s.bound.first, a.window = s.bound.window;
    a.id_rows = pointer<int32_t>(s.id_rows), a.likeliest = s.likeliest, a.logits = pointer<float>(logits_), a.workspace = workspace_.data_ptr();
    a.norm_eps = static_cast<float>(c.norm_eps), a.head_norm_eps = static_cast<float>(c.o_norm_eps()), a.attention_scale = attention_scale();
    check("oryx_decode_step", oryx_decode_step(&a, static_cast<int32_t>(D_), static_cast<int32_t>(F_), stream_of(logits_)));
  }

  at::Tensor logits(int64_t N) const { return (void)N, logits_; }
  int64_t weight_bytes(int64_t place) const { return (void)place, packed_->bytes(); }

 private:
  int64_t D_ = 0, F_ = 0, vocab_ = 0;
  std::shared_ptr<const PackedWeights> packed_;
  at::Tensor logits_, workspace_, table_, maps_;
};

std::unique_ptr<FusedDecoder> make_cuda_decoder(const LanguageModel& model, State& state, int64_t tokens, std::string* why) {
  *why = device_refusal(model.device());
  if (!why->empty()) return nullptr;
  if (PersistentStep::knows(model, state)) return std::make_unique<StateDecoder<PersistentStep>>(model, state, tokens);
  *why = DecodeChain::refusal(model);
  if (state.sequences() > DecodeChain::kMost) *why = fmt::format("{} sequences, expected at most {}", state.sequences(), DecodeChain::kMost);
  if (!why->empty()) return nullptr;
  return std::make_unique<StateDecoder<DecodeChain>>(model, state, tokens);
}

const bool registered = detail::register_fused_decoder(make_cuda_decoder);

}  // namespace
}  // namespace oryx::fused
