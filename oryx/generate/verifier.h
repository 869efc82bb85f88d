// On a GPU: a few tokens of one sequence by one captured launch, weights, keys and values read once for all of them (docs/generation.md). What DraftedSession verifies its drafts by, where there
// is one; the generic way is a pass of ModelInput::as_steps.
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

class DraftVerifier {
 public:
  virtual ~DraftVerifier() = default;

  // Tokens of a pass at most; two at least.
  virtual int64_t most() const = 0;
  // As FusedDecoder::fits, for `tokens` tokens.
  virtual bool fits(int64_t tokens) = 0;
  // ids [T] behind those that the state holds; routing of [1, T] tokens -> logits [T, vocabulary], which the next pass overwrites. The state's lengths, recurrent slots and tails stay what they
  // were until keep() makes the first `count` of the tokens (at least one) part of the sequence: before anything else is done with the state. Neither waits for the device. Throws Error
  // for ids outside of the vocabulary.
  virtual at::Tensor run(const std::vector<int32_t>& ids, const std::vector<std::shared_ptr<const Routing>>& routing) = 0;
  virtual void keep(int64_t count) = 0;
};

// Null, with the reason in *why when given, where the model, its device or the state is not one that it knows. Model and state, of one sequence, must outlive it. `tokens`: what the state
// will hold at most.
std::unique_ptr<DraftVerifier> make_draft_verifier(const LanguageModel& model, State& state, int64_t tokens, std::string* why = nullptr);

namespace detail {
using DraftVerifierFactory = std::unique_ptr<DraftVerifier> (*)(const LanguageModel&, State&, int64_t tokens, std::string* why);
bool register_draft_verifier(DraftVerifierFactory factory);
}  // namespace detail

}  // namespace oryx
