// One multi-mixer layer (docs/model.md): keys, values and gate computed once, mixed by each token's mixer, written back through one
// output projection; then the feed-forward.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "oryx/mixers/mixer.h"
#include "oryx/mixers/projections.h"
#include "oryx/model/routing.h"

namespace oryx {

// Where the rows stand that layers read of a bounded state: the same in all of them (KeyValueCache).
struct RowPlaces {
  at::Tensor lengths, starts;                            // on the CPU
  at::Tensor positions, first_positions, lengths_there;  // where the rows are
};

// What the layers of one forward pass share.
struct ForwardPass {
  Sequences sequences;
  std::vector<int64_t> cu_seqlens;  // host copy, empty when not packed
  State* state = nullptr;
  bool refill = false;  // the state holds these tokens' rows already
  bool as_steps = false;  // ModelInput::as_steps
  std::optional<RowPlaces> places;  // made by the first layer that wants them
  std::optional<RowStore::Pages> pages;  // likewise
  ops::Copies copies;  // what a layer leaves in the state
  // Called with each linear mixer's Mixer::surprise() when set; the pass must have no state.
  std::function<void(const at::Tensor&)> surprise;
  // Called with ("mixer_out" or "hidden", layer, tensor [B, T, D]) when set: for tests and probes.
  std::function<void(std::string_view, int64_t, const at::Tensor&)> tap;
};

class MultiMixerLayer {
 public:
  MultiMixerLayer(const LayerConfig& config, std::vector<std::string> mixers, int64_t index);

  std::vector<ParameterSpec> parameters() const;  // full names ("layers.3.mixer.k_proj.weight")
  std::vector<SlotSpec> slots(at::ScalarType compute, const StateOptions& options = {}) const;
  // Throws Error when a mixer would look back at tokens whose rows the state has not kept.
  void check_past(const Routing& routing, const State& state) const;
  void bind(const ParameterMap& p);
  // Parameters (full names) that products of one activation read: whoever lays out memory does well to let them stand one behind the other (Projections::ahead).
  std::vector<std::vector<std::string>> neighbours() const;

  // x [B, T, D] is the residual stream before `delta` (the last sublayer's output, [B, T, D] or undefined) is added: the sum and
  // the norm that follows are one pass. Returns the same pair for the next layer.
  std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& delta, const Routing& routing,
                                            ForwardPass& pass) const;

  // Brings the recurrent slots of `one`, a single sequence, over its rows [begin, end).
  void replay(State& one, int64_t begin, int64_t end) const;
  // The mixer of each row [begin, end) of `one` by its place in mixer_names(): [end - begin] int8, undefined where there is no choice.
  at::Tensor places(const State& one, int64_t begin, int64_t end) const;

  // True where each mixer's query is projected at every one of a batch's `tokens`, however few are the mixer's: the shapes of a pass then do not depend on the modes.
  bool whole_queries(int64_t tokens, at::Device device) const;

  const std::vector<std::string>& mixer_names() const { return names_; }
  const Mixer& mixer(size_t m) const { return *mixers_[m]; }
  const LayerConfig& config() const { return config_; }

 private:
  // A key/value projection with its convolutions: one for the layer, or one a mixer (share_kv false).
  struct KeyValueGroup {
    std::string prefix;  // "" or "attention."
    bool keeps_tokens = false;
    at::Tensor k_proj, v_proj, k_conv, v_conv, k_conv_bias, v_conv_bias;
  };
  struct Query {
    std::string name;  // the projection's name: several mixers may share one
    at::Tensor proj, conv, conv_bias;
    bool everywhere = false;  // needed at every token: a convolution runs over it, or several mixers read it
  };
  struct KeyValues {
    at::Tensor k, v;
    KeyValueCache cache;
    bool cached = false;
  };

  bool combines_all() const { return config_.combine == "mean"; }
  const KeyValueGroup& group_of(size_t mixer) const { return groups_[config_.share_kv ? 0 : mixer]; }
  KeyValueCache past_and_present(const KeyValueGroup& group, const at::Tensor& k, const at::Tensor& v, ForwardPass& pass) const;
  KeyValueCache in_pages(const KeyValueGroup& group, int64_t tokens, ForwardPass& pass) const;
  KeyValueCache bounded(const KeyValueGroup& group, const at::Tensor& k, const at::Tensor& v, const std::vector<int64_t>& counts, ForwardPass& pass) const;
  void add_kept(const KeyValueGroup& group, const std::vector<int64_t>& begins, const ForwardPass& pass, KeyValueCache& cache) const;
  bool choose_rows(const Projections& u, const std::vector<KeyValues>& kvs, ForwardPass& pass) const;
  at::Tensor keep(const std::string& slot, const at::Tensor& rows, ForwardPass& pass) const;
  KeyValues project_kv(const KeyValueGroup& group, const Projections& u, ForwardPass& pass) const;
  at::Tensor project_query(const Query& query, const TokenSet& tokens, const Projections& u) const;
  at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const std::string& slot, ForwardPass& pass) const;
  at::Tensor mix(const at::Tensor& u, const Routing& routing, ForwardPass& pass) const;
  void project_ahead(Projections& reads, const Routing& routing) const;
  at::Tensor gated(const at::Tensor& o, const Projections& u) const;
  at::Tensor feed_forward(const at::Tensor& h) const;
  std::pair<at::Tensor, at::Tensor> norm_before(const at::Tensor& delta, const at::Tensor& stream, const at::Tensor& weight) const;
  at::Tensor contribution(const at::Tensor& y, const at::Tensor& norm) const;

  LayerConfig config_;
  int64_t index_;
  std::string prefix_;
  bool silu_ = false;  // the convolutions' activation
  std::vector<std::string> names_;
  std::vector<std::unique_ptr<Mixer>> mixers_;
  std::vector<KeyValueGroup> groups_;   // one, or one a mixer
  std::vector<Query> queries_;          // one a mixer
  at::Tensor norm1_, norm2_, g_proj_, o_norm_, o_proj_, gate_proj_, up_proj_, down_proj_;
};

// What an RMSNorm with this parameter multiplies by: the weight, or 1 + weight (zero_centred_norm).
at::Tensor norm_factor(const LayerConfig& config, const at::Tensor& weight);

}  // namespace oryx
