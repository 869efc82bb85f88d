#include "oryx/model/hf/convert.h"

#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <map>

#include "oryx/common/file.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/options.h"
#include "oryx/common/progress.h"
#include "oryx/common/utf8.h"
#include "oryx/io/sharded_safetensors.h"
#include "oryx/model/checkpoint.h"
#include "oryx/model/hf/family.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

constexpr const char* kOriginalConfig = "hf_config.json";
// What belongs to a tokeniser or to generation: carried along, never read here.
constexpr const char* kCompanions[] = {
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json",     "merges.txt",      "chat_template.jinja",   "chat_template.json",      "generation_config.json"};

using Shape = std::vector<int64_t>;
using Shapes = std::map<std::string, Shape>;  // of our parameters

Shapes shapes_of(const ModelConfig& c) {
  Shapes shapes;
  for (const auto& spec : LanguageModel::parameter_specs(c)) shapes.emplace(spec.name, spec.shape);
  return shapes;
}

// Every parameter of ours is held by their tensors once and whole. A family's own mistake, not the user's.
void check_rules(const std::vector<HfTensor>& rules, const Shapes& shapes) {
  std::map<std::string, int> held;
  for (const auto& rule : rules) {
    for (const auto& part : rule.parts) {
      const auto it = shapes.find(part.ours);
      TORCH_CHECK(it != shapes.end(), "import: ", rule.theirs, " holds ", part.ours, ", which the model has not");
      TORCH_CHECK(++held[part.ours] == 1, "import: ", part.ours, " is held twice");
      TORCH_CHECK(part.rows == 0 || part.rows * rule.groups == it->second[0], "import: ", rule.theirs, " holds ", part.rows * rule.groups,
                  " rows of ", part.ours, " of shape ", at::IntArrayRef(it->second));
    }
  }
  TORCH_CHECK(held.size() == shapes.size(), "import: ", shapes.size() - held.size(), " parameters are held by no tensor");
}

int64_t rows_of_group(const HfTensor& rule, const HfTensor::Part& part, const Shapes& shapes) {
  return part.rows > 0 ? part.rows : shapes.at(part.ours)[0] / rule.groups;
}

Shape shape_of(const HfTensor& rule, const Shapes& shapes) {
  Shape shape = shapes.at(rule.parts.front().ours);
  shape[0] = 0;
  for (const auto& part : rule.parts) shape[0] += rule.groups * rows_of_group(rule, part, shapes);
  if (rule.depthwise) shape.insert(shape.begin() + 1, 1);
  return shape;
}

// theirs -> ours, appended to `out`.
void take_apart(const HfTensor& rule, const at::Tensor& theirs, const Shapes& shapes, NamedTensors& out) {
  const at::Tensor grouped = theirs.view({rule.groups, theirs.size(0) / rule.groups, -1});  // [groups, rows of a group, rest]
  int64_t begin = 0;
  for (const auto& part : rule.parts) {
    const int64_t rows = rows_of_group(rule, part, shapes);
    out.emplace_back(part.ours, grouped.narrow(1, begin, rows).reshape(shapes.at(part.ours)));
    begin += rows;
  }
}

// The inverse. Every part must have the same dtype, which the whole then has.
at::Tensor put_together(const HfTensor& rule, const SafetensorsReader& file, const Shapes& shapes) {
  std::vector<at::Tensor> parts;
  for (const auto& part : rule.parts) {
    const at::Tensor ours = file.load(part.ours);
    if (!parts.empty() && ours.scalar_type() != parts.front().scalar_type()) {
      fail("{}: tensor '{}' is {} and '{}' is {}, expected one dtype: both become part of '{}'", file.path(), rule.parts.front().ours,
           safetensors_dtype(parts.front().scalar_type()), part.ours, safetensors_dtype(ours.scalar_type()), rule.theirs);
    }
    parts.push_back(ours.view({rule.groups, rows_of_group(rule, part, shapes), -1}));
  }
  return at::cat(parts, 1).reshape(shape_of(rule, shapes));
}

// A folder that appears whole: what `fill` writes goes to a folder beside it, which is then renamed.
void make_folder_whole(const fs::path& given, const std::function<void(const fs::path&)>& fill) {
  const fs::path out = given.has_filename() ? given : given.parent_path();  // "DIR/" is DIR
  std::error_code error;
  if (fs::exists(out, error) && !(fs::is_directory(out, error) && fs::is_empty(out, error))) {
    fail("{}: is there already; name a folder that is not, or an empty one", out.string());
  }
  const fs::path parent = out.has_parent_path() ? out.parent_path() : fs::path(".");
  make_folders(parent);
  const fs::path partial = parent / fmt::format(".{}.partial-{}", out.filename().string(), ::getpid());
  bool placed = false;
  try {
    make_folders(partial);
    fill(partial);
    check_interrupt();
    rename_path(partial, out);
    placed = true;
    sync_folder(parent);
  } catch (...) {
    fs::remove_all(placed ? out : partial, error);  // the same command works the next time
    throw;
  }
}

void copy_companions(const fs::path& from, const fs::path& to) {
  std::error_code ignored;
  for (const char* name : kCompanions) {
    if (fs::is_regular_file(from / name, ignored)) write_file(to / name, read_file(from / name));
  }
}

// The config with every check of a config file, messages starting with `source`.
ModelConfig checked(const ModelConfig& c, const std::string& source) {
  ModelConfig out;
  read_options(out, options_json(c), source);
  return out;
}

ModelConfig config_by(const HfFamily& family, HfConfig& hf) {
  const ModelConfig c = family.config(hf);
  hf.finish();
  return checked(c, hf.source() + " as a model of ours");
}

// What a config.json says of an import, before any tensor is looked at.
struct Plan {
  HfFamily family;
  ModelConfig config;
  Shapes shapes;
  std::vector<HfTensor> rules;
};
Plan plan_of(const fs::path& config_path) {
  HfConfig hf(read_json_file(config_path), config_path.string());
  Plan plan{hf_family(hf), {}, {}, {}};
  plan.config = config_by(plan.family, hf);
  plan.shapes = shapes_of(plan.config);
  plan.rules = plan.family.tensors(plan.config);
  check_rules(plan.rules, plan.shapes);
  return plan;
}

bool ignored_tensor(const std::string& name, const ModelConfig& c, const ShardedSafetensors& files) {
  // Old files keep the rotary frequencies, which follow from the config.
  if (name.ends_with("rotary_emb.inv_freq")) return true;
  if (name != "lm_head.weight" || !c.tie_word_embeddings) return false;
  for (const auto& embedding : {"model.embed_tokens.weight", "backbone.embeddings.weight"}) {
    if (!files.has(embedding) || files.info(name).dtype != files.info(embedding).dtype) continue;
    if (at::equal(files.load(name), files.load(embedding))) return true;
  }
  fail("{}: tensor 'lm_head.weight' differs from the embedding, but tie_word_embeddings is true; expected equal values or false",
       files.file_of(name).path());
}

void check_tensors(const std::string& family, const ModelConfig& c, const std::vector<HfTensor>& rules, const Shapes& shapes,
                   const ShardedSafetensors& files) {
  std::map<std::string, const HfTensor*> known;
  for (const auto& rule : rules) {
    known.emplace(rule.theirs, &rule);
    const TensorInfo& info = files.info(rule.theirs);
    const std::string& path = files.file_of(rule.theirs).path();
    const Shape want = shape_of(rule, shapes);
    if (info.shape != want) {
      fail("{}: tensor '{}' has shape [{}], the config wants [{}]", path, rule.theirs, fmt::join(info.shape, ", "), fmt::join(want, ", "));
    }
    if (!at::isFloatingType(info.dtype)) {
      fail("{}: tensor '{}' is {}, expected F32, BF16 or F16", path, rule.theirs, safetensors_dtype(info.dtype));
    }
  }
  for (const auto& name : files.names()) {
    if (known.count(name) == 0 && !ignored_tensor(name, c, files)) {
      fail("{}: tensor '{}' is not part of such a model of family {}; is the config.json another checkpoint's?", files.file_of(name).path(), shown(name),
           family);
    }
  }
}

// The checkpoint passes through memory once.
void check_memory(const std::string& path, uint64_t bytes) {
  if (const uint64_t free = available_memory(); bytes > free) {
    fail("{}: the tensors take {}, but only {} of memory are free", path, human_bytes(static_cast<double>(bytes)),
         human_bytes(static_cast<double>(free)));
  }
}

// Keys that say the same, or nothing in this model, get one form, so that configs can be compared.
ModelConfig plain_form(ModelConfig c) {
  LayerConfig& l = c.layer;
  const LayerConfig standard;
  std::vector<std::vector<std::string>> mixers;
  for (int64_t i = 0; i < c.num_layers; ++i) mixers.push_back(c.mixers_of(i));
  c.layer_mixers = mixers;
  l.num_kv_heads = l.kv_heads();
  l.num_value_heads = l.value_heads();
  l.value_head_dim = l.value_dim();
  l.rotary_dim = l.rotary_dim > 0 ? l.rotary_dim : l.head_dim;
  l.head_norm_eps = l.o_norm_eps();
  if (!l.conv) {
    l.conv_kernel = standard.conv_kernel;
    l.conv_activation = standard.conv_activation;
  }
  if (!l.gate) l.gate_activation = standard.gate_activation;
  if (!l.qk_norm) l.qk_norm_over = standard.qk_norm_over;
  const auto all = c.mixers();
  if (std::find(all.begin(), all.end(), "sliding_window") == all.end()) {
    l.window = standard.window;
    l.sliding_window_query = standard.sliding_window_query;
  }
  if (std::find(all.begin(), all.end(), "gated_delta_net") == all.end()) l.allow_neg_eigval = standard.allow_neg_eigval;
  return c;
}

struct Difference {
  std::string key, here, there;
};
std::optional<Difference> first_difference(const ModelConfig& here, const ModelConfig& there) {
  const Json a = options_json(plain_form(here)), b = options_json(plain_form(there));
  for (const auto& [key, value] : a.items()) {
    if (b.at(key) != value) return Difference{key, describe_json(value), describe_json(b.at(key))};
  }
  return {};
}

struct ExportForm {
  HfFamily family;
  std::string config_text;
};

ExportForm original_form(const ModelConfig& c, const fs::path& folder) {
  const fs::path path = folder / kOriginalConfig;
  HfConfig hf(read_json_file(path), path.string());
  const std::string text = read_file(path);
  const HfFamily family = hf_family(hf);
  if (const auto d = first_difference(c, config_by(family, hf))) {
    fail("{}: {} is {}, but {} makes it {}; remove {} to export the model by its own config", (folder / "config.json").string(), d->key, d->here,
         kOriginalConfig, d->there, kOriginalConfig);
  }
  return {family, text};
}

ExportForm own_form(const ModelConfig& c, const fs::path& folder) {
  std::string refusals;
  for (const auto& family : hf_families()) {
    if (family.hf_config == nullptr) continue;
    const Json json = family.hf_config(c);
    HfConfig hf(json, family.model_type);
    std::optional<Difference> d;
    try {
      d = first_difference(c, config_by(family, hf));
    } catch (const Error& e) {
      refusals += fmt::format("; {}", e.what());
      continue;
    }
    if (!d) return {family, json.dump(2) + "\n"};
    refusals += fmt::format("; a {} has {} {}, this model {}", family.model_type, d->key, d->there, d->here);
  }
  fail("{}: the model has the shape of no family that can be written{}", (folder / "config.json").string(), refusals);
}

}  // namespace

ModelConfig read_published_config(const fs::path& config_json) { return plan_of(config_json).config; }

Conversion import_checkpoint(const fs::path& hf_folder, const fs::path& out) {
  std::error_code ignored;
  if (!fs::is_directory(hf_folder, ignored)) fail("{}: is no folder, expected one with config.json and model.safetensors", hf_folder.string());
  const Plan plan = plan_of(hf_folder / "config.json");
  const std::string text = read_file(hf_folder / "config.json");
  const ShardedSafetensors files(hf_folder);
  check_tensors(plan.family.model_type, plan.config, plan.rules, plan.shapes, files);
  uint64_t bytes = 0;
  for (const auto& rule : plan.rules) bytes += files.info(rule.theirs).end - files.info(rule.theirs).begin;
  check_memory(files.path(), bytes);

  Conversion done{plan.family.model_type, plan.config, 0, count_parameters(plan.config)};
  make_folder_whole(out, [&](const fs::path& folder) {
    NamedTensors tensors;
    for (const auto& rule : plan.rules) {
      check_interrupt();
      take_apart(rule, files.load(rule.theirs), plan.shapes, tensors);
    }
    done.tensors = static_cast<int64_t>(tensors.size());
    write_safetensors(folder / "model.safetensors", tensors, {{"format", "oryx"}});
    copy_companions(hf_folder, folder);
    write_file(folder / kOriginalConfig, text);
    write_file(folder / "config.json", dump_options(plan.config));
  });
  return done;
}

Conversion export_checkpoint(const fs::path& model_folder, const fs::path& out) {
  std::error_code ignored;
  if (!fs::is_directory(model_folder, ignored)) fail("{}: is no folder, expected one with config.json and model.safetensors", model_folder.string());
  const auto config = load_options<ModelConfig>(model_folder / "config.json");
  const SafetensorsReader file(model_folder / "model.safetensors");
  check_parameters(LanguageModel::parameter_specs(config), file);
  const bool imported = fs::exists(model_folder / kOriginalConfig, ignored);
  const ExportForm form = imported ? original_form(config, model_folder) : own_form(config, model_folder);
  const Shapes shapes = shapes_of(config);
  const auto rules = form.family.tensors(config);
  check_rules(rules, shapes);
  uint64_t bytes = 0;
  for (const auto& [name, info] : file.tensors()) bytes += info.end - info.begin;
  check_memory(file.path(), bytes);

  make_folder_whole(out, [&](const fs::path& folder) {
    NamedTensors tensors;
    for (const auto& rule : rules) {
      check_interrupt();
      tensors.emplace_back(rule.theirs, put_together(rule, file, shapes));
    }
    write_safetensors(folder / "model.safetensors", tensors, {{"format", "pt"}});
    copy_companions(model_folder, folder);
    write_file(folder / "config.json", form.config_text);
  });
  return {form.family.model_type, config, static_cast<int64_t>(rules.size()), count_parameters(config)};
}

}  // namespace oryx
