// Decoding on a GPU as one captured launch a token: embedding, every layer in the mode of each sequence, head and likeliest token, over the slots of a State in place.
//
// The generic way is LanguageModel::hidden with one token a row; this is the same arithmetic for the models that it knows (docs/generation.md), with weights packed once as
// bfloat16 and no launch but one. Modes, tokens and positions are device data: whatever changes from token to token, the capture stays.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/model/routing.h"
#include "oryx/state/state.h"

namespace oryx {

class FusedDecoder {
 public:
  virtual ~FusedDecoder() = default;

  // Whether the state's rows lie where step() can write into them: true for a state that was reserved, false behind a fork that shares pages with it.
  virtual bool fits() = 0;

  // ids [N], one token of each sequence behind those held; routing as in ModelInput, of [N, 1] tokens. The state's slots, rows and lengths are then those after the
  // token. -> logits [N, vocabulary], bfloat16 or float32, which the next step overwrites. Does not wait for the device. Throws Error for ids outside of the vocabulary, and
  // for attention over rows that were dropped. The state may be changed by others between steps.
  virtual at::Tensor step(const std::vector<int32_t>& ids, const std::vector<std::shared_ptr<const Routing>>& routing) = 0;

  // Behind a step: the sequences' final hidden states [N, D], normalised, as LanguageModel::hidden() has them. Only of a decoder that was asked for as one that has them.
  virtual at::Tensor hidden() const = 0;

  // Of the first `below` logits of the last step (0: all), the likeliest, the first of equals: [N] int32 on the device.
  virtual at::Tensor likeliest() const = 0;
  // With `on` the likeliest token becomes the next one without the host: step({}, routing) then runs it.
  virtual void feed_back(bool on, int64_t below = 0) = 0;

  // Bytes of weights that a step reads when all sequences are in one mode (by its place among the layer's mixers).
  virtual int64_t weight_bytes(int64_t place) const = 0;
};

// Null, with the reason in *why when given, where the model, its device or the state is not one that it knows. Model and state must outlive it.
// `tokens`: what the state will hold at most. With `hidden` one that has hidden states.
std::unique_ptr<FusedDecoder> make_fused_decoder(const LanguageModel& model, State& state, int64_t tokens, std::string* why = nullptr, bool hidden = false);

namespace detail {
// Why the model, over states of these options, is none that the fused decoders know, on whichever GPU; empty: it is.
std::string fused_refusal(const LanguageModel& model, const StateOptions& state);
using FusedDecoderFactory = std::unique_ptr<FusedDecoder> (*)(const LanguageModel&, State&, int64_t tokens, std::string* why);
bool register_fused_decoder(FusedDecoderFactory factory);
}  // namespace detail

}  // namespace oryx
