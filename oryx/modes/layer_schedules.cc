#include "oryx/modes/layer_schedules.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace {

constexpr const char* kForm = "expected a schedule's text or {\"layers\": {\"0-3\": \"attention\", \"*\": \"linear\"}}";

std::vector<std::string> all_mixers(const std::vector<std::vector<std::string>>& layer_mixers) {
  std::vector<std::string> all;
  for (const auto& mixers : layer_mixers) {
    for (const auto& m : mixers) {
      if (std::find(all.begin(), all.end(), m) == all.end()) all.push_back(m);
    }
  }
  return all;
}

std::optional<size_t> layer_index(std::string_view text) {
  size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// The layers that "0-3,7" names.
std::vector<size_t> layers_of(const std::string& key, size_t layers) {
  std::vector<size_t> out;
  for (size_t at = 0; at <= key.size();) {
    const size_t end = std::min(key.find(',', at), key.size());
    const std::string part = key.substr(at, end - at);
    const size_t dash = part.find('-');
    const auto first = layer_index(part.substr(0, dash));
    const auto last = dash == std::string::npos ? first : layer_index(part.substr(dash + 1));
    if (!first || !last || *first > *last)
      fail("schedule: layers '{}', expected a layer, a range such as 0-3, or \"*\"", shown(key));
    if (*last >= layers) fail("schedule: layers '{}', but the model has {} layers, 0 to {}", shown(key), layers, layers - 1);
    for (size_t i = *first; i <= *last; ++i) out.push_back(i);
    at = end + 1;
  }
  return out;
}

std::string text_of(const Json& json, std::string_view what) {
  if (!json.is_string()) fail("schedule: {} is {}, {}", what, describe_json(json), "expected a schedule's text");
  return json.get<std::string>();
}

// The text of each layer.
std::vector<std::string> layer_texts(const Json& json, size_t layers) {
  if (json.is_string()) return std::vector<std::string>(layers, json.get<std::string>());
  if (!json.is_object() || json.size() != 1 || !json.contains("layers") || !json["layers"].is_object()) {
    fail("schedule: found {}, {}", describe_json(json), kForm);
  }
  std::vector<std::optional<std::string>> texts(layers);
  for (const auto& [key, value] : json["layers"].items()) {
    if (key == "*") continue;
    for (const size_t i : layers_of(key, layers)) {
      if (texts[i]) fail("schedule: layer {} is named twice, the second time by '{}'", i, shown(key));
      texts[i] = text_of(value, "layers '" + shown(key) + "'");
    }
  }
  std::optional<std::string> rest;
  if (json["layers"].contains("*")) rest = text_of(json["layers"]["*"], "layers '*'");
  std::vector<std::string> out;
  for (size_t i = 0; i < layers; ++i) {
    if (!texts[i] && !rest) fail("schedule: layer {} has none; add a \"*\" for the rest", i);
    out.push_back(texts[i] ? *texts[i] : *rest);
  }
  return out;
}

}  // namespace

std::vector<Schedule> parse_layer_schedules(const Json& json,
                                            const std::vector<std::vector<std::string>>& layer_mixers, const OpenHead& open) {
  const bool is_text = json.is_string() && json.get_ref<const std::string&>().starts_with('{');
  const std::vector<std::string> texts =
      layer_texts(is_text ? parse_json(json.get<std::string>(), "schedule") : json, layer_mixers.size());
  const std::vector<std::string> everywhere = all_mixers(layer_mixers), nowhere;
  std::vector<Schedule> schedules;
  for (size_t i = 0; i < texts.size(); ++i) {
    const bool nothing_to_choose = layer_mixers[i].size() == 1;
    schedules.push_back(Schedule::parse(texts[i], layer_mixers[i], nothing_to_choose ? everywhere : nowhere, open));
  }
  return schedules;
}

}  // namespace oryx
