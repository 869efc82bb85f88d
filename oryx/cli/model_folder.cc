#include "oryx/cli/model_folder.h"

#include "oryx/bench/bench.h"
#include "oryx/common/error.h"
#include "oryx/model/checkpoint.h"
#include "oryx/model/device.h"

namespace oryx::cli {

namespace fs = std::filesystem;

fs::path model_folder(const fs::path& path) {
  std::error_code ignored;
  if (!fs::exists(path / "model.safetensors", ignored) && fs::is_directory(path / "model", ignored)) return path / "model";
  return path;
}

namespace {

// A folder that holds a tokeniser of a kind that is read here, or "". An imported model may carry another kind's files along.
fs::path tokenizer_folder(const fs::path& model, const fs::path& given) {
  for (const auto& folder : {model, given}) {
    if (holds_tokenizer(folder)) return folder;
  }
  return {};
}

}  // namespace

void ModelArguments::add_to(CLI::App& app) {
  app.add_option("MODEL", folder, "folder of a model, or of a training run")->required();
  app.add_option("--tokenizer", tokenizer, "tokeniser file or folder, or 'byte' (default: the model's own)")->type_name("PATH");
  app.add_option("--precision", precision, "of activations")->check(CLI::IsMember({"float32", "bfloat16"}))->capture_default_str();
  app.add_option("--device", device, "where the model runs: cpu, cuda or cuda:N")->capture_default_str();
}

void check_model_folder(const fs::path& path) {
  const fs::path folder = model_folder(path);
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) fail("{}: is no folder, expected one with config.json and model.safetensors", folder.string());
  if (!fs::exists(folder / "config.json", ignored)) {
    fail("{}: holds no config.json; expected a model's folder, or a training run with a folder 'model'", folder.string());
  }
  if (fs::exists(folder / "model.safetensors", ignored)) return;
  if (fs::exists(folder / "lock", ignored)) fail("{}: is a training run that has saved no checkpoint yet; train on with: oryx train --resume {}", folder.string(), folder.string());
  fail("{}: holds no model.safetensors; expected a model's folder, or a training run with a folder 'model'", folder.string());
}

namespace {

// Brings the model to its device and checks the tokeniser against it.
LoadedModel placed(LoadedModel out, at::Device device) {
  out.model->to(device);
  if (!device.is_cpu()) out.model->keep_copies();  // else each pass casts every matrix again
  if (out.tokenizer && out.tokenizer->vocab_size() > out.model->config().vocab_size) {
    fail("{}: the tokeniser has {} tokens, the model {}; do they belong together?", out.name, out.tokenizer->vocab_size(),
         out.model->config().vocab_size);
  }
  return out;
}

at::ScalarType compute_of(const ModelArguments& a) { return a.precision == "bfloat16" ? at::kBFloat16 : at::kFloat; }

}  // namespace

LoadedModel load(const ModelArguments& a) {
  LoadedModel out;
  const at::Device device = parse_device(a.device);
  const fs::path folder = model_folder(a.folder);
  out.name = folder.string();
  check_model_folder(folder);
  const fs::path tokenizer = a.tokenizer.empty() ? tokenizer_folder(folder, a.folder) : fs::path(a.tokenizer);
  if (!tokenizer.empty()) out.tokenizer = load_tokenizer(tokenizer);
  out.model = load_model(folder, compute_of(a));
  return placed(std::move(out), device);
}

LoadedModel load_random(const ModelArguments& a) {
  LoadedModel out;
  const at::Device device = parse_device(a.device);
  out.name = a.folder;
  if (!a.tokenizer.empty()) out.tokenizer = load_tokenizer(a.tokenizer);
  out.model = std::make_unique<LanguageModel>(BenchModel{.preset = a.folder}.config(), compute_of(a));
  out.model->initialize(0);
  return placed(std::move(out), device);
}

}  // namespace oryx::cli
