#include "oryx/generate/fused_chain_cuda.h"

#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/rope/rope_rows_cuda.h"

namespace oryx::fused {

using ops::cuda::check;
using ops::cuda::stream_of;

std::string device_refusal(at::Device device) {
  int major = 0;
  check("fused decoder", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
  return major != 9 ? "the GPU is not a Hopper one" : "";
}

std::string DecodeChain::refusal(const LanguageModel& model) {
  const LayerConfig& c = model.layer(0).config();
  if (c.hidden_size % 32 != 0 || c.intermediate_size % 32 != 0 || model.config().vocab_size % 32 != 0) return "widths or a vocabulary that are no multiples of 32";
  return {};
}

LayerSlots GatedDeltaStack::slots_of(const LayerState& state, int64_t layer, const RowsOf& rows) const {
  (void)layer;
  LayerSlots s{state.tensor("k_conv"), state.tensor("v_conv"), state.tensor("gated_delta_net.S"), {}, {}, {}, {}, {}};
  if (!state.has("keys")) return s;
  s.keys = rows("keys"), s.values = rows("values"), s.g = rows("gated_delta_net.g"), s.beta = rows("gated_delta_net.beta");
  if (state.has("mode")) s.modes = rows("mode");
  return s;
}

bool GatedDeltaStack::moved(const LayerState& state, int64_t layer, const LayerSlots& slots) const {
  (void)layer;
  const auto other = [&](const char* name, const at::Tensor& was) { return state.tensor(name).data_ptr() != was.data_ptr(); };
  return other("gated_delta_net.S", slots.S) || other("k_conv", slots.k_tail) || other("v_conv", slots.v_tail);
}

std::string GatedDeltaStack::rows_name(const LayerState& state, int64_t layer) const {
  (void)layer;
  return state.has("keys") ? "keys" : "";
}

bool GatedDeltaStack::write_modes(uint8_t* modes, int64_t N, int64_t layer, int64_t n, uint8_t place) const {
  TORCH_CHECK(place < model_.layer(layer).mixer_names().size(), "fused decoder: mode ", int{place}, " in layer ", layer);
  modes[layer * N + n] = place;
  return place != 0;
}

void GatedDeltaStack::reach(int64_t capacity) {
  if (rope_.defined() && rope_.size(0) >= capacity) return;  // earlier captures know this one, and a longer table may stand elsewhere by now
  rope_ = ops::rope_rows_on(model_.device(), std::max<int64_t>(capacity, 2), model_.layer(0).config().rope_theta, 128);
}

float GatedDeltaStack::attention_scale() const {
  const LayerConfig& c = model_.layer(0).config();
  return static_cast<float>(c.attention_scale > 0 ? c.attention_scale : 1 / std::sqrt(128.0));
}

DecodeChain::DecodeChain(const LanguageModel& model, int64_t most) : GatedDeltaStack(model), packed_(PackedWeights::of(model, /*persistent=*/false)) {
  TORCH_CHECK(most >= 1 && most <= kMost, "fused decoder: a chain for ", most, " sequences");
  const LayerConfig& layer = model.layer(0).config();
  D_ = layer.hidden_size, H_ = layer.num_heads, F_ = layer.intermediate_size, vocab_ = model.config().vocab_size;
  const auto half = at::device(model.device()).dtype(at::kBFloat16), f32 = half.dtype(at::kFloat);
  const int64_t width = H_ * 128, rows = 8 * oryx_product_tiles(most);
  x_ = at::empty({most, D_}, f32);
  u_ = at::zeros({rows * D_}, half), y_ = at::zeros({rows * width}, half), mid_ = at::zeros({rows * F_}, half);
  narrow_ = at::empty({most, 2 * H_}, f32);
  for (at::Tensor& s : squares_) s = at::zeros({rows, (D_ / 32 + 3) / 4 * 4}, f32);
  projected_ = at::empty({most * 5 * width}, half), logits_ = at::empty({most, vocab_}, half);
}

OryxProduct DecodeChain::product_of(const Step& s, int form, const at::Tensor& weight, const at::Tensor& x, const at::Tensor& out, int64_t rows, int64_t K) const {
  OryxProduct a{};
  a.form = form, a.weight = weight.data_ptr(), a.x = x.data_ptr(), a.out = out.data_ptr();
  a.N = s.N, a.rows = rows, a.K = K, a.eps = static_cast<float>(model_.config().layer.norm_eps);
  return a;
}

void DecodeChain::run(const OryxProduct& a) const { check("oryx_product", oryx_product(&a, stream_of(u_))); }

// x_ += weight x; its norm, but for its factor, -> u_ and squares_[to]
void DecodeChain::residual(const Step& s, const at::Tensor& weight, const at::Tensor& x, int64_t K, const at::Tensor& norm_weight, size_t to) const {
  OryxProduct a = product_of(s, kOryxProductResidual, weight, x, u_, D_, K);
  a.sum = pointer<float>(x_), a.norm_weight = pointer<float>(norm_weight), a.sum_squares = pointer<float>(squares_[to]);
  run(a);
}

void DecodeChain::launch(const Step& s, bool attention) const {
  OryxBatchEmbed embed{};
  embed.embed = packed_->embed.data_ptr(), embed.tokens = s.tokens, embed.weight = pointer<float>(packed_->layers[0].norm1), embed.x = pointer<float>(x_);
  embed.out = u_.data_ptr(), embed.squares = pointer<float>(squares_[0]), embed.N = s.N, embed.D = D_, embed.tiles = static_cast<int32_t>(oryx_product_tiles(s.N));
  embed.likeliest = s.likeliest, embed.places = s.places;
  check("oryx_batch_embed", oryx_batch_embed(&embed, stream_of(u_)));
  for (size_t i = 0; i < packed_->layers.size(); ++i) {
    const PackedLayer& w = packed_->layers[i];
    // The query of attention is wanted only where a sequence is in attention.
    const bool asks = attention && w.attends;
    OryxProduct in = product_of(s, kOryxProductRows, w.in, u_, projected_, asks ? w.in_rows : 4 * H_ * 128, D_);
    in.squares = pointer<float>(squares_[0]);
    in.needed = asks ? s.modes + i * static_cast<size_t>(s.N) : nullptr, in.optional = 4 * H_ * 128;
    in.narrow_weight = w.narrow.data_ptr(), in.narrow_out = pointer<float>(narrow_), in.narrow_rows = w.narrow_rows, in.narrow = 2 * H_;
    run(in);
    s.verify != nullptr ? verify(s, i, asks ? w.in_rows : 4 * H_ * 128) : mix(s, i, asks ? w.in_rows : 4 * H_ * 128);
    if (asks && attends(s, i)) {
      const OryxDecodeAttention a = attention_of(s, i);
      check("oryx_decode_attention", oryx_decode_attention(&a, workspace_.data_ptr(), stream_of(u_)));
    }
    residual(s, w.out, y_, H_ * 128, w.norm2, 1);
    OryxProduct gate_up = product_of(s, kOryxProductSwiglu, w.gate_up, u_, mid_, 2 * F_, D_);
    gate_up.squares = pointer<float>(squares_[1]);
    run(gate_up);
    residual(s, w.down, mid_, F_, i + 1 < packed_->layers.size() ? packed_->layers[i + 1].norm1 : packed_->final_norm, 0);
  }
  OryxProduct head = product_of(s, kOryxProductRows, packed_->head, u_, logits_, vocab_, D_);
  head.squares = pointer<float>(squares_[0]);
  run(head);
  OryxBatchFinish end{};
  end.logits = logits_.data_ptr(), end.below = s.below, end.likeliest = s.likeliest, end.tokens = s.tokens, end.feed_back = s.feed_back;
  end.positions = s.positions, end.lengths = s.lengths, end.id_rows = pointer<int32_t>(s.id_rows);
  end.vocab = vocab_, end.id_sequence = s.between_sequences(s.id_rows), end.capacity = s.capacity, end.N = s.N, end.places = s.places;
  check("oryx_batch_finish", oryx_batch_finish(&end, stream_of(u_)));
}

void DecodeChain::mix(const Step& s, size_t i, int64_t row) const {
  const PackedLayer& w = packed_->layers[i];
  const LayerSlots& l = (*s.slots)[i];
  OryxBatchMix a{};
  a.projected = projected_.data_ptr(), a.narrow = pointer<float>(narrow_);
  a.k_conv = pointer<float>(w.k_conv), a.v_conv = pointer<float>(w.v_conv), a.A_log = pointer<float>(w.A_log), a.dt_bias = pointer<float>(w.dt_bias), a.o_norm = pointer<float>(w.o_norm);
  a.k_tail = l.k_tail.data_ptr(), a.v_tail = l.v_tail.data_ptr(), a.S = pointer<float>(l.S);
  a.keys = pointer<void>(l.keys), a.values = pointer<void>(l.values), a.g_rows = pointer<float>(l.g), a.beta_rows = pointer<float>(l.beta), a.mode_rows = pointer<int8_t>(l.modes);
  a.key_sequence = s.between_sequences(l.keys), a.value_sequence = s.between_sequences(l.values), a.g_sequence = s.between_sequences(l.g), a.beta_sequence = s.between_sequences(l.beta);
  a.mode_sequence = s.between_sequences(l.modes);
  a.positions = s.positions, a.modes = s.modes + i * static_cast<size_t>(s.N), a.out = y_.data_ptr();
  a.N = s.N, a.H = H_, a.row = row, a.capacity = s.capacity, a.tiles = static_cast<int32_t>(oryx_product_tiles(s.N));
  a.head_norm_eps = static_cast<float>(model_.layer(static_cast<int64_t>(i)).config().o_norm_eps());
  a.places = s.places;
  check("oryx_batch_mix", oryx_batch_mix(&a, stream_of(u_)));
}

// As mix(), of tokens of one sequence whose recurrent state and tails stay as they are.
void DecodeChain::verify(const Step& s, size_t i, int64_t row) const {
  const PackedLayer& w = packed_->layers[i];
  const LayerSlots& l = (*s.slots)[i];
  OryxVerifyMix a{};
  a.layer = (*s.verify)[i];
  a.projected = projected_.data_ptr(), a.narrow = pointer<float>(narrow_);
  a.k_conv = pointer<float>(w.k_conv), a.v_conv = pointer<float>(w.v_conv), a.A_log = pointer<float>(w.A_log), a.dt_bias = pointer<float>(w.dt_bias), a.o_norm = pointer<float>(w.o_norm);
  a.keys = pointer<void>(l.keys), a.values = pointer<void>(l.values), a.g_rows = pointer<float>(l.g), a.beta_rows = pointer<float>(l.beta), a.mode_rows = pointer<int8_t>(l.modes);
  a.positions = s.positions, a.modes = s.modes + i * static_cast<size_t>(s.N), a.out = y_.data_ptr();
  a.T = s.N, a.H = H_, a.row = row, a.capacity = s.capacity, a.tiles = static_cast<int32_t>(oryx_product_tiles(s.N));
  a.head_norm_eps = static_cast<float>(model_.layer(static_cast<int64_t>(i)).config().o_norm_eps());
  check("oryx_verify_mix", oryx_verify_mix(&a, stream_of(u_)));
}

OryxDecodeAttention DecodeChain::attention_of(const Step& s, size_t i) const {
  const PackedLayer& w = packed_->layers[i];
  const LayerSlots& l = (*s.slots)[i];
  const int64_t row = w.in_rows, width = H_ * 128, token = s.paged() ? 0 : 1;
  auto* projected = static_cast<at::BFloat16*>(projected_.data_ptr());
  OryxDecodeAttention a{};
  a.q = projected + 4 * width, a.keys = l.keys.data_ptr(), a.values = l.values.data_ptr(), a.o = y_.data_ptr();
  a.lengths = s.lengths, a.wanted = s.modes + i * static_cast<size_t>(s.N), a.rope = pointer<float>(rope_);
  a.N = s.N, a.Hq = a.Hk = H_, a.K = a.V = 128, a.capacity = s.capacity;
  a.blocks = s.places.blocks, a.page = s.places.page, a.most_blocks = s.places.most_blocks, a.lasting = s.places.lasting;
  a.window = s.bound.window, a.first = s.bound.first;
  a.key_token = l.keys.stride(token), a.key_head = l.keys.stride(token + 1), a.key_row = s.paged() ? a.page * a.key_token : l.keys.stride(0);
  a.value_token = l.values.stride(token), a.value_head = l.values.stride(token + 1), a.value_row = s.paged() ? a.page * a.value_token : l.values.stride(0);
  a.rotated = 128, a.q_row = row, a.scale = attention_scale();
  a.gate = projected + 2 * width, a.gate_row = row, a.head_norm = pointer<float>(w.o_norm);
  a.head_norm_eps = static_cast<float>(model_.layer(static_cast<int64_t>(i)).config().o_norm_eps());
  a.o_tiles = static_cast<int32_t>(oryx_product_tiles(s.N));
  if (s.verify != nullptr) {
    a.N = 1, a.Hq = H_ * s.N, a.steps = s.N, a.step_wanted = a.wanted, a.wanted = nullptr;
    a.lengths = s.lengths + s.N - 1;  // with the last token's own key
  }
  return a;
}

void DecodeChain::allocate(const Step& s) {
  reach(s.capacity);
  int64_t bytes = 0;
  for (size_t i = 0; i < packed_->layers.size(); ++i) {
    if (!attends(s, i)) continue;
    const OryxDecodeAttention a = attention_of(s, i);
    TORCH_CHECK(oryx_decode_attention_supports(&a) != 0, "fused decoder: rows of an odd layout");
    bytes = std::max(bytes, oryx_decode_attention_workspace(&a));
  }
  if (bytes > 0 && (!workspace_.defined() || workspace_.numel() < bytes)) workspace_ = at::empty({bytes}, u_.options().dtype(at::kByte));
}

}  // namespace oryx::fused
