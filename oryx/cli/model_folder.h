// What the commands that use a trained model take from its folder.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "oryx/cli/command.h"
#include "oryx/data/tokenizer.h"
#include "oryx/model/language_model.h"

namespace oryx::cli {

struct ModelArguments {
  std::string folder;                 // of a model, or of a training run, whose newest model is in RUN/model
  std::string tokenizer;              // "": the folder's own
  std::string precision = "float32";  // of activations: float32 or bfloat16
  std::string device = "cpu";         // cpu, cuda or cuda:N

  // Adds MODEL, --tokenizer, --precision and --device.
  void add_to(CLI::App& app);
};

struct LoadedModel {
  std::unique_ptr<LanguageModel> model;
  std::unique_ptr<Tokenizer> tokenizer;  // null when the folder holds none
  std::string name;                      // the model's folder
};

// The folder of the model itself: RUN/model for a training run, else `path`.
std::filesystem::path model_folder(const std::filesystem::path& path);

// Throws Error where load() would find no model, for commands that come to it late.
void check_model_folder(const std::filesystem::path& path);

// Throws Error for a damaged folder, and when tokeniser and model do not fit together.
LoadedModel load(const ModelArguments& arguments);
// The same with a preset or a training config in place of a folder: a model of random weights, for load tests. The tokeniser must be given.
LoadedModel load_random(const ModelArguments& arguments);

}  // namespace oryx::cli
