#include "oryx/common/options.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "oryx/common/file.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace detail {

bool from_json(const Json& json, bool& value) {
  if (!json.is_boolean()) return false;
  value = json.get<bool>();
  return true;
}

bool from_json(const Json& json, int64_t& value) {
  if (json.is_number_unsigned() && json.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) return false;
  if (json.is_number_integer()) {
    value = json.get<int64_t>();
    return true;
  }
  if (!json.is_number_float()) return false;
  const double x = json.get<double>();
  constexpr double kExact = 9007199254740992.0;  // 2^53: up to here every whole double is the number that was written
  if (!(std::abs(x) <= kExact) || x != std::floor(x)) return false;
  value = static_cast<int64_t>(x);
  return true;
}

bool from_json(const Json& json, double& value) {
  if (!json.is_number() || !std::isfinite(json.get<double>())) return false;
  value = json.get<double>();
  return true;
}

bool from_json(const Json& json, std::string& value) {
  if (!json.is_string()) return false;
  value = json.get<std::string>();
  return true;
}

bool from_json(const Json& json, Json& value) {
  value = json;
  return true;
}

}  // namespace detail

Check above(double low) {
  return {fmt::format("above {}", low), [low](const Json& j) { return j.get<double>() > low; }};
}

Check at_least(double low) {
  return {fmt::format("of at least {}", low), [low](const Json& j) { return j.get<double>() >= low; }};
}

Check between(double low, double high) {
  return {fmt::format("from {} to {}", low, high),
          [low, high](const Json& j) { return j.get<double>() >= low && j.get<double>() <= high; }};
}

Check one_of(std::vector<std::string> names) {
  const auto test = [names](const Json& j) {
    return j.is_string() && std::find(names.begin(), names.end(), j.get<std::string>()) != names.end();
  };
  return {"", test, std::move(names)};
}

namespace {

// The first element (of a value that is no list: the value) that fails the check, or null.
const Json* first_failing(const Json& value, const Check& check) {
  if (!value.is_array()) return value.is_null() || check.test(value) ? nullptr : &value;
  for (const Json& element : value) {
    if (const Json* bad = first_failing(element, check)) return bad;
  }
  return nullptr;
}

std::string with_article(const std::string& type) {
  if (type.starts_with("one of") || type == "JSON") return type;
  if (type.starts_with("boolean")) return "true or false" + type.substr(7);
  return (type.starts_with("integer") ? "an " : "a ") + type;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

Json parse_override(const Fields::Field& field, std::string_view text) {
  using detail::TextForm;
  if (field.nullable && text == "null") return nullptr;
  if (field.form == TextForm::kString) return override_string(text);
  if (field.form == TextForm::kStringList && !text.starts_with('[')) {
    return text.empty() ? Json::array() : Json(split(text, ','));
  }
  Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  // What is no JSON is shown as the string that it is.
  return value.is_discarded() ? Json(std::string(text)) : value;
}

std::string escape_markdown(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '|') out += '\\';
    out += c;
  }
  return out;
}

std::string leaf(std::string_view key) { return std::string(key.substr(key.rfind('.') + 1)); }

}  // namespace

std::string override_string(std::string_view text) {
  const Json quoted = text.starts_with('"') ? Json::parse(text, nullptr, /*allow_exceptions=*/false) : Json();
  return quoted.is_string() ? quoted.get<std::string>() : std::string(text);
}

void Fields::add_field(Field field) {
  field.key = prefix_ + field.key;
  if (find(field.key) != nullptr) throw std::logic_error("options: the key '" + field.key + "' is declared twice");
  if (field.check && !field.check->choices.empty()) {
    const std::string choices = fmt::format("one of {}", fmt::join(field.check->choices, ", "));
    field.type = field.type.starts_with("list") ? field.type + ", each " + choices
                                                : choices + (field.nullable ? " or null" : "");
  } else if (field.check) {
    field.type += field.type.starts_with("list") || field.nullable ? ", " + field.check->text : " " + field.check->text;
  }
  fields_.push_back(std::move(field));
}

const Fields::Field* Fields::find(std::string_view key) const {
  const auto it = std::find_if(fields_.begin(), fields_.end(), [&](const Field& f) { return f.key == key; });
  return it == fields_.end() ? nullptr : &*it;
}

bool Fields::is_group(std::string_view key) const {
  return std::find(groups_.begin(), groups_.end(), std::string(key) + ".") != groups_.end();
}

void Fields::fail_unknown(std::string_view key, std::string_view source) const {
  std::vector<std::string> keys, leaves;
  for (const Field& f : fields_) {
    keys.push_back(f.key);
    leaves.push_back(leaf(f.key));
  }
  for (const auto& g : groups_) keys.push_back(g.substr(0, g.size() - 1));
  // The same name in another group is a better guess than a similar path, and that a better one than a similar name
  // elsewhere.
  const auto key_of = [&](const std::string& name) {
    const auto it = std::find(leaves.begin(), leaves.end(), name);
    return it == leaves.end() ? "" : keys[static_cast<size_t>(it - leaves.begin())];
  };
  std::string guess = key_of(leaf(key));
  if (guess.empty()) guess = nearest(key, keys);
  if (guess.empty()) guess = key_of(nearest(leaf(key), leaves));
  fail("{}: unknown key '{}'{}", source, shown(key), guess.empty() ? "" : fmt::format(". Did you mean '{}'?", guess));
}

void Fields::set(const Field& field, const Json& json, std::string_view source) {
  const Json before = field.get();
  const auto complain = [&](const Json& bad) {
    const bool part = &bad != &json;
    const std::string hint =
        field.check && bad.is_string() ? did_you_mean(bad.get<std::string>(), field.check->choices) : "";
    fail("{}: {} {} {}, expected {}{}", source, field.key, part ? "holds" : "is", describe_json(bad),
         with_article(field.type), hint);
  };
  // A choice is tested before the type, so that an unknown name gets its hint.
  if (field.check && !field.check->choices.empty()) {
    if (const Json* bad = first_failing(json, *field.check)) complain(*bad);
  }
  if (!field.set(json)) complain(json);
  if (field.check) {
    if (const Json* bad = first_failing(json, *field.check)) {
      field.set(before);
      complain(*bad);
    }
  }
}

void Fields::read_object(const Json& json, const std::string& prefix, std::string_view source) {
  if (!json.is_object()) {
    const std::string what = prefix.empty() ? "the file" : prefix.substr(0, prefix.size() - 1);
    fail("{}: {} is {}, expected an object", source, what, describe_json(json));
  }
  for (const auto& [name, value] : json.items()) {
    const std::string key = prefix + name;
    if (is_group(key)) {
      read_object(value, key + ".", source);
    } else if (const Field* field = find(key); field == nullptr) {
      fail_unknown(key, source);
    } else if (name.find('.') != std::string::npos) {
      fail("{}: the key '{}' holds a dot; write it as an object within an object", source, shown(name));
    } else {
      set(*field, value, source);
    }
  }
}

void Fields::override_with(std::string_view assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string_view::npos || equals == 0) fail("'{}': expected key=value", assignment);
  const std::string_view key = assignment.substr(0, equals), text = assignment.substr(equals + 1);
  if (!is_utf8(assignment)) fail("the value of '{}' is not UTF-8", is_utf8(key) ? key : "?");
  const std::string source = fmt::format("override '{}'", assignment);
  if (is_group(key)) fail("{}: {} is a group of keys; set them one by one ({}.NAME=VALUE)", source, key, key);
  const Field* field = find(key);
  if (field == nullptr) fail_unknown(key, source);
  set(*field, parse_override(*field, text), source);
}

Json Fields::dump() const {
  Json root = Json::object();
  for (const Field& f : fields_) {
    Json* at = &root;
    const std::vector<std::string> path = split(f.key, '.');
    for (const auto& name : path) at = &(*at)[name];
    *at = f.get();
  }
  return root;
}

std::string Fields::markdown() const {
  std::string out = "| key | type | default | meaning |\n| --- | --- | --- | --- |\n";
  for (const Field& f : fields_) {
    out += fmt::format("| `{}` | {} | `{}` | {} |\n", f.key, escape_markdown(f.type), escape_markdown(f.get().dump()),
                       escape_markdown(f.help));
  }
  return out;
}

Json read_json_file(const std::filesystem::path& path) {
  constexpr uint64_t kLargest = uint64_t{16} << 20;
  std::error_code error;  // what cannot be asked for its size is refused by read_file
  const uint64_t size = std::filesystem::file_size(path, error);
  if (!error && size > kLargest) fail("{}: {} bytes, expected a JSON file of at most {}", path.string(), size, kLargest);
  return parse_json(read_file(path), path.string());
}

}  // namespace oryx
