#include "oryx/generate/captured_chain_cuda.h"

#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/gated_delta/cuda/gated_delta_step.h"
#include "oryx/ops/kda/cuda/kda_step.h"
#include "oryx/ops/rope/rope_rows_cuda.h"
#include "oryx/ops/ssd/cuda/ssd_step.h"

namespace oryx::captured {

using fused::pointer;
using ops::cuda::check;
using ops::cuda::stream_of;

namespace {

constexpr int kDtype = 1;         // bfloat16, as launchers take it
constexpr float kL2Eps = 1e-6f;   // of keys and queries, as the operators' default

float key_scale(const LayerConfig& c) { return static_cast<float>(1 / std::sqrt(static_cast<double>(c.head_dim))); }
int64_t rotated(const LayerConfig& c) { return c.rotary_dim > 0 ? c.rotary_dim : c.head_dim; }
int32_t tiles_of(const Step& s) { return static_cast<int32_t>(oryx_product_tiles(s.N)); }

// The general kernel also takes what the other knows where that is little.
bool in_general(const OryxDecodeAttention& a) { return oryx_decode_attention_supports(&a) == 0 || oryx_decode_attention_is_small(&a) != 0; }

// Where attention's own last kernel can norm and gate.
bool finishes(const LayerPlan& l) {
  const LayerConfig& c = l.config;
  return c.combine == "select" && (l.gate < 0 || c.gate_activation == "silu") && (!c.head_norm || (c.head_norm_groups == 0 && c.gated_norm_order == "norm_first"));
}

}  // namespace

Chain::Chain(const LanguageModel& model, int64_t most)
    : device_(model.device()), plan_(model.derived<Plan>(0, [&] { return make_plan(model); })), final_eps_(model.config().layer.norm_eps), D_(model.config().layer.hidden_size), vocab_(model.config().vocab_size) {
  TORCH_CHECK(most >= 1 && most <= kMost, "captured decoder: a chain for ", most, " sequences");
  int64_t rows = 0, scalars = 1, keys = 0, values = 0, width = 0, feed_forward = 1, groups = 0;
  for (const LayerPlan& l : plan_->layers) {
    rows = std::max(rows, l.rows), scalars = std::max(scalars, l.scalars), keys = std::max(keys, l.config.key_width()), values = std::max(values, l.config.value_width());
    width = std::max(width, l.width), feed_forward = std::max(feed_forward, l.feed_forward);
    mixers_ = std::max(mixers_, static_cast<int64_t>(l.mixers.size())), groups = std::max(groups, static_cast<int64_t>(l.groups.size()));
  }
  const auto half = at::device(device_).dtype(at::kBFloat16), f32 = half.dtype(at::kFloat);
  const int64_t activations = 8 * oryx_product_tiles(most);
  x_ = at::empty({most, D_}, f32), u_ = at::zeros({activations * D_}, half), y_ = at::zeros({activations * width}, half), mid_ = at::zeros({activations * feed_forward}, half);
  for (at::Tensor& s : squares_) s = at::zeros({activations, (D_ / 32 + 3) / 4 * 4}, f32);
  projected_ = at::empty({most * rows}, half), narrow_ = at::empty({most * scalars}, f32);
  for (int64_t g = 0; g < groups; ++g) keys_.push_back(at::empty({most * keys}, half)), values_.push_back(at::empty({most * values}, half));
  logits_ = at::empty({most, plan_->head_rows}, half);
  if (std::any_of(plan_->layers.begin(), plan_->layers.end(), [](const LayerPlan& l) { return l.norms_behind; })) product_ = at::empty({most * D_}, half);
  for (int64_t m = 0; m < mixers_; ++m) buffers_.push_back(buffers_of(static_cast<size_t>(m), most, half));
}

Chain::MixerBuffers Chain::buffers_of(size_t m, int64_t most, const at::TensorOptions& half) const {
  int64_t query = 1, o = 1, decays = 1, scalars[2] = {1, 1};
  for (const LayerPlan& l : plan_->layers) {
    if (m >= l.mixers.size()) continue;
    query = std::max(query, l.config.query_width()), o = std::max(o, l.config.output_width());
    for (size_t k = 0; k < l.mixers[m].scalars.size(); ++k) scalars[k] = std::max(scalars[k], l.mixers[m].scalars[k].width);
    if (l.mixers[m].kind == Kind::kKda) decays = std::max(decays, l.config.state_heads() * l.config.head_dim);
  }
  const auto f32 = half.dtype(at::kFloat);
  return {at::empty({most * query}, half), at::zeros({most * o}, half), {at::empty({most * scalars[0]}, f32), at::empty({most * scalars[1]}, f32)}, at::empty({most * decays}, f32)};
}

// ---- the state
Slots Chain::slots_of(const LayerState& state, int64_t layer, const fused::RowsOf& rows) const {
  const LayerPlan& l = plan_->layers[static_cast<size_t>(layer)];
  const auto fixed = [&](const std::string& name) {
    const at::Tensor& t = state.tensor(name);
    TORCH_CHECK(t.is_contiguous(), "captured decoder: a slot of an odd layout");
    return t;
  };
  Slots s;
  for (const GroupPlan& g : l.groups) {
    Slots::OfGroup slots;
    if (l.config.conv) slots.key_tail = fixed(g.prefix + "k_conv"), slots.value_tail = fixed(g.prefix + "v_conv");
    if (state.has(g.prefix + "keys")) slots.keys = rows(g.prefix + "keys"), slots.values = rows(g.prefix + "values");
    s.groups.push_back(std::move(slots));
  }
  if (state.has("mode")) s.modes = rows("mode");
  for (const MixerPlan& m : l.mixers) {
    Slots::OfMixer slot;
    if (m.kind != Kind::kAttention) slot.S = fixed(m.name + ".S");
    if (m.query_filter.defined()) slot.query_tail = fixed(m.name + ".q_conv");
    for (const ScalarPlan& scalar : m.scalars) slot.scalar_rows.push_back(state.has(scalar.rows) ? rows(scalar.rows) : at::Tensor());
    s.mixers.push_back(std::move(slot));
  }
  return s;
}

bool Chain::moved(const LayerState& state, int64_t layer, const Slots& slots) const {
  const LayerPlan& l = plan_->layers[static_cast<size_t>(layer)];
  const auto other = [&](const std::string& name, const at::Tensor& was) { return was.defined() && state.tensor(name).data_ptr() != was.data_ptr(); };
  for (size_t g = 0; g < slots.groups.size(); ++g) {
    if (other(l.groups[g].prefix + "k_conv", slots.groups[g].key_tail) || other(l.groups[g].prefix + "v_conv", slots.groups[g].value_tail)) return true;
  }
  for (size_t m = 0; m < slots.mixers.size(); ++m) {
    if (other(l.mixers[m].name + ".S", slots.mixers[m].S) || other(l.mixers[m].name + ".q_conv", slots.mixers[m].query_tail)) return true;
  }
  return false;
}

std::string Chain::rows_name(const LayerState& state, int64_t layer) const {
  for (const GroupPlan& g : plan_->layers[static_cast<size_t>(layer)].groups) {
    if (state.has(g.prefix + "keys")) return g.prefix + "keys";
  }
  return {};
}

bool Chain::write_modes(uint8_t* modes, int64_t N, int64_t layer, int64_t n, uint8_t place) const {
  const LayerPlan& l = plan_->layers[static_cast<size_t>(layer)];
  TORCH_CHECK(place < l.mixers.size(), "captured decoder: mode ", int{place}, " in layer ", layer);
  bool looks_back = false;
  modes[modes_at(layer, 0, N) + n] = place;
  for (size_t m = 0; m < l.mixers.size(); ++m) {
    if (l.config.combine != "mean" && m != place) continue;
    modes[modes_at(layer, 1 + static_cast<int64_t>(m), N) + n] = 1;
    looks_back |= l.mixers[m].kind == Kind::kAttention;
  }
  modes[modes_at(layer, 1 + mixers_, N) + n] = looks_back ? 1 : 0;
  return looks_back;
}

int64_t Chain::weight_bytes(int64_t place) const {
  auto bytes = static_cast<int64_t>(plan_->head.nbytes());
  for (const LayerPlan& l : plan_->layers) {
    for (const at::Tensor* t : {&l.in, &l.narrow, &l.out, &l.gate_up, &l.down}) bytes += t->defined() ? static_cast<int64_t>(t->nbytes()) : 0;
    // Of the queries its own alone; a place that a layer lacks is its first.
    std::vector<int64_t> counted{l.mixers[place < static_cast<int64_t>(l.mixers.size()) ? static_cast<size_t>(place) : 0].query};
    for (const MixerPlan& m : l.mixers) {
      if (l.config.combine == "mean" || std::find(counted.begin(), counted.end(), m.query) != counted.end() || m.query_filter.defined()) continue;
      counted.push_back(m.query);
      bytes -= 2 * l.config.query_width() * D_;
    }
  }
  return bytes;
}

void Chain::reach(int64_t capacity) {
  std::vector<at::Tensor> all(plan_->layers.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const LayerPlan& l = plan_->layers[i];
    const bool turns = l.config.rope_theta > 0 && std::any_of(l.mixers.begin(), l.mixers.end(), [](const MixerPlan& m) { return m.kind == Kind::kAttention; });
    if (!turns) continue;
    // Earlier captures know the ones that there are.
    const bool reaches = i < ropes_.size() && ropes_[i].defined() && ropes_[i].size(0) >= capacity;
    all[i] = reaches ? ropes_[i] : ops::rope_rows_on(device_, std::max<int64_t>(capacity, 2), l.config.rope_theta, rotated(l.config));
  }
  ropes_ = std::move(all);
}

void Chain::allocate(const Step& s) {
  int64_t bytes = 16;
  reach(s.capacity);
  for (size_t i = 0; i < plan_->layers.size(); ++i) {
    const LayerPlan& l = plan_->layers[i];
    for (size_t m = 0; m < l.mixers.size(); ++m) {
      if (l.mixers[m].kind != Kind::kAttention || !(*s.slots)[i].groups[l.mixers[m].group].keys.defined()) continue;
      OryxDecodeAttention a = attention_of(s, i, m);
      if (oryx_decode_attention_supports(&a) != 0) bytes = std::max(bytes, oryx_decode_attention_workspace(&a));
      for (; a.N > 0; a.N /= 2) bytes = std::max(bytes, oryx_decode_attention_general_workspace(&a));  // smaller batches are cut to more shares
    }
  }
  if (!workspace_.defined() || workspace_.numel() < bytes) workspace_ = at::empty({bytes}, u_.options().dtype(at::kByte));
}

// ---- the step
at::BFloat16* Chain::projected(int64_t column) const { return pointer<at::BFloat16>(projected_) + column; }

OryxProduct Chain::product_of(const Step& s, int form, const at::Tensor& weight, const at::Tensor& x, const at::Tensor& out, int64_t rows, int64_t K, double eps) const {
  OryxProduct a{};
  a.form = form, a.weight = weight.data_ptr(), a.x = x.data_ptr(), a.out = out.data_ptr();
  a.N = s.N, a.rows = rows, a.K = K, a.eps = static_cast<float>(eps);
  return a;
}

void Chain::run(const OryxProduct& a) const { check("oryx_product", oryx_product(&a, stream_of(u_))); }

// A product of u_, the stream as add() left it: with the norm in front, where there is one.
void Chain::reads_stream(OryxProduct& a, const at::Tensor& norm, size_t part) const {
  if (norm.defined()) a.squares = pointer<float>(squares_[part]);
}

// The factors of the norm in front of a layer's mixers, or of its feed-forward, behind the last layer of the head; undefined where there is none.
at::Tensor Chain::norm_in_front(size_t layer, bool feed_forward) const {
  if (layer == plan_->layers.size()) return plan_->final_norm;
  const LayerPlan& l = plan_->layers[layer];
  if (l.norms_behind) return {};
  return feed_forward ? l.norm2 : l.norm1;
}

// x_ += weight x, or norm(weight x); and what reads x_ next, but for the norm's factor -> u_ and squares_[to]. `norm`: behind, where the layer has it there; `next`: in front of what is next.
void Chain::add(const Step& s, const LayerPlan& l, const at::Tensor& weight, const at::Tensor& x, int64_t K, const at::Tensor& norm, const at::Tensor& next, size_t to) const {
  if (!l.norms_behind) {
    OryxProduct a = product_of(s, kOryxProductResidual, weight, x, u_, D_, K, 0);
    a.sum = pointer<float>(x_), a.norm_weight = pointer<float>(next), a.sum_squares = pointer<float>(squares_[to]);
    return run(a);
  }
  run(product_of(s, kOryxProductRows, weight, x, product_, D_, K, 0));
  OryxBatchAddNorm a{};
  a.y = product_.data_ptr(), a.norm = pointer<float>(norm), a.weight = pointer<float>(next), a.x = pointer<float>(x_), a.out = u_.data_ptr(), a.squares = pointer<float>(squares_[to]);
  a.N = s.N, a.D = D_, a.eps = static_cast<float>(l.config.norm_eps), a.tiles = tiles_of(s), a.places = s.places;
  check("oryx_batch_add_norm", oryx_batch_add_norm(&a, stream_of(u_)));
}

void Chain::launch(const Step& s, bool looks_back) const {
  OryxBatchEmbed embed{};
  embed.embed = plan_->embed.data_ptr(), embed.tokens = s.tokens, embed.weight = pointer<float>(norm_in_front(0, false)), embed.x = pointer<float>(x_), embed.out = u_.data_ptr();
  embed.squares = pointer<float>(squares_[0]), embed.N = s.N, embed.D = D_, embed.tiles = tiles_of(s), embed.likeliest = s.likeliest, embed.places = s.places;
  check("oryx_batch_embed", oryx_batch_embed(&embed, stream_of(u_)));
  for (size_t i = 0; i < plan_->layers.size(); ++i) {
    const LayerPlan& l = plan_->layers[i];
    OryxProduct in = product_of(s, kOryxProductRows, l.in, u_, projected_, looks_back ? l.rows : l.optional, D_, l.config.norm_eps);
    reads_stream(in, norm_in_front(i, false), 0);
    if (looks_back && l.optional < l.rows) in.needed = s.modes + modes_at(static_cast<int64_t>(i), 1 + mixers_, s.N), in.optional = l.optional;
    if (l.narrow.defined()) in.narrow_weight = l.narrow.data_ptr(), in.narrow_out = pointer<float>(narrow_), in.narrow_rows = l.narrow_rows, in.narrow = l.scalars;
    run(in);
    mix(s, i, in.rows, looks_back);
    const at::Tensor behind = norm_in_front(i + 1, false);
    if (l.feed_forward == 0) {
      add(s, l, l.out, y_, l.width, l.norm1, behind, 0);
      continue;
    }
    const at::Tensor between = norm_in_front(i, true);
    add(s, l, l.out, y_, l.width, l.norm1, between, 1);
    OryxProduct gate_up = product_of(s, kOryxProductSwiglu, l.gate_up, u_, mid_, 2 * l.feed_forward, D_, l.config.norm_eps);
    reads_stream(gate_up, between, 1);
    run(gate_up);
    add(s, l, l.down, mid_, l.feed_forward, l.norm2, behind, 0);
  }
  OryxProduct head = product_of(s, kOryxProductRows, plan_->head, u_, logits_, plan_->head_rows, D_, final_eps_);
  head.squares = pointer<float>(squares_[0]);
  run(head);
  OryxBatchFinish finish{};
  finish.logits = logits_.data_ptr(), finish.below = s.below, finish.likeliest = s.likeliest, finish.tokens = s.tokens, finish.feed_back = s.feed_back;
  finish.positions = s.positions, finish.lengths = s.lengths, finish.id_rows = pointer<int32_t>(s.id_rows);
  finish.vocab = plan_->head_rows, finish.id_sequence = s.between_sequences(s.id_rows), finish.capacity = s.capacity, finish.N = s.N, finish.places = s.places;
  check("oryx_batch_finish", oryx_batch_finish(&finish, stream_of(u_)));
}

// The layer's mixers; `row`: columns of the projected row that there are.
void Chain::mix(const Step& s, size_t i, int64_t row, bool looks_back) const {
  const LayerPlan& l = plan_->layers[i];
  const OryxCapturedPrepare before = prepare_of(s, i, row);
  OryxCapturedReadout read = readout_of(s, i, row);
  const bool whole = mix_whole(s, i, before, read);
  if (!whole && !(looks_back && keeps_itself(s, i))) check("oryx_captured_prepare", oryx_captured_prepare(&before, stream_of(u_)));
  bool reads = false;
  for (size_t m = 0; m < l.mixers.size(); ++m) {
    if (l.mixers[m].kind == Kind::kAttention) {
      if (looks_back && (*s.slots)[i].groups[l.mixers[m].group].keys.defined() && !attend(s, i, m, row)) read.o[m] = buffers_[m].o.data_ptr();
    } else if (!whole) {
      advance(s, i, m);
      read.o[m] = buffers_[m].o.data_ptr();
    }
    reads |= read.o[m] != nullptr;
  }
  if (reads) check("oryx_captured_readout", oryx_captured_readout(&read, stream_of(u_)));
}

// Decay, step and readout of the only recurrence in one kernel with what lies before and behind; false: it does not know the layer.
bool Chain::mix_whole(const Step& s, size_t i, const OryxCapturedPrepare& before, const OryxCapturedReadout& read) const {
  const LayerPlan& l = plan_->layers[i];
  const auto recurrent = [](const MixerPlan& m) { return m.kind != Kind::kAttention; };
  const auto mixer = std::find_if(l.mixers.begin(), l.mixers.end(), recurrent);
  if (std::count_if(l.mixers.begin(), l.mixers.end(), recurrent) != 1 || mixer->kind == Kind::kKda || l.config.value_dim() != l.config.head_dim) return false;
  const auto m = static_cast<size_t>(mixer - l.mixers.begin());
  OryxCapturedMix a{};
  a.prepare = before, a.readout = read, a.S = pointer<float>((*s.slots)[i].mixers[m].S);
  for (OryxCapturedChannels& c : a.prepare.channels) c.out = nullptr;
  for (OryxCapturedScalars& c : a.prepare.scalars) c.out = nullptr;
  a.A_log = pointer<float>(mixer->A_log), a.dt_bias = pointer<float>(mixer->dt_bias), a.D = pointer<float>(mixer->D);
  a.H = l.config.num_heads, a.K = l.config.head_dim, a.delta = mixer->kind == Kind::kGatedDelta ? 1 : 0, a.place = static_cast<int32_t>(m);
  a.scale = key_scale(l.config), a.l2_eps = kL2Eps;
  if (oryx_captured_mix_supports(&a) == 0) return false;
  check("oryx_captured_mix", oryx_captured_mix(&a, stream_of(u_)));
  return true;
}

OryxCapturedPrepare Chain::prepare_of(const Step& s, size_t i, int64_t row) const {
  const LayerPlan& l = plan_->layers[i];
  const Slots& slots = (*s.slots)[i];
  const LayerConfig& c = l.config;
  OryxCapturedPrepare a{};
  a.projected = projected_.data_ptr(), a.narrow = pointer<float>(narrow_), a.row = row, a.narrow_row = l.scalars, a.N = s.N, a.capacity = s.capacity;
  a.positions = s.positions, a.modes = modes_of(s, i), a.mode_rows = pointer<int8_t>(slots.modes), a.mode_sequence = s.between_sequences(slots.modes), a.places = s.places;
  const auto taps = static_cast<int32_t>(c.conv_kernel), silu = static_cast<int32_t>(l.silu);
  const auto add = [&](int64_t column, int64_t channels, const at::Tensor& filter, const at::Tensor& bias, const at::Tensor& tail, const at::Tensor& out, const at::Tensor& rows) {
    a.channels[a.num_channels++] = {column, channels, pointer<float>(filter), pointer<float>(bias), pointer<>(tail), out.data_ptr(), pointer<>(rows), s.between_sequences(rows), taps, silu};
  };
  for (size_t g = 0; g < l.groups.size(); ++g) {
    const GroupPlan& group = l.groups[g];
    const Slots::OfGroup& kept = slots.groups[g];
    add(group.keys, c.key_width(), group.key_filter, group.key_bias, kept.key_tail, keys_[g], kept.keys);
    add(group.values, c.value_width(), group.value_filter, group.value_bias, kept.value_tail, values_[g], kept.values);
  }
  for (size_t m = 0; m < l.mixers.size(); ++m) {
    const MixerPlan& mixer = l.mixers[m];
    if (mixer.kind == Kind::kAttention) continue;
    add(mixer.query, c.query_width(), mixer.query_filter, mixer.query_bias, slots.mixers[m].query_tail, buffers_[m].query, {});
    for (size_t k = 0; k < mixer.scalars.size(); ++k) {
      const ScalarPlan& scalar = mixer.scalars[k];
      const at::Tensor& rows = slots.mixers[m].scalar_rows[k];
      const int32_t kind = scalar.function == Function::kCopy ? kOryxCapturedCopy : scalar.function == Function::kWrite ? kOryxCapturedWrite : kOryxCapturedDecay;
      a.scalars[a.num_scalars++] = {scalar.column, scalar.width, pointer<float>(mixer.A_log), pointer<float>(mixer.dt_bias), pointer<float>(buffers_[m].scalars[k]), pointer<float>(rows),
                                    s.between_sequences(rows), kind, c.allow_neg_eigval ? 2.0f : 1.0f};
    }
  }
  return a;
}

OryxCapturedReadout Chain::readout_of(const Step& s, size_t i, int64_t row) const {
  const LayerPlan& l = plan_->layers[i];
  const LayerConfig& c = l.config;
  OryxCapturedReadout read{};
  read.modes = modes_of(s, i);
  if (l.gate >= 0) read.gate = projected(l.gate), read.gate_row = row;
  read.norm = pointer<float>(l.o_norm), read.norm_length = l.o_norm.defined() ? l.o_norm.numel() : 1;
  read.slice = c.head_norm_groups > 0 ? c.output_width() / c.head_norm_groups : c.value_dim();
  read.N = s.N, read.width = c.output_width(), read.out = y_.data_ptr(), read.tiles = tiles_of(s), read.mixers = static_cast<int32_t>(l.mixers.size());
  read.mean = c.combine == "mean" ? 1 : 0, read.gate_first = c.gated_norm_order == "gate_first" ? 1 : 0, read.sigmoid = c.gate_activation == "sigmoid" ? 1 : 0;
  read.eps = static_cast<float>(c.o_norm_eps());
  return read;
}

// A recurrence's state and what it reads out, of all sequences.
void Chain::advance(const Step& s, size_t i, size_t m) const {
  const LayerConfig& c = plan_->layers[i].config;
  const MixerPlan& mixer = plan_->layers[i].mixers[m];
  const MixerBuffers& b = buffers_[m];
  const at::Tensor& S = (*s.slots)[i].mixers[m].S;
  const int64_t Hq = c.num_heads, Hk = c.kv_heads(), Hv = c.value_heads(), K = c.head_dim, V = c.value_dim();
  const void *q = b.query.data_ptr(), *k = keys_[mixer.group].data_ptr(), *v = values_[mixer.group].data_ptr();
  float *const first = pointer<float>(b.scalars[0]), *const second = pointer<float>(b.scalars[1]);
  const int32_t *places = s.places.places, *active = s.places.active;
  const auto stream = stream_of(u_);
  switch (mixer.kind) {
    case Kind::kSsd:
      check("oryx_ssd_step", oryx_ssd_step_chained(q, k, v, first, pointer<float>(mixer.dt_bias), pointer<float>(mixer.A_log), pointer<float>(mixer.D), pointer<float>(S), b.o.data_ptr(), kDtype, s.N,
                                                   Hq, Hk, Hv, K, V, S.stride(0), S.stride(1), places, active, stream));
      return;
    case Kind::kGatedDelta:
      check("oryx_gated_delta_step", oryx_gated_delta_step_chained(q, k, v, second, first, pointer<float>(S), b.o.data_ptr(), kDtype, s.N, Hq, Hk, Hv, K, V, S.stride(0), S.stride(1),
                                                                   key_scale(c), kL2Eps, places, active, stream));
      return;
    case Kind::kKda: {
      const OryxCapturedChannelDecays d{second, pointer<float>(mixer.decay_up), pointer<float>(mixer.dt_bias), pointer<float>(mixer.A_log), pointer<float>(b.decays), s.N, c.state_heads(), K, V};
      check("oryx_captured_channel_decays", oryx_captured_channel_decays(&d, stream));
      check("oryx_kda_step", oryx_kda_step(q, k, v, pointer<float>(b.decays), first, pointer<float>(S), b.o.data_ptr(), kDtype, s.N, Hq, Hk, Hv, K, V, S.stride(0), S.stride(1), key_scale(c), kL2Eps,
                                           /*chained=*/1, places, active, stream));
      return;
    }
    case Kind::kAttention: break;
  }
  TORCH_CHECK(false, "captured decoder: a mixer without a state");
}

// Whether a layer is attention alone whose kernel takes keys and values as they were projected, and keeps them.
bool Chain::keeps_itself(const Step& s, size_t i) const {
  const LayerPlan& l = plan_->layers[i];
  return l.mixers.size() == 1 && l.mixers[0].kind == Kind::kAttention && !l.config.conv && (*s.slots)[i].keeps_rows() && in_general(attention_of(s, i, 0));
}

// Attention of mixer m -> its buffer, or, normed and gated, the activations of the sequences that are in its mode: then true.
bool Chain::attend(const Step& s, size_t i, size_t m, int64_t row) const {
  const LayerPlan& l = plan_->layers[i];
  OryxDecodeAttention a = attention_of(s, i, m);
  a.q_row = row;
  if (keeps_itself(s, i)) a.new_keys = projected(l.groups[0].keys), a.new_values = projected(l.groups[0].values);
  const bool finish = finishes(l);
  if (finish) {
    a.o = y_.data_ptr(), a.o_tiles = tiles_of(s);
    if (l.gate >= 0) a.gate = projected(l.gate), a.gate_row = row;
    a.head_norm = pointer<float>(l.o_norm), a.head_norm_eps = static_cast<float>(l.config.o_norm_eps());
  }
  check("oryx_decode_attention", in_general(a) ? oryx_decode_attention_general(&a, kDtype, workspace_.data_ptr(), stream_of(u_)) : oryx_decode_attention(&a, workspace_.data_ptr(), stream_of(u_)));
  return finish;
}

OryxDecodeAttention Chain::attention_of(const Step& s, size_t i, size_t m) const {
  const LayerPlan& l = plan_->layers[i];
  const LayerConfig& c = l.config;
  const MixerPlan& mixer = l.mixers[m];
  const Slots::OfGroup& kept = (*s.slots)[i].groups[mixer.group];
  const int64_t token = s.paged() ? 0 : 1;
  OryxDecodeAttention a{};
  a.q = projected(mixer.query), a.keys = kept.keys.data_ptr(), a.values = kept.values.data_ptr(), a.o = buffers_[m].o.data_ptr();
  a.lengths = s.lengths, a.wanted = s.modes + modes_at(static_cast<int64_t>(i), 1 + static_cast<int64_t>(m), s.N), a.rope = pointer<float>(ropes_[i]);
  a.N = s.N, a.Hq = c.num_heads, a.Hk = c.kv_heads(), a.K = c.head_dim, a.V = c.value_dim(), a.capacity = s.capacity;
  a.blocks = s.places.blocks, a.page = s.places.page, a.most_blocks = s.places.most_blocks, a.lasting = s.places.lasting;
  a.key_token = kept.keys.stride(token), a.key_head = kept.keys.stride(token + 1), a.key_row = s.paged() ? a.page * a.key_token : kept.keys.stride(0);
  a.value_token = kept.values.stride(token), a.value_head = kept.values.stride(token + 1), a.value_row = s.paged() ? a.page * a.value_token : kept.values.stride(0);
  a.window = s.bound.window > 0 ? s.bound.window : mixer.window, a.first = s.bound.window > 0 ? s.bound.first : 0, a.reach = s.bound.window > 0 ? mixer.window : 0;
  a.rotated = a.rope != nullptr ? rotated(c) : 0, a.q_row = l.rows;
  if (mixer.q_norm.defined()) {
    a.q_norm = pointer<float>(mixer.q_norm), a.k_norm = pointer<float>(mixer.k_norm), a.norm_eps = static_cast<float>(c.norm_eps);
    a.norm_together = c.qk_norm_over == "all_heads" ? 1 : 0;
  }
  a.scale = c.attention_scale > 0 ? static_cast<float>(c.attention_scale) : key_scale(c);
  return a;
}

}  // namespace oryx::captured
