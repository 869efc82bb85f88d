// Configuration: one declaration for each key gives its JSON form, its `key=value` override, its dump, its check, its
// line of help and of the documentation. The default is the struct's own.
//
//     enum class Precision { kFloat32, kBfloat16 };
//     struct OptimizerOptions {
//       double lr = 6e-4;
//       void describe(Fields& f) { f.add("lr", lr, "peak learning rate", above(0)); }
//     };
//     struct TrainOptions {
//       int64_t steps = 1000;
//       Precision precision = Precision::kFloat32;
//       std::vector<std::vector<std::string>> layer_mixers;
//       OptimizerOptions optimizer;
//
//       void describe(Fields& f) {
//         f.add("steps", steps, "optimizer steps", at_least(1));
//         f.add("precision", precision, "compute type", {{"float32", Precision::kFloat32}, {"bfloat16",
//         Precision::kBfloat16}}); f.add("layer_mixers", layer_mixers, "the mixers of each layer", one_of({"attention",
//         "mamba2"}));  // of every element f.group("optimizer", optimizer);  // keys optimizer.lr ...
//       }
//       void validate() const { if (...) fail("steps is {}, but ...", steps); }  // optional: what several keys must
//       agree on
//     };
//
//     auto options = load_options<TrainOptions>("run.json", {"optimizer.lr=3e-4", "precision=bfloat16"});
//     write_file("config.json", dump_options(options));      // every key, in the order of declaration
//     options_table<TrainOptions>()                           // Markdown, for docs/ and the test that compares it
//
// Types: bool, int64_t, double, std::string, enums, std::optional (JSON null) and std::vector of these, vectors of
// vectors, and Json for what has a form of its own. In an override a string is taken as it stands (or in a file's quotes), a list of strings
// may be written a,b; everything else is JSON. Errors are oryx::Error: "run.json: optimizer.lr is -1, expected a number
// above 0".
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/json.h"

namespace oryx {

// What a value must fulfil beyond its type; of a list, every element.
struct Check {
  std::string text;  // behind the type: "above 0"
  std::function<bool(const Json&)> test;
  std::vector<std::string> choices = {};  // instead of text and type
};

// What the override of a string says: its text as it stands, or, of a JSON string in its quotes, what stands between them.
std::string override_string(std::string_view text);

Check above(double low);
Check at_least(double low);
Check between(double low, double high);  // both included
Check one_of(std::vector<std::string> names);

namespace detail {

template <class T>
struct IsVector : std::false_type {};
template <class T>
struct IsVector<std::vector<T>> : std::true_type {};
template <class T>
struct IsOptional : std::false_type {};
template <class T>
struct IsOptional<std::optional<T>> : std::true_type {};

// False when `json` is of another type.
bool from_json(const Json& json, bool& value);
bool from_json(const Json& json, int64_t& value);  // 1e4 is an integer, 0.5 is not
bool from_json(const Json& json, double& value);
bool from_json(const Json& json, std::string& value);
bool from_json(const Json& json, Json& value);

template <class T>
bool from_json(const Json& json, std::optional<T>& value) {
  value.reset();
  return json.is_null() || from_json(json, value.emplace());
}

template <class T>
bool from_json(const Json& json, std::vector<T>& value) {
  value.clear();
  if (!json.is_array()) return false;
  for (const Json& j : json) {
    T element{};
    if (!from_json(j, element)) return false;
    value.push_back(std::move(element));
  }
  return true;
}

template <class T>
Json to_json(const T& value) {
  if constexpr (IsOptional<T>::value) {
    return value ? to_json(*value) : Json(nullptr);
  } else {
    return Json(value);
  }
}

template <class T>
std::string type_name(bool plural = false) {
  const char* s = plural ? "s" : "";
  if constexpr (IsVector<T>::value) {
    return fmt::format("list{} of {}", s, type_name<typename T::value_type>(true));
  } else if constexpr (IsOptional<T>::value) {
    return type_name<typename T::value_type>() + " or null";
  } else if constexpr (std::same_as<T, bool>) {
    return std::string("boolean") + s;
  } else if constexpr (std::same_as<T, int64_t>) {
    return std::string("integer") + s;
  } else if constexpr (std::same_as<T, double>) {
    return std::string("number") + s;
  } else if constexpr (std::same_as<T, std::string>) {
    return std::string("string") + s;
  } else {
    static_assert(std::same_as<T, Json>, "options: an unsupported type (whole numbers are int64_t)");
    return "JSON";
  }
}

// How the value of an override is read.
enum class TextForm { kString, kStringList, kJson };

template <class T>
constexpr TextForm text_form() {
  if constexpr (IsOptional<T>::value) {
    return text_form<typename T::value_type>();
  } else if constexpr (std::same_as<T, std::vector<std::string>>) {
    return TextForm::kStringList;
  } else {
    return std::same_as<T, std::string> ? TextForm::kString : TextForm::kJson;
  }
}

}  // namespace detail

// The keys of one options object, bound to it: valid as long as the object stays where it is.
class Fields {
 public:
  struct Field {
    std::string key;   // dotted
    std::string type;  // "number above 0", "one of a, b"
    std::string help;
    bool nullable;
    detail::TextForm form;
    std::optional<Check> check;
    std::function<bool(const Json&)> set;  // false: wrong type, the object is as it was
    std::function<Json()> get;
  };

  template <class T>
  requires(!std::is_enum_v<T>) void add(std::string_view key, T& value, std::string_view help,
                                        std::optional<Check> check = {}) {
    add_field({std::string(key), detail::type_name<T>(), std::string(help), detail::IsOptional<T>::value,
               detail::text_form<T>(), std::move(check),
               [&value](const Json& json) {
                 T read{};
                 if (!detail::from_json(json, read)) return false;
                 value = std::move(read);
                 return true;
               },
               [&value] { return detail::to_json(value); }});
  }

  template <class E>
  requires std::is_enum_v<E>
  void add(std::string_view key, E& value, std::string_view help,
           std::vector<std::pair<std::string, std::type_identity_t<E>>> names) {
    std::vector<std::string> choices;
    for (const auto& [name, e] : names) choices.push_back(name);
    add_field({std::string(key), "string", std::string(help), false, detail::TextForm::kString,
               one_of(std::move(choices)),
               [&value, names](const Json& json) {
                 for (const auto& [name, e] : names) {
                   if (json == name) {
                     value = e;
                     return true;
                   }
                 }
                 return false;
               },
               [&value, names] {
                 for (const auto& [name, e] : names) {
                   if (value == e) return Json(name);
                 }
                 return Json(nullptr);
               }});
  }

  // The keys of a nested struct, as key.name.
  template <class S>
  void group(std::string_view key, S& options) {
    const std::string outer = prefix_;
    prefix_ += std::string(key) + ".";
    groups_.push_back(prefix_);
    options.describe(*this);
    prefix_ = outer;
  }

  const std::vector<Field>& all() const { return fields_; }

  // Sets the keys that stand in the object `json`. `source` starts the errors.
  void read(const Json& json, std::string_view source) { read_object(json, "", source); }
  // Sets one key from "key=value".
  void override_with(std::string_view assignment);
  Json dump() const;
  std::string markdown() const;  // | key | type | default | meaning |

 private:
  void add_field(Field field);
  void read_object(const Json& json, const std::string& prefix, std::string_view source);
  void set(const Field& field, const Json& json, std::string_view source);
  const Field* find(std::string_view key) const;
  bool is_group(std::string_view key) const;
  [[noreturn]] void fail_unknown(std::string_view key, std::string_view source) const;

  std::string prefix_;
  std::vector<Field> fields_;
  std::vector<std::string> groups_;  // "optimizer."
};

template <class T>
Fields fields_of(T& options) {
  Fields f;
  options.describe(f);
  return f;
}

// Sets the keys of `json`, then the overrides, then checks what validate() says. Keys that are not named keep their
// value.
template <class T>
void read_options(T& options, const Json& json, std::string_view source,
                  const std::vector<std::string>& overrides = {}) {
  Fields f = fields_of(options);
  f.read(json, source);
  for (const std::string& o : overrides) f.override_with(o);
  if constexpr (requires { options.validate(); }) {
    try {
      options.validate();
    } catch (const Error& e) {
      fail("{}: {}", source, e.what());
    }
  }
}

// The text of `path` parsed, with the errors of parse_json.
Json read_json_file(const std::filesystem::path& path);

// From a JSON file (none: an empty path) and overrides.
template <class T>
T load_options(const std::filesystem::path& path, const std::vector<std::string>& overrides = {}) {
  T options;
  read_options(options, path.empty() ? Json::object() : read_json_file(path), path.empty() ? "options" : path.string(),
               overrides);
  return options;
}

template <class T>
Json options_json(T options) {
  return fields_of(options).dump();
}

template <class T>
std::string dump_options(T options) {
  return options_json(std::move(options)).dump(2) + "\n";
}

template <class T>
std::string options_table() {
  T defaults;
  return fields_of(defaults).markdown();
}

}  // namespace oryx
