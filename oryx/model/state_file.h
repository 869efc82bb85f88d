// A state on disk: a session that goes on later, in another process, without reading its tokens again.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/state/state.h"

namespace oryx {

// 16 hexadecimal digits of config, activations' type and every weight: two models that differ in any of them have, but for chance, different ones. Reads
// all weights once.
std::string fingerprint(const LanguageModel& model);

// What the routers of a schedule go on by (oryx/generate/routed_text.h): nothing, or all of it for every token of a text.
struct TextRouters {
  std::vector<int32_t> ids;                         // of all its tokens
  at::Tensor hidden;                                // [D] float32, CPU: the final hidden state after the last one
  std::vector<std::pair<int64_t, int64_t>> prompts; // which of them were given and not written (TokenFacts::prompts)
  std::map<std::string, std::vector<float>> gains;  // by GainHead::identity: what was predicted for each; NaN: nothing
  bool known() const { return hidden.defined(); }
};

// Where the text of a session of one sequence stands, so that it can be gone on with at once: what a state does not say.
struct TextEnd {
  static constexpr size_t kIds = 16;
  at::Tensor logits;         // [V] float32, CPU: after the last token; undefined: not known, the text is gone on with by more tokens
  std::vector<int32_t> ids;  // the last kIds tokens at most: a character may be half written
  TextRouters routers;       // of a schedule that has any
};

// Writes the state as one safetensors file, whole or absent: for sequence N of layer I (the last I holds the token ids) "sequenceN.I.SLOT", and
// "sequenceN.checkpointC.I.SLOT" for its checkpoints; metadata: format ("oryx-state 1"), model (the fingerprint), lengths, checkpoints (positions, ";"
// between sequences), checkpoint_every, ring, keep_rows, drop_rows. The ring itself is not kept. An `end` whose logits are defined is kept as "end.logits" and "end.ids", what its
// routers know as "router.ids", "router.hidden", "router.prompts" (begins and ends in turns) and "router.gains.IDENTITY".
void save_state(const LanguageModel& model, const State& state, const std::filesystem::path& path, const TextEnd& end = {});

// Throws Error, one line, for a file of another model, of another format, or with a tensor that is missing or of another shape or dtype.
// `budget` as in StateOptions; the other options are the file's. `end` becomes what the file holds of it, which may be nothing.
State load_state(const LanguageModel& model, const std::filesystem::path& path, int64_t budget = 0, TextEnd* end = nullptr);

}  // namespace oryx
