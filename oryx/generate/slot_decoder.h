// Decoding on a GPU for sequences that come and go: one token of some of the sequences of a state, others at the next step, by captured launches.
//
// The state's sequences are places (State::seat, clear) whose recurrent states do not move; rows are pages of one pool (StateOptions::row_pages). Which places a step runs, their
// tokens, modes, positions and pages are device data: there is a capture for each of a few sizes of batch, with and without attention, and texts that join or leave change none.
//
// What a sequence in linear modes gets is bit for bit the same in any company. Attention cuts the keys of all sequences to even shares, so that the borders at which its sums in
// float32 are put together depend on the others' lengths: outputs may differ there in the last bit of bfloat16.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "oryx/generate/sampling.h"
#include "oryx/model/language_model.h"
#include "oryx/state/state.h"

namespace oryx {

class SlotDecoder {
 public:
  static constexpr int32_t kGiven = -1;

  struct Row {
    int64_t slot = 0;                // which sequence of the state; each at most once in a step
    int32_t id = 0;                  // its token, or kGiven: what its last step gave, which the host need not know yet
    const uint8_t* modes = nullptr;  // [layers] the place of the token's mixer among the layer's
    int64_t below = 0;               // what comes next is one of so many ids; 0: of all
    const SamplingOptions* sampling = nullptr;  // null: the likeliest one
    bool logits = false;             // the host wants them
  };
  // What is behind the token of each row.
  struct Results {
    // As sample_token gives it for the position behind; drawn from weights in float32, so that another token than the host's comes where the uniform number lies within that rounding of a
    // border, one draw in 10^5 or less. -1 where a logit is NaN or +inf, or none is finite.
    std::vector<int32_t> tokens;
    std::vector<at::Tensor> logits;   // [vocabulary] on the CPU; undefined where they were not wanted
  };
  // Waits for the device; may be called after further steps, once.
  using Pending = std::function<Results()>;

  virtual ~SlotDecoder() = default;

  // The state to decode over, which must outlive the decoder; of the options that it was made for, with row_pages where rows are kept.
  virtual void attach(State& slots) = 0;
  // Runs a token of each row behind those that its sequence holds, any number of rows. The state holds them when it returns, without a wait. Throws Error for ids outside of the
  // vocabulary and when the state has no room.
  virtual Pending step(std::span<const Row> rows) = 0;
};

// Null, with the reason in *why when given, where the model, its device or states of these options are none that it knows. The model must outlive it.
std::unique_ptr<SlotDecoder> make_slot_decoder(const LanguageModel& model, const StateOptions& state, std::string* why = nullptr);

namespace detail {
using SlotDecoderFactory = std::unique_ptr<SlotDecoder> (*)(const LanguageModel&, const StateOptions& state, std::string* why);
bool register_slot_decoder(SlotDecoderFactory factory);
}  // namespace detail

}  // namespace oryx
