#include "oryx/generate/slot_decoder.h"

namespace oryx {

namespace {

// Filled by a static initialiser of a build with CUDA, read-only afterwards.
detail::SlotDecoderFactory& slot_decoder_factory() {
  static detail::SlotDecoderFactory f = nullptr;
  return f;
}

}  // namespace

bool detail::register_slot_decoder(SlotDecoderFactory f) {
  slot_decoder_factory() = f;
  return true;
}

std::unique_ptr<SlotDecoder> make_slot_decoder(const LanguageModel& model, const StateOptions& state, std::string* why) {
  std::string reason;
  if (!model.device().is_cuda()) reason = "the model is not on a GPU";
  if (reason.empty() && state.kept.on()) reason = "the state keeps rows by choice, which the host makes";
  if (reason.empty() && (state.ring > 0 || state.checkpoint_every > 0)) reason = "the state keeps a ring of convolution inputs, or checkpoints";
  if (reason.empty() && slot_decoder_factory() == nullptr) reason = "this build has no CUDA";
  if (reason.empty()) {
    if (auto decoder = slot_decoder_factory()(model, state, &reason)) return decoder;
  }
  if (why != nullptr) *why = reason;
  return nullptr;
}

}  // namespace oryx
