#include "oryx/model/language_model.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/progress.h"
#include "oryx/model/checkpointing.h"
#include "oryx/model/device.h"
#include "oryx/ops/embedding/embedding.h"
#include "oryx/ops/norm/norm.h"
#include "oryx/ops/rope/rope.h"

namespace oryx {

namespace {

// FNV-1a: a parameter's draws depend on its name, not on what stands before it.
uint64_t hash_name(const std::string& name) {
  uint64_t h = 0xcbf29ce484222325;
  for (const unsigned char c : name) h = (h ^ c) * 0x100000001b3;
  return h;
}

void draw(at::Tensor t, const ParameterSpec& spec, uint64_t seed, int64_t layers) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed ^ hash_name(spec.name));
  switch (spec.init) {
    case Init::kNormal: t.normal_(0, 0.02, generator); return;
    case Init::kResidual: t.normal_(0, 0.02 / std::sqrt(2.0 * static_cast<double>(layers)), generator); return;
    case Init::kOnes: t.fill_(1); return;
    case Init::kZeros: t.zero_(); return;
    case Init::kConv: {
      const double bound = 1 / std::sqrt(static_cast<double>(spec.shape.back()));
      t.uniform_(-bound, bound, generator);
      return;
    }
    case Init::kLogDecay: t.uniform_(1, 16, generator).log_(); return;
    case Init::kTimeStep: {
      // dt = exp U(log 1e-3, log 1e-1); softplus^-1(dt) = dt + log(-expm1(-dt))
      t.uniform_(std::log(1e-3), std::log(1e-1), generator).exp_();
      t.add_(t.neg().expm1().neg().log());
      return;
    }
  }
}

std::vector<std::unique_ptr<MultiMixerLayer>> make_layers(const ModelConfig& c) {
  std::vector<std::unique_ptr<MultiMixerLayer>> layers;
  for (int64_t i = 0; i < c.num_layers; ++i) layers.push_back(std::make_unique<MultiMixerLayer>(c.layer_of(c.mixers_of(i)), c.mixers_of(i), i));
  return layers;
}

}  // namespace

std::vector<ParameterSpec> LanguageModel::parameter_specs(const ModelConfig& c) {
  std::vector<ParameterSpec> specs;
  specs.push_back({"embed.weight", {c.vocab_size, c.layer.hidden_size}, Init::kNormal, true, "embedding"});
  for (const auto& layer : make_layers(c)) {
    for (auto& spec : layer->parameters()) specs.push_back(std::move(spec));
  }
  specs.push_back({"final_norm.weight", {c.layer.hidden_size}, c.layer.zero_centred_norm ? Init::kZeros : Init::kOnes, false, "norm"});
  if (!c.tie_word_embeddings) {
    specs.push_back({"lm_head.weight", {c.vocab_size, c.layer.hidden_size}, Init::kNormal, true, "output head"});
  }
  return specs;
}

LanguageModel::LanguageModel(const ModelConfig& config, at::ScalarType compute, at::ScalarType parameters)
    : config_(config), compute_(compute), specs_(parameter_specs(config)), layers_(make_layers(config)) {
  uint64_t bytes = 0;
  for (const auto& spec : specs_) bytes += static_cast<uint64_t>(spec.numel()) * at::elementSize(parameters);
  if (const uint64_t free = available_memory(); bytes > free) {
    fail("the model's parameters take {}, but only {} of memory are free", human_bytes(static_cast<double>(bytes)), human_bytes(static_cast<double>(free)));
  }
  for (const auto& spec : specs_) {
    parameters_.push_back(at::zeros(spec.shape, parameters));
    map_.add(spec.name, parameters_.back());
  }
  bind(map_);
}

void LanguageModel::bind(const ParameterMap& map) {
  for (auto& layer : layers_) layer->bind(map);
  embed_ = map.at("embed.weight");
  final_norm_ = map.at("final_norm.weight");
  if (!config_.tie_word_embeddings) lm_head_ = map.at("lm_head.weight");
}

void LanguageModel::keep_copies() {
  TORCH_CHECK(copies_.empty(), "model: copies are kept already");
  if (compute_ == parameters_.front().scalar_type()) return;
  ParameterMap map;
  for (size_t i = 0; i < specs_.size(); ++i) {
    const at::Tensor& p = parameters_[i];
    copies_.push_back(specs_[i].computes_narrow() ? p.detach().to(compute_) : at::Tensor());
  }
  for (const auto& layer : layers_) {
    for (const auto& names : layer->neighbours()) lay_out(names);
  }
  for (size_t i = 0; i < specs_.size(); ++i) {
    if (copies_[i].defined()) copies_[i].requires_grad_(parameters_[i].requires_grad());
    map.add(specs_[i].name, leaf(i));
  }
  bind(map);
}

// Lets the copies of these parameters stand one behind the other, as far as they have one shape.
void LanguageModel::lay_out(const std::vector<std::string>& names) {
  std::vector<size_t> run;
  const auto flush = [&] {
    if (run.size() > 1) {
      std::vector<at::Tensor> all;
      for (const size_t i : run) all.push_back(copies_[i]);
      const at::Tensor together = at::stack(all);
      for (size_t j = 0; j < run.size(); ++j) copies_[run[j]] = together[static_cast<int64_t>(j)].detach();
    }
    run.clear();
  };
  for (const std::string& name : names) {
    const auto i = static_cast<size_t>(std::find_if(specs_.begin(), specs_.end(), [&](const ParameterSpec& spec) { return spec.name == name; }) - specs_.begin());
    if (i == specs_.size() || !copies_[i].defined()) continue;
    if (!run.empty() && copies_[run.back()].sizes() != copies_[i].sizes()) flush();
    run.push_back(i);
  }
  flush();
}

void LanguageModel::refresh_copies() {
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < copies_.size(); ++i) {
    if (copies_[i].defined()) copies_[i].copy_(parameters_[i]);
  }
}

void LanguageModel::initialize(uint64_t seed) {
  // Each parameter has draws of its own, so that threads change nothing.
  at::parallel_for(0, static_cast<int64_t>(specs_.size()), 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    for (int64_t i = begin; i < end; ++i) draw(parameters_[static_cast<size_t>(i)], specs_[static_cast<size_t>(i)], seed, config_.num_layers);
  });
  refresh_copies();
}

void LanguageModel::to(at::Device device) {
  at::NoGradGuard no_grad;
  for (auto& p : parameters_) p.set_data(p.to(device));
  for (auto& p : copies_) {
    if (p.defined()) p.set_data(p.to(device));
  }
}

at::Device LanguageModel::device() const { return embed_.device(); }

void LanguageModel::requires_grad(bool on) {
  for (auto& p : parameters_) p.requires_grad_(on);
  for (auto& p : copies_) {
    if (p.defined()) p.requires_grad_(on);
  }
}

State LanguageModel::make_state(int64_t sequences, const StateOptions& options) const {
  TORCH_CHECK(compute_ == at::kFloat || compute_ == at::kBFloat16, "model: a state holds float32 recurrences, so a model that computes in ",
              compute_, " has none; expected float32 or bfloat16");
  StateOptions here = options;
  here.device = device();
  return State(slots(config_, compute_, options), sequences, here, refill_tokens());
}

std::vector<std::vector<SlotSpec>> LanguageModel::slots(const ModelConfig& config, at::ScalarType compute, const StateOptions& options) {
  std::map<std::vector<std::string>, std::vector<SlotSpec>> kinds;  // layers of one kind have the same slots
  std::vector<std::vector<SlotSpec>> all;
  bool rows = false, tails = false;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    auto it = kinds.find(config.mixers_of(i));
    if (it == kinds.end()) {
      const MultiMixerLayer layer(config.layer_of(config.mixers_of(i)), config.mixers_of(i), 0);
      it = kinds.emplace(config.mixers_of(i), layer.slots(compute, options)).first;
    }
    all.push_back(it->second);
    for (const SlotSpec& slot : it->second) {
      rows |= slot.kind == SlotKind::kPerToken;
      tails |= slot.kind == SlotKind::kTail;
    }
  }
  all.emplace_back();
  if (rows && tails) all.back().push_back({"ids", SlotKind::kPerToken, {}, at::kInt});
  return all;
}

int64_t LanguageModel::refill_tokens() const { return refill_tokens(config_); }

int64_t LanguageModel::refill_tokens(const ModelConfig& config) {
  // A layer's keys and values are at hand, so that its tails want w - 1 tokens of the layer's input. With a query convolution the first w - 1
  // outputs of a layer are not right, which costs every layer above as many more.
  int64_t tokens = 0, wrong = 0;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const LayerConfig c = config.layer_of(config.mixers_of(i));
    if (!c.conv) continue;
    tokens = std::max(tokens, wrong + c.conv_kernel - 1);
    if (c.query_conv) wrong += c.conv_kernel - 1;
  }
  return tokens;
}

void LanguageModel::scan(State& one, int64_t begin, int64_t end) const {
  const at::NoGradGuard no_grad;
  constexpr int64_t kPiece = 1024;  // bounds the memory of the recurrences' working copies
  for (int64_t at = begin; at < end; at += kPiece) {
    for (const auto& layer : layers_) layer->replay(one, at, std::min(end, at + kPiece));
  }
}

void LanguageModel::refill(State& one, int64_t end) const {
  const at::NoGradGuard no_grad;
  const int64_t begin = one.lengths()[0], count = end - begin;
  ModelInput input;
  input.input_ids = one.rows(config_.num_layers, "ids", {begin}, {end}).to(at::kLong);
  for (const auto& layer : layers_) {
    const at::Tensor places = layer->places(one, begin, end);
    std::vector<RoutedSpan> spans;
    for (int64_t t = 0; t < count; ++t) {
      const auto at = static_cast<int32_t>(t);
      spans.push_back({0, at, at + 1, places.defined() ? places[t].item<int32_t>() : 0});
    }
    input.routing.push_back(std::make_shared<Routing>(1, count, layer->mixer_names(), spans));
  }
  input.state = &one;
  input.refill = true;
  (void)hidden(input);
}

const Routing& LanguageModel::routing_of(const ModelInput& input, size_t layer) const {
  TORCH_CHECK(input.routing.size() == 1 || input.routing.size() == layers_.size(), "model: ", input.routing.size(), " routings for ",
              layers_.size(), " layers");
  const Routing& r = *input.routing[input.routing.size() == 1 ? 0 : layer];
  TORCH_CHECK(r.rows() == input.input_ids.size(0) && r.length() == input.input_ids.size(1), "model: the routing is of another batch shape");
  return r;
}

void LanguageModel::check_ids(const at::Tensor& ids) const {
  const auto [low, high] = ids.aminmax();
  const int64_t lo = low.item<int64_t>(), hi = high.item<int64_t>();
  if (lo < 0 || hi >= config_.vocab_size) {
    fail("token id {} is outside of the model's vocabulary of {}; was the text encoded with another tokeniser?", lo < 0 ? lo : hi, config_.vocab_size);
  }
}

PreparedInput LanguageModel::prepared(const ModelInput& input) const {
  const int64_t B = input.input_ids.size(0), T = input.input_ids.size(1);
  check_ids(input.input_ids);
  PreparedInput ready;
  std::optional<at::Tensor> past, cu;
  if (input.state != nullptr) past = input.state->lengths_tensor();
  if (input.cu_seqlens) {
    cu = input.cu_seqlens->cpu();
    ready.cu_seqlens = to_device(*input.cu_seqlens, device());
    const at::Tensor wide = cu->to(at::kLong);
    ready.bounds.assign(wide.data_ptr<int64_t>(), wide.data_ptr<int64_t>() + wide.numel());
  }
  ready.positions = to_device(ops::sequence_positions(B, T, cu, past), device());
  ready.input_ids = to_device(input.input_ids, device());
  return ready;
}

void LanguageModel::prepare(ModelInput& input) const {
  TORCH_CHECK(input.state == nullptr, "model: a batch with a state is prepared when it runs");
  input.prepared = prepared(input);
  for (size_t i = 0; i < layers_.size(); ++i) (void)routing_of(input, i).tokens(layers_[i]->mixer_names(), 0, device());
}

at::Tensor LanguageModel::hidden(const ModelInput& input) const {
  const int64_t B = input.input_ids.size(0), T = input.input_ids.size(1);
  TORCH_CHECK(B > 0 && T > 0, "model: a batch of ", B, " x ", T, " tokens, expected at least one");
  // A state is updated in place, which a backward pass through it would not survive.
  TORCH_CHECK(input.state == nullptr || !at::GradMode::is_enabled() || !embed_.requires_grad(),
              "model: a forward pass with a state has no gradients; run it under NoGradGuard");
  // Without gradients operators need not pass through autograd, which takes the host as long as a small one itself.
  std::optional<at::AutoDispatchBelowADInplaceOrView> below;
  if (!at::GradMode::is_enabled()) below.emplace();
  const PreparedInput ready = input.prepared ? *input.prepared : prepared(input);
  ForwardPass pass;
  pass.state = input.state;
  pass.refill = input.refill;
  TORCH_CHECK(!input.as_steps || (input.state != nullptr && !input.refill && B == 1 && !input.cu_seqlens && input.state->sequences() == 1 && !input.state->kept().on()),
              "model: tokens as steps are those of one sequence with a state that chooses no rows");
  pass.as_steps = input.as_steps;
  pass.tap = input.tap;
  pass.sequences.cu_seqlens = ready.cu_seqlens;
  pass.sequences.positions = ready.positions;
  pass.cu_seqlens = ready.bounds;
  pass.surprise = input.surprise;
  TORCH_CHECK(!input.surprise || input.state == nullptr, "model: surprise is measured from a sequence's beginning, without a state");
  std::vector<int64_t> counts;  // new tokens by sequence
  if (input.state != nullptr) {
    counts.assign(static_cast<size_t>(input.state->sequences()), T);
    for (size_t n = 0; n + 1 < pass.cu_seqlens.size(); ++n) counts[n] = pass.cu_seqlens[n + 1] - pass.cu_seqlens[n];
    // What may fail does so before anything is written.
    for (size_t i = 0; i < layers_.size(); ++i) layers_[i]->check_past(routing_of(input, i), *input.state);
    if (!input.refill) input.state->prepare(counts);
  }
  if (input.state != nullptr && !input.refill && input.state->layer(config_.num_layers).has("ids")) {
    input.state->append(config_.num_layers, "ids", ready.input_ids, pass.cu_seqlens.empty() ? nullptr : &pass.cu_seqlens);
  }
  at::Tensor x = ops::embedding(embed_, ready.input_ids).to(compute_), delta;  // [B, T, D]
  if (config_.embedding_multiplier != 1) x = x * config_.embedding_multiplier;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const MultiMixerLayer& layer = *layers_[i];
    const Routing& routing = routing_of(input, i);
    if (input.checkpoint_layers && at::GradMode::is_enabled()) {
      // A copy of the pass: the layer runs again when this call has long returned.
      const auto run = [&layer, &routing, pass](const at::Tensor& a, const at::Tensor& b) mutable { return layer.forward(a, b, routing, pass); };
      std::tie(x, delta) = checkpointed(run, x, delta);
    } else {
      std::tie(x, delta) = layer.forward(x, delta, routing, pass);
    }
  }
  if (input.state != nullptr) input.state->advance(counts);
  return std::get<0>(ops::add_rms_norm(delta, x, norm_factor(config_.layer, final_norm_), config_.layer.norm_eps));
}

ops::CrossEntropyResult LanguageModel::loss(const at::Tensor& hidden, const at::Tensor& targets, double z_coef) const {
  const at::Tensor h = scaled(hidden).reshape({-1, hidden.size(-1)});
  const at::Tensor w = head().scalar_type() == h.scalar_type() ? head() : head().to(h.scalar_type());
  return ops::linear_cross_entropy(h, w, targets.reshape({-1}), -100, z_coef);
}

}  // namespace oryx
