// Captured decoding: the FusedDecoder of the models that the fused kernels do not know, over the chain of captured_chain_cuda.h.
#include "oryx/generate/captured_chain_cuda.h"
#include "oryx/generate/captured_decoder.h"
#include "oryx/generate/fused_chain_cuda.h"
#include "oryx/generate/state_decoder_cuda.h"

namespace oryx::captured {
namespace {

std::unique_ptr<FusedDecoder> make_captured(const LanguageModel& model, State& state, int64_t tokens, std::string* why) {
  *why = fused::device_refusal(model.device());
  if (why->empty()) *why = refusal(model);
  if (why->empty()) *why = refusal(state.options());
  if (why->empty() && state.sequences() > Chain::kMost) *why = fmt::format("{} sequences, expected at most {}", state.sequences(), Chain::kMost);
  if (!why->empty()) return nullptr;
  return std::make_unique<fused::StateDecoder<Chain>>(model, state, tokens);
}

const bool registered_captured = detail::register_captured_decoder(make_captured);

}  // namespace
}  // namespace oryx::captured
