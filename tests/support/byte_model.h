#pragma once

#include <cstdint>
#include <filesystem>

#include "oryx/data/tokenizer.h"
#include "oryx/model/checkpoint.h"

namespace oryx::test {

// Writes a model of preset `tiny` for the byte tokeniser (--tokenizer byte) to the folder `path`.
inline void save_byte_model(const std::filesystem::path& path, uint64_t seed = 1) {
  ModelConfig c = preset("tiny");
  c.vocab_size = make_byte_tokenizer()->vocab_size();
  LanguageModel model(c);
  model.initialize(seed);
  save_model(model, path);
}

}  // namespace oryx::test
