// Import and export of published Hugging Face checkpoints: tensors are cut, joined and renamed, never computed with, so that both ways keep
// every bit and the dtype (docs/importing.md).
#pragma once

#include <filesystem>
#include <string>

#include "oryx/model/config.h"

namespace oryx {

struct Conversion {
  std::string family;  // model_type
  ModelConfig config;
  int64_t tensors = 0, parameters = 0;  // of the checkpoint that was written
};

// HF_DIR (config.json; model.safetensors or shards with an index; a tokeniser's files) -> a model's folder `out`, which also keeps the
// original config.json as hf_config.json. `out` must not be there yet, or be empty; it appears whole or not at all. Throws Error for an
// unknown architecture, an option that is not supported, and a tensor that is missing, extra or of another shape.
Conversion import_checkpoint(const std::filesystem::path& hf_folder, const std::filesystem::path& out);

// What an import makes of a config.json alone. Throws Error as it does.
ModelConfig read_published_config(const std::filesystem::path& config_json);

// A model's folder -> config.json and model.safetensors as transformers reads them: of the family it was imported from, byte for byte the
// config it came with; a model of our own becomes the family that has its shape. Throws Error, naming a key, where there is none.
Conversion export_checkpoint(const std::filesystem::path& model_folder, const std::filesystem::path& out);

}  // namespace oryx
