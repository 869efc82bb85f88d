#include "oryx/generate/verifier.h"

#include "oryx/generate/fused_decoder.h"

namespace oryx {

namespace {

// Filled by a static initialiser of a build with CUDA, read-only afterwards.
detail::DraftVerifierFactory& verifier_factory() {
  static detail::DraftVerifierFactory f = nullptr;
  return f;
}

}  // namespace

bool detail::register_draft_verifier(DraftVerifierFactory f) {
  verifier_factory() = f;
  return true;
}

std::unique_ptr<DraftVerifier> make_draft_verifier(const LanguageModel& model, State& state, int64_t tokens, std::string* why) {
  std::string reason;
  if (!model.device().is_cuda()) {
    reason = "the model is not on a GPU";
  } else if (verifier_factory() == nullptr) {
    reason = "this build has no CUDA";
  } else {
    reason = detail::fused_refusal(model, state.options());
    if (reason.empty()) {
      if (auto verifier = verifier_factory()(model, state, tokens, &reason)) return verifier;
    }
  }
  if (why != nullptr) *why = reason;
  return nullptr;
}

}  // namespace oryx
