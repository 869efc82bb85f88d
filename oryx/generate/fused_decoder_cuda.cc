// The fused decoder on CUDA: one sequence by the persistent kernel of cuda/decode_step.h, several by the chain of kernels in
// cuda/decode_batch.h, cuda/decode_product.h and oryx/ops/decode_attention.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cuda/CUDAGraph.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "oryx/common/error.h"
#include "oryx/generate/cuda/decode_batch.h"
#include "oryx/generate/cuda/decode_product.h"
#include "oryx/generate/cuda/decode_step.h"
#include "oryx/generate/fused_decoder.h"
#include "oryx/generate/fused_layout.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/decode_attention/cuda/decode_attention.h"
#include "oryx/ops/rope/rope_rows_cuda.h"

namespace oryx {
namespace {

using ops::cuda::check;
using ops::cuda::stream_of;

// The weights of one layer as the kernels read them.
struct PackedLayer {
  at::Tensor in;          // bfloat16 [4 or 5 H K, D]: keys, values, gate, query of the linear mixer, query of attention
  at::Tensor narrow;      // b_proj, a_proj [2 H, D]: float32, or for the chain two bfloat16 rows for each (cuda/decode_product.h)
  int64_t narrow_rows = 0;
  at::Tensor out, gate_up, down;  // bfloat16; rows of gate_proj and up_proj in turn
  int64_t in_rows = 0;
  at::Tensor norm1, norm2, k_conv, v_conv, A_log, dt_bias, o_norm;  // float32
  bool attends = false;
};

// What a step reads and writes of a layer's state.
struct LayerSlots {
  at::Tensor k_tail, v_tail, S, keys, values, g, beta, modes;  // the last five undefined where no rows are kept
};

at::Tensor floats(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }

template <typename T>
T* pointer(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr;
}
int64_t row_stride(const at::Tensor& t) { return t.defined() ? t.stride(0) : 0; }

at::Tensor bf16(const at::Tensor& x) { return x.to(at::kBFloat16).contiguous(); }

// Rows 2 i and 2 i + 1 add up to row i of x; zero rows up to a multiple of 32.
at::Tensor halves(const at::Tensor& x) {
  const at::Tensor high = bf16(x), both = at::stack({high, bf16(x - high.to(at::kFloat))}, 1).flatten(0, 1);
  return at::constant_pad_nd(both, {0, 0, 0, (32 - both.size(0) % 32) % 32});
}

class Packed {
 public:
  // For the persistent kernel (cuda/decode_step.h), or for the chain (cuda/decode_product.h).
  Packed(const LanguageModel& model, bool persistent) {
    const ModelConfig& c = model.config();
    const int64_t heads = c.layer.num_heads;
    const auto by_columns = [&](const at::Tensor& w) { return persistent ? fused::column_pieces(w, heads) : fused::product_fragments(w); };
    for (int64_t i = 0; i < c.num_layers; ++i) {
      const MultiMixerLayer& layer = model.layer(i);
      const std::string prefix = fmt::format("layers.{}.", i);
      const auto p = [&](const char* name) { return model.parameter(prefix + name); };
      PackedLayer packed;
      packed.attends = layer.mixer_names().size() > 1;
      std::vector<at::Tensor> in = {p("mixer.k_proj.weight"), p("mixer.v_proj.weight"), p("mixer.g_proj.weight"), p("mixer.gated_delta_net.q_proj.weight")};
      if (packed.attends) in.push_back(p("mixer.attention.q_proj.weight"));
      for (at::Tensor& x : in) x = bf16(x);
      packed.in = persistent ? fused::row_pieces_by_head(at::cat(in), heads) : fused::product_fragments(at::cat(in));
      packed.in_rows = static_cast<int64_t>(in.size()) * in[0].size(0);
      packed.narrow = floats(at::cat({p("mixer.gated_delta_net.b_proj.weight"), p("mixer.gated_delta_net.a_proj.weight")}));
      if (!persistent) {
        packed.narrow = halves(packed.narrow);
        packed.narrow_rows = packed.narrow.size(0);
        packed.narrow = fused::product_fragments(packed.narrow);
      }
      packed.out = by_columns(bf16(p("mixer.o_proj.weight")));
      const at::Tensor gate_up = at::stack({bf16(p("mlp.gate_proj.weight")), bf16(p("mlp.up_proj.weight"))}, 1).flatten(0, 1);
      packed.gate_up = persistent ? fused::row_pieces_by_group(gate_up, heads) : fused::product_fragments(gate_up);
      packed.down = by_columns(bf16(p("mlp.down_proj.weight")));
      packed.norm1 = floats(norm_factor(layer.config(), p("norm1.weight")));
      packed.norm2 = floats(norm_factor(layer.config(), p("norm2.weight")));
      packed.k_conv = floats(p("mixer.k_conv.weight")), packed.v_conv = floats(p("mixer.v_conv.weight"));
      packed.A_log = floats(p("mixer.gated_delta_net.A_log")), packed.dt_bias = floats(p("mixer.gated_delta_net.dt_bias"));
      packed.o_norm = floats(p("mixer.o_norm.weight"));
      layers.push_back(std::move(packed));
    }
    embed = bf16(model.parameter("embed.weight"));
    head = c.tie_word_embeddings ? embed : bf16(model.parameter("lm_head.weight"));
    head = persistent ? fused::row_pieces(head) : fused::product_fragments(head);
    final_norm = floats(norm_factor(c.layer, model.parameter("final_norm.weight")));
  }

  std::vector<PackedLayer> layers;
  at::Tensor embed, head, final_norm;
};

class CudaDecoder : public FusedDecoder {
 public:
  CudaDecoder(const LanguageModel& model, State& state, int64_t tokens)
      : model_(model), state_(state), N_(state.sequences()), capacity_(tokens), persistent_(one_kernel(model, state)), packed_(model, persistent_) {
    const ModelConfig& c = model.config();
    const LayerConfig& layer = model.layer(0).config();
    D_ = layer.hidden_size, H_ = layer.num_heads, F_ = layer.intermediate_size, vocab_ = c.vocab_size, below_ = vocab_;
    const auto ints = at::device(model.device()).dtype(at::kInt);
    tokens_ = at::zeros({N_}, ints), positions_ = at::zeros({N_}, ints), lengths_ = at::ones({N_}, ints), likeliest_ = at::zeros({N_}, ints);
    feed_back_ = at::zeros({1}, ints);
    modes_ = at::zeros({c.num_layers, N_}, ints.dtype(at::kByte));
    rope_ = ops::rope_rows_on(model.device(), std::max<int64_t>(capacity_, 2), layer.rope_theta, 128);
    scale_ = static_cast<float>(layer.attention_scale > 0 ? layer.attention_scale : 1 / std::sqrt(128.0));
    persistent_ ? allocate_step() : allocate_batch();
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
    return logits_;
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
    if (limit != below_) graphs_[0].reset();
    below_ = limit;
    feeds_back_ = on;
    feed_back_.fill_(on ? 1 : 0);
  }

  int64_t weight_bytes(int64_t place) const override {
    int64_t bytes = static_cast<int64_t>(packed_.head.nbytes());
    const auto add = [&](const at::Tensor& t) { bytes += static_cast<int64_t>(t.nbytes()); };
    for (const PackedLayer& l : packed_.layers) {
      for (const auto* t : {&l.narrow, &l.out, &l.gate_up, &l.down}) add(*t);
      bytes += 4 * H_ * 128 * D_ * 2;  // keys, values, gate, one query
    }
    (void)place;
    return bytes;
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
    persistent_ ? fill_table() : allocate_attention();
    // A capture has a stream of its own.
    const c10::cuda::CUDAStream side = c10::cuda::getStreamFromPool(false, model_.device().index());
    cudaDeviceSynchronize();
    const c10::cuda::CUDAStreamGuard on(side);
    for (std::unique_ptr<at::cuda::CUDAGraph>& graph : graphs_) graph.reset();
    // A chain without the kernels of attention, for steps in which nobody attends, and one with them. The persistent kernel needs no other.
    for (const bool attention : {false, true}) {
      auto graph = std::make_unique<at::cuda::CUDAGraph>();
      graph->capture_begin();
      persistent_ ? launch_step() : launch_batch(attention);
      graph->capture_end();
      graphs_[attention ? 1 : 0] = std::move(graph);
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
      const PackedLayer& w = packed_.layers[i];
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
    a.num_layers = static_cast<int32_t>(packed_.layers.size()), a.vocab_size = static_cast<int32_t>(vocab_), a.below = static_cast<int32_t>(below_);
    a.capacity = capacity_;
    a.embed = packed_.embed.data_ptr(), a.head = packed_.head.data_ptr(), a.final_norm = pointer<float>(packed_.final_norm), a.rope = pointer<float>(rope_);
    a.token = pointer<int32_t>(tokens_), a.position = pointer<int32_t>(positions_), a.modes = pointer<uint8_t>(modes_), a.feed_back = pointer<int32_t>(feed_back_);
    a.id_rows = pointer<int32_t>(ids_), a.likeliest = pointer<int32_t>(likeliest_), a.logits = pointer<float>(logits_), a.workspace = workspace_.data_ptr();
    a.norm_eps = static_cast<float>(c.norm_eps), a.head_norm_eps = static_cast<float>(c.o_norm_eps()), a.attention_scale = scale_;
    check("oryx_decode_step", oryx_decode_step(&a, static_cast<int32_t>(D_), static_cast<int32_t>(F_), stream_of(logits_)));
  }

  // ---- several sequences
  void allocate_batch() {
    const auto half = at::device(model_.device()).dtype(at::kBFloat16), f32 = half.dtype(at::kFloat);
    const int64_t width = H_ * 128;
    tiles_ = oryx_product_tiles(N_);
    x_ = at::empty({N_, D_}, f32);
    u_ = at::zeros({8 * tiles_ * D_}, half), y_ = at::zeros({8 * tiles_ * width}, half), mid_ = at::zeros({8 * tiles_ * F_}, half);
    narrow_ = at::empty({N_, 2 * H_}, f32);
    for (at::Tensor& s : squares_) s = at::zeros({8 * tiles_, (D_ / 32 + 3) / 4 * 4}, f32);
    projected_ = at::empty({N_ * 5 * width}, half), logits_ = at::empty({N_, vocab_}, half);
  }

  OryxProduct product_of(int form, const at::Tensor& weight, const at::Tensor& x, const at::Tensor& out, int64_t rows, int64_t K) const {
    OryxProduct a{};
    a.form = form, a.weight = weight.data_ptr(), a.x = x.data_ptr(), a.out = out.data_ptr();
    a.N = N_, a.rows = rows, a.K = K, a.eps = static_cast<float>(model_.config().layer.norm_eps);
    return a;
  }
  void launch(const OryxProduct& a) const { check("oryx_product", oryx_product(&a, stream_of(u_))); }

  // x_ += weight x; its norm, but for its factor, -> u_ and squares_[to]
  void residual(const at::Tensor& weight, const at::Tensor& x, int64_t K, const at::Tensor& norm_weight, size_t to) const {
    OryxProduct a = product_of(kOryxProductResidual, weight, x, u_, D_, K);
    a.sum = pointer<float>(x_), a.norm_weight = pointer<float>(norm_weight), a.sum_squares = pointer<float>(squares_[to]);
    launch(a);
  }

  void launch_batch(bool attention) {
    const OryxBatchEmbed embed{packed_.embed.data_ptr(), pointer<int32_t>(tokens_), pointer<float>(packed_.layers[0].norm1), pointer<float>(x_), u_.data_ptr(), pointer<float>(squares_[0]), N_, D_,
                               static_cast<int32_t>(tiles_)};
    check("oryx_batch_embed", oryx_batch_embed(&embed, stream_of(u_)));
    for (size_t i = 0; i < packed_.layers.size(); ++i) {
      const PackedLayer& w = packed_.layers[i];
      // The query of attention is wanted only where a sequence is in attention.
      const bool asks = attention && w.attends;
      OryxProduct in = product_of(kOryxProductRows, w.in, u_, projected_, asks ? w.in_rows : 4 * H_ * 128, D_);
      in.squares = pointer<float>(squares_[0]);
      in.needed = asks ? pointer<uint8_t>(modes_) + i * static_cast<size_t>(N_) : nullptr, in.optional = 4 * H_ * 128;
      in.narrow_weight = w.narrow.data_ptr(), in.narrow_out = pointer<float>(narrow_), in.narrow_rows = w.narrow_rows, in.narrow = 2 * H_;
      launch(in);
      mix(i, asks ? w.in_rows : 4 * H_ * 128);
      if (asks && attends(i)) {
        const OryxDecodeAttention a = attention_of(i);
        check("oryx_decode_attention", oryx_decode_attention(&a, workspace_.data_ptr(), stream_of(u_)));
      }
      residual(w.out, y_, H_ * 128, w.norm2, 1);
      OryxProduct gate_up = product_of(kOryxProductSwiglu, w.gate_up, u_, mid_, 2 * F_, D_);
      gate_up.squares = pointer<float>(squares_[1]);
      launch(gate_up);
      residual(w.down, mid_, F_, i + 1 < packed_.layers.size() ? packed_.layers[i + 1].norm1 : packed_.final_norm, 0);
    }
    OryxProduct head = product_of(kOryxProductRows, packed_.head, u_, logits_, vocab_, D_);
    head.squares = pointer<float>(squares_[0]);
    launch(head);
    check("oryx_batch_finish", oryx_batch_finish(logits_.data_ptr(), vocab_, below_, pointer<int32_t>(likeliest_), pointer<int32_t>(tokens_), pointer<int32_t>(feed_back_),
                                                 pointer<int32_t>(positions_), pointer<int32_t>(lengths_), pointer<int32_t>(ids_), row_stride(ids_), capacity_, N_,
                                                 stream_of(u_)));
  }

  void mix(size_t i, int64_t row) {
    const PackedLayer& w = packed_.layers[i];
    const LayerSlots& s = slots_[i];
    const OryxBatchMix a{projected_.data_ptr(),
                         pointer<float>(narrow_),
                         pointer<float>(w.k_conv),
                         pointer<float>(w.v_conv),
                         pointer<float>(w.A_log),
                         pointer<float>(w.dt_bias),
                         pointer<float>(w.o_norm),
                         s.k_tail.data_ptr(),
                         s.v_tail.data_ptr(),
                         pointer<float>(s.S),
                         pointer<void>(s.keys),
                         pointer<void>(s.values),
                         pointer<float>(s.g),
                         pointer<float>(s.beta),
                         pointer<int8_t>(s.modes),
                         row_stride(s.keys),
                         row_stride(s.values),
                         row_stride(s.g),
                         row_stride(s.beta),
                         row_stride(s.modes),
                         pointer<int32_t>(positions_),
                         pointer<uint8_t>(modes_) + i * static_cast<size_t>(N_),
                         y_.data_ptr(),
                         N_,
                         H_,
                         row,
                         capacity_,
                         static_cast<int32_t>(tiles_),
                         static_cast<float>(model_.layer(static_cast<int64_t>(i)).config().o_norm_eps())};
    check("oryx_batch_mix", oryx_batch_mix(&a, stream_of(u_)));
  }

  OryxDecodeAttention attention_of(size_t i) const {
    const PackedLayer& w = packed_.layers[i];
    const LayerSlots& s = slots_[i];
    const int64_t row = w.in_rows, width = H_ * 128;
    auto* projected = static_cast<at::BFloat16*>(projected_.data_ptr());
    OryxDecodeAttention a{};
    a.q = projected + 4 * width, a.keys = s.keys.data_ptr(), a.values = s.values.data_ptr(), a.o = y_.data_ptr();
    a.lengths = pointer<int32_t>(lengths_), a.wanted = pointer<uint8_t>(modes_) + i * static_cast<size_t>(N_), a.rope = pointer<float>(rope_);
    a.N = N_, a.Hq = a.Hk = H_, a.K = a.V = 128, a.capacity = capacity_;
    a.key_row = s.keys.stride(0), a.key_token = s.keys.stride(1), a.key_head = s.keys.stride(2);
    a.value_row = s.values.stride(0), a.value_token = s.values.stride(1), a.value_head = s.values.stride(2);
    a.rotated = 128, a.q_row = row, a.scale = scale_;
    a.gate = projected + 2 * width, a.gate_row = row, a.head_norm = pointer<float>(w.o_norm);
    a.head_norm_eps = static_cast<float>(model_.layer(static_cast<int64_t>(i)).config().o_norm_eps());
    a.o_tiles = static_cast<int32_t>(tiles_);
    return a;
  }

  bool attends(size_t i) const { return packed_.layers[i].attends && slots_[i].keys.defined(); }

  // Before a capture, which must not allocate.
  void allocate_attention() {
    int64_t bytes = 0;
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (!attends(i)) continue;
      const OryxDecodeAttention a = attention_of(i);
      TORCH_CHECK(oryx_decode_attention_supports(&a) != 0, "fused decoder: rows of an odd layout");
      bytes = std::max(bytes, oryx_decode_attention_workspace(&a));
    }
    if (bytes > 0 && (!workspace_.defined() || workspace_.numel() < bytes)) workspace_ = at::empty({bytes}, u_.options().dtype(at::kByte));
  }

  const LanguageModel& model_;
  State& state_;
  int64_t N_, capacity_, D_ = 0, H_ = 0, F_ = 0, vocab_ = 0, below_ = 0;
  bool persistent_, feeds_back_ = false, fed_back_ = false;
  Packed packed_;
  float scale_ = 0;
  at::Tensor tokens_, positions_, lengths_, likeliest_, feed_back_, modes_, rope_, logits_, workspace_, table_, maps_, ids_;
  at::Tensor x_, u_, y_, narrow_, projected_, mid_, squares_[2];
  int64_t tiles_ = 0;
  std::vector<uint8_t> host_modes_;
  std::vector<LayerSlots> slots_;
  std::vector<int64_t> expected_;  // lengths that the device counts with
  std::unique_ptr<at::cuda::CUDAGraph> graphs_[2];  // of steps in which nobody attends, and of all others
};

std::unique_ptr<FusedDecoder> make_cuda_decoder(const LanguageModel& model, State& state, int64_t tokens, std::string* why) {
  int major = 0;
  check("fused decoder", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, model.device().index()));
  if (major != 9) {
    *why = "the GPU is not a Hopper one";
    return nullptr;
  }
  const LayerConfig& c = model.layer(0).config();
  if (!CudaDecoder::one_kernel(model, state)) {
    if (state.sequences() > 64) *why = fmt::format("{} sequences, expected at most 64", state.sequences());
    if (c.hidden_size % 32 != 0 || c.intermediate_size % 32 != 0 || model.config().vocab_size % 32 != 0) *why = "widths or a vocabulary that are no multiples of 32";
    if (!why->empty()) return nullptr;
  }
  return std::make_unique<CudaDecoder>(model, state, tokens);
}

const bool registered = detail::register_fused_decoder(make_cuda_decoder);

}  // namespace
}  // namespace oryx
