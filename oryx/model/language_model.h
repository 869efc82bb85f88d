// The multi-mixer language model: embedding, layers, final norm, output projection (docs/model.md).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "oryx/model/config.h"
#include "oryx/model/derived.h"
#include "oryx/model/layer.h"
#include "oryx/model/routing.h"
#include "oryx/ops/cross_entropy/cross_entropy.h"
#include "oryx/state/state.h"

namespace oryx {

// What is known of a batch before it runs, where the model wants it: LanguageModel::prepare.
struct PreparedInput {
  at::Tensor input_ids;                  // [B, T] int64, all within the vocabulary
  at::Tensor positions;                  // [B, T] int32
  std::optional<at::Tensor> cu_seqlens;  // [N + 1] int32
  std::vector<int64_t> bounds;           // cu_seqlens on the host, empty when not packed
};

struct ModelInput {
  at::Tensor input_ids;                  // [B, T] int64
  std::optional<at::Tensor> cu_seqlens;  // [N + 1] int32: packed documents in one row (B = 1)
  // One routing for all layers, or one a layer.
  std::vector<std::shared_ptr<const Routing>> routing;
  // Tokens before this call and where to keep those of this one; null: the sequences start here and nothing is kept.
  State* state = nullptr;
  // The state holds the rows of these tokens already, and only its recurrent slots and tails are brought forward (State::trim).
  bool refill = false;
  // Of a state of one sequence: a few tokens in one pass, but each as if it ran alone. On the CPU in float32, up to ops::kFewRows tokens, each gets the very bits that it gets in a pass
  // of its own, and so do the state's slots; weights are read once for all of them. What verifies a draft: State::hold_steps() first, and State::back() reaches the end of each token.
  bool as_steps = false;
  // Recompute each layer in the backward pass instead of keeping its activations.
  bool checkpoint_layers = false;
  std::function<void(std::string_view, int64_t, const at::Tensor&)> tap = {};
  std::optional<PreparedInput> prepared = {};
  std::function<void(const at::Tensor&)> surprise = {};  // ForwardPass::surprise
};

class LanguageModel : public Replay {
 public:
  // Parameters are float32 (float64 for checks); `compute` is the type of activations and matrix products.
  explicit LanguageModel(const ModelConfig& config, at::ScalarType compute = at::kFloat, at::ScalarType parameters = at::kFloat);

  // Moves the parameters; the same tensors, so that whoever holds them sees it. Inputs of any device are taken there.
  void to(at::Device device);
  at::Device device() const;

  // What a model of this config is made of, without making it.
  static std::vector<ParameterSpec> parameter_specs(const ModelConfig& config);

  // Draws every parameter from its declared distribution: a function of (seed, name).
  void initialize(uint64_t seed);

  // Does ahead of hidden() what needs the host: fills input.prepared and brings the routing's spans to the model's device, without waiting for it. For batches
  // without a state. Throws Error for token ids outside the vocabulary.
  void prepare(ModelInput& input) const;
  // Throws Error for token ids outside the vocabulary.
  void check_ids(const at::Tensor& ids) const;
  // -> final hidden states [B, T, D], normalised. Throws Error for token ids outside the vocabulary.
  at::Tensor hidden(const ModelInput& input) const;
  // hidden [..., D] -> logits [..., vocabulary]
  at::Tensor logits(const at::Tensor& hidden) const { return project(scaled(hidden), head()); }
  // Mean cross-entropy of hidden [B, T, D] against targets [B, T] (-100: ignored); logits never stand whole.
  ops::CrossEntropyResult loss(const at::Tensor& hidden, const at::Tensor& targets, double z_coef = 0) const;

  State make_state(int64_t sequences, const StateOptions& options = {}) const;
  // By layer, and one list more: what belongs to the model (`ids`, the tokens, where a trim may have to run them again).
  static std::vector<std::vector<SlotSpec>> slots(const ModelConfig& config, at::ScalarType compute, const StateOptions& options = {});

  int64_t refill_tokens() const override;
  static int64_t refill_tokens(const ModelConfig& config);
  void scan(State& one, int64_t begin, int64_t end) const override;
  void refill(State& one, int64_t end) const override;

  const ModelConfig& config() const { return config_; }
  at::ScalarType compute_dtype() const { return compute_; }
  const std::vector<ParameterSpec>& specs() const { return specs_; }
  // In the order of specs().
  const std::vector<at::Tensor>& parameters() const { return parameters_; }
  const at::Tensor& parameter(const std::string& name) const { return map_.at(name); }

  // Keeps a copy of every matrix in the type of computation, so that a step need not make it anew. Forward passes then read the copies, and gradients are
  // theirs: whoever writes a parameter writes its copy too, or calls refresh_copies(). For models that compute in bfloat16.
  void keep_copies();
  void refresh_copies();
  // In the order of specs(); undefined where the parameter itself is read. Empty without copies.
  const std::vector<at::Tensor>& copies() const { return copies_; }
  // What a forward pass reads of parameter i: the leaf whose .grad a backward pass fills.
  const at::Tensor& leaf(size_t i) const { return !copies_.empty() && copies_[i].defined() ? copies_[i] : parameters_[i]; }
  const MultiMixerLayer& layer(int64_t i) const { return *layers_[static_cast<size_t>(i)]; }
  void requires_grad(bool on);

  // `make()` -> T: what somebody makes of the parameters once and shares with all who ask after it (derived.h).
  template <typename T, typename Make>
  std::shared_ptr<const T> derived(int kind, Make make) const {
    return derived_->get<T>(parameters_, kind, make);
  }

 private:
  const at::Tensor& head() const { return config_.tie_word_embeddings ? embed_ : lm_head_; }
  // logits_scaling on the narrow side of the head: logits need not be passed over again, nor ever stand whole in the loss.
  at::Tensor scaled(const at::Tensor& hidden) const { return config_.logits_scaling == 1 ? hidden : hidden.div(config_.logits_scaling); }
  void bind(const ParameterMap& map);
  void lay_out(const std::vector<std::string>& names);
  const Routing& routing_of(const ModelInput& input, size_t layer) const;
  PreparedInput prepared(const ModelInput& input) const;

  ModelConfig config_;
  at::ScalarType compute_;
  std::vector<ParameterSpec> specs_;
  std::vector<at::Tensor> parameters_, copies_;
  ParameterMap map_;
  std::vector<std::unique_ptr<MultiMixerLayer>> layers_;
  at::Tensor embed_, final_norm_, lm_head_;
  std::unique_ptr<Derived> derived_ = std::make_unique<Derived>();
};

}  // namespace oryx
