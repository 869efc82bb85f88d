// A model on disk: a folder with config.json and model.safetensors (and, by the trainer, what else it needs).
#pragma once

#include <filesystem>
#include <memory>

#include "oryx/io/safetensors.h"
#include "oryx/model/language_model.h"

namespace oryx {

// Writes FOLDER/config.json and FOLDER/model.safetensors. Both appear, or what stood there stays.
void save_model(const LanguageModel& model, const std::filesystem::path& folder);

// Reads a folder written by save_model. Throws Error naming file, key or tensor for anything missing, extra, of another shape or dtype.
std::unique_ptr<LanguageModel> load_model(const std::filesystem::path& folder, at::ScalarType compute = at::kFloat);

// Throws Error unless the file holds every parameter, with its shape, in F32, BF16 or F16 (F64 for checks), and nothing else.
void check_parameters(const std::vector<ParameterSpec>& specs, const SafetensorsReader& file);

// Copies the file's tensors into the parameters; throws as check_parameters does.
void load_parameters(LanguageModel& model, const SafetensorsReader& file);

// A list of named parameters, in order.
NamedTensors named_parameters(const LanguageModel& model);

}  // namespace oryx
