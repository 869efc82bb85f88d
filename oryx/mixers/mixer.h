// The interface of a sequence mixer. A mixer is added by a file pair that derives from Mixer and ends in one ORYX_REGISTER_MIXER line.
//
// A layer computes keys, values and queries and hands them to its mixers; a mixer returns the mixed values of the tokens it is
// asked for and brings its own state up to date over every token.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/stack.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "oryx/mixers/layer_config.h"
#include "oryx/mixers/parameter.h"
#include "oryx/mixers/projections.h"
#include "oryx/state/state.h"

namespace oryx {

// The sequences of a batch: B rows of T tokens, or one row of packed documents.
struct Sequences {
  std::optional<at::Tensor> cu_seqlens;  // [N + 1] int32: packed (B = 1)
  at::Tensor positions;                  // [B, T] int32: index within the document, past tokens counted
};

// Keys and values of all tokens so far, for mixers that look back: side by side, or, of one token a sequence on the CPU, in the pages where they stand.
struct KeyValueCache {
  at::Tensor keys, values;  // [N, longest, Hk, K or V]; keys before RoPE
  at::Tensor lengths;       // [N] int32 on the CPU: rows of them, those of this call's tokens last; the longest has `longest`
  // A bounded state (RowWindow): query t sees token s when s < first or s > t - window. The rows above are then the last ones only.
  int64_t window = 0;                    // 0: every row, and what is said of first rows is undefined
  at::Tensor starts = {};                     // [N] int32 on the CPU: the position of row 0; undefined: 0
  // Where the keys are, int32, the same in all layers: positions of the rows [N, longest] and of the first rows [N, first]; and the lengths.
  at::Tensor positions = {}, first_positions = {}, lengths_there = {};
  at::Tensor first_keys = {}, first_values = {};  // [N, first, Hk, K or V]: zeros behind a sequence's own
  // Rows between, that are kept by choice (KeptRows): query t sees token kept_positions when kept_from <= t < kept_until. Undefined where none are.
  at::Tensor kept_keys = {}, kept_values = {};                            // [N, kept, Hk, K or V]; finite
  at::Tensor kept_positions = {}, kept_from = {}, kept_until = {};        // [N, kept] int32 on the CPU
  // Pages of several pools (State::pages). Defined: of what stands above only lengths (all tokens), `window` and `first` count.
  at::Tensor blocks = {};
  std::vector<at::Tensor> key_pools = {}, value_pools = {};
  int64_t first = 0;

  bool made() const { return keys.defined() || blocks.defined(); }
};

struct MixerInput {
  at::Tensor u;                        // [B, T, D]: the layer's normalised input
  const Projections& project;          // matrix products of u: a mixer's own go through it
  at::Tensor q;                        // [B, T, H, K]: this mixer's query, meaningful within spans
  at::Tensor k, v;                     // [B, T, Hk, K], [B, T, Hv, V]: after convolution and activation
  std::optional<at::Tensor> spans;     // [n, 3] int32 (row, begin, end): tokens whose output is wanted; absent: all
  const Sequences& sequences;
  LayerState* state = nullptr;         // slots of this layer, updated in place; null: nothing before, nothing kept
  const KeyValueCache* cache = nullptr;  // present with a state, for a mixer that keeps_tokens()
  // Keeps a row a token of one of the mixer's row_slots(), [B, T, shape...], and returns the rows to go on with: where the state has those
  // tokens' rows already (State::trim) it is these. Empty where no rows are kept.
  std::function<at::Tensor(const std::string& slot, const at::Tensor& rows)> keep = {};
  ops::Copies* copies = nullptr;  // of the layer, run when its mixers are through
  // The tokens go one by one through the mixer's step, so that each gets the bits that it gets when it runs alone (ModelInput::as_steps; one sequence, with a state). stepped(slot, t) is
  // then called when token t has gone through a recurrent slot, where it is given.
  bool as_steps = false;
  std::function<void(const std::string& slot, int64_t t)> stepped = {};

  bool in_steps() const { return as_steps || (q.size(1) == 1 && !sequences.cu_seqlens); }
  // step(t) -> o [B, output heads, V] of token t, which brings the recurrent slot over it -> [B, T, output heads, V].
  template <class Step>
  at::Tensor by_token(const std::string& slot, Step step) const {
    std::vector<at::Tensor> o;
    for (int64_t t = 0; t < q.size(1); ++t) {
      o.push_back(step(t));
      if (stepped) stepped(slot, t);
    }
    return o.size() == 1 ? o[0].unsqueeze(1) : at::stack(o, 1);
  }

  // The slot `to` of the state becomes `value`; whoever reads it does so behind the layer's mixers.
  void store(const at::Tensor& to, const at::Tensor& value) const {
    if (copies == nullptr) return void(to.copy_(value));
    copies->add(to, value);
  }
};

// Rows of one sequence that the state holds, for a mixer that replays them.
struct MixerRows {
  at::Tensor k, v;                                          // [1, T, Hk, K], [1, T, Hk, V]
  std::function<at::Tensor(const std::string& slot)> own;  // of one of its row_slots(): [1, T, shape...]
};

// What a mixer adds to a token's cost, beyond the projections (2 FLOPs a weight). A multiply-add is 2 FLOPs.
struct MixerFlops {
  double every_token = 0;  // spent at each token, whatever its mode: the state's update
  double in_mode = 0;      // spent at a token in this mixer's mode: the readout, or attention over `context` keys
};

class Mixer {
 public:
  explicit Mixer(const LayerConfig& config) : config_(config) {}
  virtual ~Mixer() = default;

  virtual std::string name() const = 0;
  // Parameters of its own beside queries, keys and values, with names relative to the mixer ("A_log").
  virtual std::vector<ParameterSpec> parameters() const { return {}; }
  // State per sequence that it wants kept, beside keys and values.
  virtual std::vector<SlotSpec> slots() const { return {}; }
  // What it wants kept of each token beside keys and values, so that they determine its state: scalars. In layers that keep rows.
  virtual std::vector<SlotSpec> row_slots() const { return {}; }
  // Brings its recurrent slots (one sequence) over the rows, as forward() did when it saw those tokens.
  virtual void replay(const MixerRows& rows, LayerState& state) const { (void)rows, (void)state; }
  // True when it reads the keys and values of all earlier tokens (attention).
  virtual bool keeps_tokens() const { return false; }
  // True when its state must advance at every token, also at those in another mode (linear mixers).
  virtual bool advances_everywhere() const { return false; }
  // True when, in a layer with a mixer that looks back, keys and values are better left without an activation (`conv_activation` auto).
  virtual bool plain_keys() const { return false; }
  // The mixer whose query it reads where both stand in a layer, in place of one of its own; empty: none.
  virtual std::string borrows_query_of() const { return {}; }
  // Hands over its parameters (names as declared, under `prefix`).
  virtual void bind(const ParameterMap&, const std::string& prefix) { (void)prefix; }
  // True when surprise() says something.
  virtual bool predicts_values() const { return false; }
  // Of each token, [B, T] float32; nothing for a mixer that predicts no values.
  //   kSurprise  how badly the state before it predicts its value from its key: 0 wholly, 1 as badly as no state at all
  //   kWrite     how much it changes the state: the sum of squares of what it adds to it, beside the decay
  // From input.state on, which stays as it is; null: from the sequences' beginning. input.q and spans play no part.
  virtual std::optional<at::Tensor> surprise(const MixerInput& input, TokenMeasure measure) const { return (void)input, (void)measure, std::nullopt; }
  // -> o [B, T, output heads, V]; rows outside of spans are zero.
  virtual at::Tensor forward(const MixerInput& input) const = 0;
  virtual MixerFlops flops(int64_t context) const = 0;

 protected:
  LayerConfig config_;
};

std::unique_ptr<Mixer> make_mixer(const std::string& name, const LayerConfig& config);
std::vector<std::string> mixer_names();  // sorted

namespace detail {
using MixerFactory = std::unique_ptr<Mixer> (*)(const LayerConfig&);
bool register_mixer(const std::string& name, MixerFactory factory);
}  // namespace detail

#define ORYX_REGISTER_MIXER(name, type)                                                       \
  static const bool oryx_registered_##type = ::oryx::detail::register_mixer(                  \
      name, [](const ::oryx::LayerConfig& c) -> std::unique_ptr<::oryx::Mixer> { return std::make_unique<type>(c); })

}  // namespace oryx
