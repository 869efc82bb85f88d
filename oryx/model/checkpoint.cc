#include "oryx/model/checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <array>
#include <set>

#include "oryx/common/options.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace fs = std::filesystem;

NamedTensors named_parameters(const LanguageModel& model) {
  NamedTensors out;
  for (size_t i = 0; i < model.specs().size(); ++i) out.emplace_back(model.specs()[i].name, model.parameters()[i]);
  return out;
}

void save_model(const LanguageModel& model, const fs::path& folder) {
  make_folders(folder);
  AtomicFile tensors(folder / "model.safetensors"), config(folder / "config.json");
  put_safetensors(tensors, named_parameters(model), {{"format", "oryx"}});
  config.write(dump_options(model.config()));
  commit_together(std::array{&tensors, &config});
}

void check_parameters(const std::vector<ParameterSpec>& specs, const SafetensorsReader& file) {
  std::set<std::string> expected;
  for (const auto& spec : specs) {
    expected.insert(spec.name);
    const auto it = file.tensors().find(spec.name);
    if (it == file.tensors().end()) fail("{}: tensor '{}' is missing; is this the checkpoint of another config?", file.path(), spec.name);
    if (it->second.shape != spec.shape) {
      fail("{}: tensor '{}' has shape [{}], the config wants [{}]", file.path(), spec.name, fmt::join(it->second.shape, ", "), fmt::join(spec.shape, ", "));
    }
    if (!at::isFloatingType(it->second.dtype)) {
      fail("{}: tensor '{}' is {}, expected F32, BF16 or F16", file.path(), spec.name, safetensors_dtype(it->second.dtype));
    }
  }
  for (const auto& [name, info] : file.tensors()) {
    if (expected.count(name) == 0) fail("{}: tensor '{}' is not part of the model; is this the checkpoint of another config?", file.path(), shown(name));
  }
}

void load_parameters(LanguageModel& model, const SafetensorsReader& file) {
  at::NoGradGuard no_grad;
  check_parameters(model.specs(), file);
  for (size_t i = 0; i < model.specs().size(); ++i) {
    at::Tensor parameter = model.parameters()[i];
    parameter.copy_(file.load(model.specs()[i].name));
  }
  model.refresh_copies();
}

std::unique_ptr<LanguageModel> load_model(const fs::path& folder, at::ScalarType compute) {
  if (!fs::is_directory(folder)) fail("{}: is no folder, expected one with config.json and model.safetensors", folder.string());
  const ModelConfig config = load_options<ModelConfig>(folder / "config.json");
  const SafetensorsReader file(folder / "model.safetensors");
  check_parameters(LanguageModel::parameter_specs(config), file);  // refused before the model's memory is taken
  auto model = std::make_unique<LanguageModel>(config, compute);
  load_parameters(*model, file);
  return model;
}

}  // namespace oryx
