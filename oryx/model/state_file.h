// A state on disk: a session that goes on later, in another process, without reading its tokens again.
#pragma once

#include <filesystem>
#include <string>

#include "oryx/model/language_model.h"
#include "oryx/state/state.h"

namespace oryx {

// 16 hexadecimal digits of config, activations' type and every weight: two models that differ in any of them have, but for chance, different ones. Reads
// all weights once.
std::string fingerprint(const LanguageModel& model);

// Writes the state as one safetensors file, whole or absent: for sequence N of layer I (the last I holds the token ids) "sequenceN.I.SLOT", and
// "sequenceN.checkpointC.I.SLOT" for its checkpoints; metadata: format ("oryx-state 1"), model (the fingerprint), lengths, checkpoints (positions, ";"
// between sequences), checkpoint_every, ring, keep_rows, drop_rows. The ring itself is not kept.
void save_state(const LanguageModel& model, const State& state, const std::filesystem::path& path);

// Throws Error, one line, for a file of another model, of another format, or with a tensor that is missing or of another shape or dtype.
// `budget` as in StateOptions; the other options are the file's.
State load_state(const LanguageModel& model, const std::filesystem::path& path, int64_t budget = 0);

}  // namespace oryx
