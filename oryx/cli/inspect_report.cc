#include "oryx/cli/inspect_report.h"

#include <algorithm>
#include <cmath>

#include "oryx/common/error.h"
#include "oryx/common/options.h"
#include "oryx/common/progress.h"
#include "oryx/eval/task.h"
#include "oryx/model/inspect.h"

namespace oryx::cli {

namespace {

// 1234567 -> "1,234,567"
std::string grouped(int64_t n) {
  std::string digits = std::to_string(n);
  for (auto at = static_cast<int64_t>(digits.size()) - 3; at > 0; at -= 3) digits.insert(static_cast<size_t>(at), ",");
  return digits;
}

CellFormat cell_grouped() {
  return [](const Json& j) { return grouped(j.get<int64_t>()); };
}

CellFormat cell_signed_percent() {
  return [](const Json& j) { return fmt::format("{:+.2f}%", 100 * j.get<double>()); };
}

// Names in a file are its author's: a control character must not reach the terminal.
std::string printable(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return text;
}

CellFormat cell_printable() {
  return [](const Json& j) { return printable(j.get<std::string>()); };
}

std::string mixers_text(const Json& layer_mixers) {
  std::vector<std::string> layers;
  for (const auto& l : layer_mixers)
    layers.push_back(fmt::format("[{}]", fmt::join(l.get<std::vector<std::string>>(), ", ")));
  return fmt::format("{}", fmt::join(layers, " "));
}

// The modes a token can be put into: several, or the only way through the model.
Json modes_json(const ModelConfig& config, const ParameterReport& report) {
  Json modes = Json::array();
  const auto names = single_modes(config);
  for (const ModeUse& use : report.modes) {
    const bool only = names.size() == 1;
    modes.push_back({{"mode", only ? names.front() : use.mixer},
                     {"parameters", use.parameters},
                     {"shared", use.shared},
                     {"shared_share", use.shared_share()}});
    if (only) break;
  }
  return modes;
}

Json parameters_json(const ModelConfig& config) {
  const ParameterReport r = report_parameters(config);
  Json parts = Json::array();
  for (const auto& [part, n] : r.parts) {
    parts.push_back(
        {{"part", part}, {"parameters", n}, {"share", static_cast<double>(n) / static_cast<double>(r.total)}});
  }
  return {{"total", r.total}, {"parts", parts}, {"modes", modes_json(config, r)}};
}

Json state_json(const ModelConfig& config, int64_t context, at::ScalarType compute, const StateOptions& options) {
  constexpr double kMost = 4.6e18;  // 2^62
  if (static_cast<double>(state_bytes(config, 1, compute).tokens) * static_cast<double>(context) > kMost) {
    fail("the state of {} tokens would pass {:.1e} bytes; ask for a shorter --context", context, kMost);
  }
  const StateBytes b = state_bytes(config, context, compute, options);
  return {
      {"context", context}, {"recurrent", b.recurrent}, {"tails", b.tails}, {"tokens", b.tokens}, {"total", b.total()}};
}

std::string flops_text(const Json& report) {
  EvalTable table{{{"mode", "mode", cell_text()}}, {}};
  for (const auto& row : report) {
    const auto mode = row["mode"].get<std::string>();
    auto at = std::find_if(table.rows.begin(), table.rows.end(), [&](const Json& r) { return r["mode"] == mode; });
    if (at == table.rows.end()) at = table.rows.insert(at, Json{{"mode", mode}});
    const std::string context = grouped(row["context"].get<int64_t>());
    const auto known =
        std::any_of(table.columns.begin(), table.columns.end(), [&](const EvalColumn& c) { return c.key == context; });
    if (!known) table.columns.push_back({context, context, cell_count()});
    (*at)[context] = row["flops"];
  }
  return format_table(table);
}

std::string heads_text(const Json& c) {
  const auto number = [&](const char* key) { return c[key].get<int64_t>(); };
  const auto or_else = [&](const char* key, int64_t standard) { return number(key) > 0 ? number(key) : standard; };
  const int64_t keys = or_else("num_kv_heads", number("num_heads")), values = or_else("num_value_heads", keys);
  return fmt::format("{} heads ({}), K {}, V {}, F {}", number("num_heads"),
                     keys == values ? fmt::format("{} of keys and values", keys) : fmt::format("{} of keys, {} of values", keys, values),
                     number("head_dim"), or_else("value_head_dim", number("head_dim")), grouped(number("intermediate_size")));
}

std::string shape_text(const Json& c) {
  const auto number = [&](const char* key) { return c[key].get<int64_t>(); };
  std::string out = fmt::format("{} layers of {}{}\nD {}, {}, vocabulary {} ({})\n", number("num_layers"), mixers_text(c["layer_mixers"]),
                                c["combine"] == "mean" ? ", averaged" : "", number("hidden_size"), heads_text(c), grouped(number("vocab_size")),
                                c["tie_word_embeddings"].get<bool>() ? "tied" : "a head of its own");
  for (const auto& [mixer, keys] : c["layer_overrides"].items()) {
    Json own = c;
    own.update(keys);
    out += fmt::format("layers of {}: {}\n", mixer, heads_text(own));
  }
  return out;
}

ModelConfig variant_of(const std::string& size, const std::string& variant, const std::vector<std::string>& overrides) {
  ModelConfig c = preset(size + "-" + variant);
  read_options(c, Json::object(), size + "-" + variant, overrides);
  return c;
}

}  // namespace

Json model_report(const std::string& name, ModelConfig config, const std::vector<int64_t>& contexts,
                  at::ScalarType compute, const StateOptions& options) {
  Json flops = Json::array(), state = Json::array();
  for (const auto& mode : single_modes(config)) {
    for (const int64_t context : contexts) {
      const int64_t seen = options.seen(context);
      flops.push_back({{"mode", mode}, {"context", context}, {"flops", token_flops(config, mode, seen)}});
    }
  }
  for (const int64_t context : contexts) state.push_back(state_json(config, context, compute, options));
  return {{"name", name},
          {"config", options_json(config)},
          {"parameters", parameters_json(config)},
          {"flops_per_token", flops},
          {"state_dtype", compute == at::kBFloat16 ? "bfloat16" : "float32"},
          {"kv", kv_text(options)},
          {"state_bytes", state}};
}

std::string model_text(const Json& report) {
  const Json& p = report["parameters"];
  std::string out =
      printable(report["name"].get<std::string>()) + ": " + grouped(p["total"].get<int64_t>()) + " parameters\n";
  out += shape_text(report["config"]) + "\n";
  out += format_table({{{"part", "part", cell_text()},
                        {"parameters", "parameters", cell_grouped()},
                        {"share", "share", cell_percent()}},
                       p["parts"].get<std::vector<Json>>()});
  out += "\n" + format_table({{{"mode", "mode", cell_text()},
                               {"parameters", "uses", cell_grouped()},
                               {"shared", "shared by all modes", cell_grouped()},
                               {"shared_share", "share", cell_percent()}},
                              p["modes"].get<std::vector<Json>>()});
  out += "\nforward FLOPs of a token that sees so many tokens (training: three times as much)\n" +
         flops_text(report["flops_per_token"]);
  const auto kv = report["kv"].get<std::string>();
  out += fmt::format("\nstate of one sequence of so many tokens ({} tails, keys and values{}; recurrent float32)\n",
                     report["state_dtype"].get<std::string>(), kv == "keep" ? "" : ", " + kv);
  return out + format_table({{{"context", "tokens", cell_grouped()},
                              {"recurrent", "recurrent", cell_bytes()},
                              {"tails", "convolution tails", cell_bytes()},
                              {"tokens", "keys and values", cell_bytes()},
                              {"total", "total", cell_bytes()}},
                             report["state_bytes"].get<std::vector<Json>>()});
}

Json family_report(const std::string& size, const std::vector<std::string>& overrides) {
  const auto sizes = preset_sizes();
  if (std::find(sizes.begin(), sizes.end(), size) == sizes.end()) {
    fail("--family: unknown size '{}', expected one of {}{}", size, fmt::join(sizes, ", "), did_you_mean(size, sizes));
  }
  const int64_t reference = count_parameters(variant_of(size, "oryx-gdn", overrides));
  Json variants = Json::array();
  for (const auto& variant : preset_variants()) {
    const ModelConfig c = matched(variant_of(size, variant, overrides), reference);
    const ParameterReport r = report_parameters(c);
    variants.push_back({{"variant", variant},
                        {"intermediate_size", c.layer.intermediate_size},
                        {"total", r.total},
                        {"difference", static_cast<double>(r.total) / static_cast<double>(reference) - 1},
                        {"modes", modes_json(c, r)}});
  }
  return {{"size", size}, {"reference", reference}, {"variants", variants}};
}

std::string family_text(const Json& report) {
  EvalTable table{{{"variant", "variant", cell_text()},
                   {"intermediate_size", "F", cell_grouped()},
                   {"total", "parameters", cell_grouped()},
                   {"difference", "difference", cell_signed_percent()},
                   {"mode", "mode", cell_text()},
                   {"parameters", "uses", cell_grouped()},
                   {"shared_share", "shared", cell_percent()}},
                  {}};
  for (const auto& v : report["variants"]) {
    // The variant's own columns stand in the line of its first mode.
    Json row = v;
    for (const auto& mode : v["modes"]) {
      row.update(mode);
      table.rows.push_back(row);
      row = Json{{"variant", ""}};
    }
  }
  return fmt::format("{}: variants matched to the {} parameters of oryx-gdn by intermediate_size (F)\n",
                     report["size"].get<std::string>(), grouped(report["reference"].get<int64_t>())) +
         format_table(table);
}

Json list_report() {
  Json sizes = Json::array(), variants = Json::array();
  for (const auto& name : preset_sizes()) {
    const ModelConfig c = preset(name);
    sizes.push_back({{"size", name},
                     {"num_layers", c.num_layers},
                     {"hidden_size", c.layer.hidden_size},
                     {"num_heads", c.layer.num_heads},
                     {"head_dim", c.layer.head_dim},
                     {"intermediate_size", c.layer.intermediate_size},
                     {"vocab_size", c.vocab_size},
                     {"parameters", count_parameters(c)}});
  }
  for (const auto& name : preset_variants()) {
    const ModelConfig c = preset(preset_sizes().front() + "-" + name);
    variants.push_back({{"variant", name}, {"layer_mixers", c.layer_mixers}, {"combine", c.layer.combine}});
  }
  return {{"sizes", sizes}, {"variants", variants}};
}

std::string list_text(const Json& report) {
  std::string out = format_table({{{"size", "size", cell_text()},
                                   {"num_layers", "layers", cell_grouped()},
                                   {"hidden_size", "D", cell_grouped()},
                                   {"num_heads", "heads", cell_grouped()},
                                   {"head_dim", "K = V", cell_grouped()},
                                   {"intermediate_size", "F", cell_grouped()},
                                   {"vocab_size", "vocabulary", cell_grouped()},
                                   {"parameters", "parameters", cell_grouped()}},
                                  report["sizes"].get<std::vector<Json>>()});
  out += "\nA preset is SIZE (as oryx-gdn) or SIZE-VARIANT:\n";
  for (const auto& v : report["variants"]) {
    out += fmt::format("{:<13} {}{}\n", v["variant"].get<std::string>(), mixers_text(v["layer_mixers"]),
                       v["combine"] == "mean" ? ", averaged" : "");
  }
  return out;
}

Json tensors_report(const SafetensorsReader& file) {
  std::vector<std::pair<std::string, TensorInfo>> tensors(file.tensors().begin(), file.tensors().end());
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const auto& a, const auto& b) { return a.second.begin < b.second.begin; });
  Json list = Json::array();
  uint64_t elements = 0, bytes = 0;
  for (const auto& [name, info] : tensors) {
    const uint64_t size = info.end - info.begin;
    elements += size / c10::elementSize(info.dtype);
    bytes += size;
    list.push_back({{"name", name}, {"dtype", safetensors_dtype(info.dtype)}, {"shape", info.shape}, {"bytes", size}});
  }
  return {{"file", file.path()}, {"count", tensors.size()},     {"elements", elements},
          {"bytes", bytes},      {"metadata", file.metadata()}, {"tensors", list}};
}

std::string tensors_text(const Json& report) {
  const CellFormat shape = [](const Json& j) {
    return fmt::format("[{}]", fmt::join(j.get<std::vector<int64_t>>(), ", "));
  };
  std::string out = fmt::format("{}: {} tensors, {} elements, {}\n", printable(report["file"].get<std::string>()),
                                report["count"].get<int64_t>(), grouped(report["elements"].get<int64_t>()),
                                human_bytes(report["bytes"].get<double>()));
  for (const auto& [key, value] : report["metadata"].items()) {
    out += fmt::format("metadata {} = {}\n", printable(key), printable(value.get<std::string>()));
  }
  return out + "\n" +
         format_table({{{"name", "tensor", cell_printable()},
                        {"dtype", "dtype", cell_text()},
                        {"shape", "shape", shape},
                        {"bytes", "size", cell_bytes()}},
                       report["tensors"].get<std::vector<Json>>()});
}

}  // namespace oryx::cli
