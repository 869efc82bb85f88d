// oryx inspect: what a model is made of and what it costs, before or after it exists.
#include "oryx/cli/command.h"
#include "oryx/cli/inspect_report.h"
#include "oryx/cli/model_folder.h"
#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/options.h"
#include "oryx/model/checkpoint.h"
#include "oryx/train/options.h"

namespace oryx::cli {

namespace fs = std::filesystem;

namespace {

struct InspectArguments {
  std::vector<std::string> arguments;  // the subject, then key=value
  std::vector<int64_t> contexts = {1024, 8192, 32768, 131072};
  std::string family, precision = "float32", kv = "keep";
  StateOptions state;
  bool list = false, keys = false, json = false;

  at::ScalarType compute() const { return precision == "bfloat16" ? at::kBFloat16 : at::kFloat; }
};

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

bool is_folder(const std::string& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}

// The first argument, unless it is an override; the rest are overrides.
std::string take_subject(std::vector<std::string>& arguments) {
  if (arguments.empty()) return "";
  const std::string first = arguments.front();
  if (first.find('=') != std::string::npos && !exists(first)) return "";
  arguments.erase(arguments.begin());
  return first;
}

bool is_preset(const std::string& name) {
  for (const auto& size : preset_sizes()) {
    if (name == size) return true;
    for (const auto& variant : preset_variants()) {
      if (name == size + "-" + variant) return true;
    }
  }
  return false;
}

void refuse_overrides(const std::string& subject, const std::vector<std::string>& overrides, std::string_view hint) {
  if (!overrides.empty()) fail("{}: '{}' cannot change what is there already; {}", subject, overrides.front(), hint);
}

// What other commands look into is not taken for a broken model.
void refuse_what_is_no_model(const std::string& path) {
  if (exists(path + "/dataset.json") || path.ends_with(".tok")) fail("{}: holds tokens, not a model; look into it with: oryx data inspect {}", path, path);
  if (!is_folder(path) && (path.ends_with(".model") || path.ends_with(".jsonl"))) {
    fail("{}: no model by its name; expected a config.json, a .safetensors file, or the folder of a model or a training run", path);
  }
}

// A model's config, or a training run's, which holds one.
ModelConfig config_of_file(const std::string& path, const std::vector<std::string>& overrides) {
  const Json json = read_json_file(path);
  const bool training = json.is_object() && (json.contains("model") || json.contains("preset"));
  return training ? load_train_options(path, overrides).model : load_options<ModelConfig>(path, overrides);
}

ModelConfig config_of_preset(const std::string& name, const std::vector<std::string>& overrides) {
  ModelConfig c = preset(name);
  read_options(c, Json::object(), name, overrides);
  return c;
}

void show(const InspectArguments& o, const Json& report, std::string (*text)(const Json&)) {
  write(o.json ? report.dump(2) + "\n" : text(report));
}

void inspect_folder(const InspectArguments& o, const std::string& path) {
  const fs::path folder = model_folder(path);
  if (!exists(folder / "model.safetensors")) {
    fail("{}: holds no model.safetensors; expected a model's folder, or a training run with a folder 'model'", path);
  }
  const auto config = load_options<ModelConfig>(folder / "config.json");
  const SafetensorsReader file(folder / "model.safetensors");
  check_parameters(LanguageModel::parameter_specs(config), file);
  Json report = model_report(folder.string(), config, o.contexts, o.compute(), o.state);
  const Json tensors = tensors_report(file);
  report["checkpoint"] = {
      {"file", file.path()}, {"tensors", tensors["count"]}, {"bytes", tensors["bytes"]}, {"matches_config", true}};
  show(o, report, [](const Json& r) {
    return model_text(r) + fmt::format("\nmodel.safetensors holds the config's {} tensors, each with its shape\n",
                                       r["checkpoint"]["tensors"].get<int64_t>());
  });
}

void inspect_subject(const InspectArguments& o, const std::string& subject, const std::vector<std::string>& overrides) {
  if (is_preset(subject))
    return show(o, model_report(subject, config_of_preset(subject, overrides), o.contexts, o.compute(), o.state), model_text);
  if (exists(subject)) refuse_what_is_no_model(subject);
  if (is_folder(subject)) {
    refuse_overrides(subject, overrides, "name its config.json to try other values");
    return inspect_folder(o, subject);
  }
  const bool tensors = subject.ends_with(".safetensors"),
             path = subject.find('/') != std::string::npos || subject.ends_with(".json");
  if (tensors) {
    refuse_overrides(subject, overrides, "name a preset or a config to try values");
    return show(o, tensors_report(SafetensorsReader(subject)), tensors_text);
  }
  const bool file = path || exists(subject);
  const ModelConfig config = file ? config_of_file(subject, overrides) : config_of_preset(subject, overrides);
  show(o, model_report(subject, config, o.contexts, o.compute(), o.state), model_text);
}

void inspect(InspectArguments o) {
  set_kv(o.state, o.kv);
  const std::string subject = take_subject(o.arguments);
  const int wanted = int{!subject.empty()} + int{!o.family.empty()} + o.keys + o.list;
  if (wanted != 1) {
    fail(
        "expected one of: a preset, a config.json, a .safetensors file, a model's folder, --family SIZE, --keys, "
        "--list; see oryx inspect --help");
  }
  if (o.keys) return write(options_table<ModelConfig>());
  if (o.list) return show(o, list_report(), list_text);
  if (!o.family.empty()) return show(o, family_report(o.family, o.arguments), family_text);
  inspect_subject(o, subject, o.arguments);
}

ORYX_COMMAND(inspect, "parameters, FLOPs and state bytes of a model, by part and by mode", [](CLI::App& app) {
  auto o = std::make_shared<InspectArguments>();
  app.add_option(
         "subject", o->arguments,
         "a preset (see --list), a model's or a training run's config.json, a .safetensors file, or a folder of a "
         "model or run; then key=value to try other values")
      ->type_name("SUBJECT [KEY=VALUE ...]");
  app.add_option("--context", o->contexts, "context lengths in tokens, separated by commas")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  app.add_option("--precision", o->precision, "of activations: the type of tails, keys and values")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  app.add_option("--kv", o->kv, "keys and values that a state holds: keep, drop, bounded:F+W (those of the first F and the last W tokens), or rows chosen by a policy, as surprise:budget=256 (docs/state.md)")
      ->type_name("POLICY")
      ->capture_default_str();
  app.add_option("--family", o->family, "the variants of a size, matched in parameters by intermediate_size")
      ->type_name("SIZE");
  app.add_flag("--keys", o->keys, "the keys of a model's config.json, as a Markdown table");
  app.add_flag("--list", o->list, "the presets: sizes and variants");
  app.add_flag("--json", o->json, "print JSON with exact numbers");
  app.callback([o] { inspect(*o); });
});

}  // namespace
}  // namespace oryx::cli
