// Examples of an evaluation as JSON, one object a line.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/json.h"

namespace oryx {

// One example and where it stands, for errors.
class Example {
 public:
  Example(Json json, std::string where) : json_(std::move(json)), where_(std::move(where)) {}
  const std::string& where() const { return where_; }  // "piqa/validation.jsonl.zst: line 7"

  // A field that must be there with this type. Throws Error.
  const std::string& text(const char* key) const { return text_of(at(key), key); }
  std::vector<std::string> texts(const char* key) const;  // a list of strings
  int64_t integer(const char* key) const;
  bool boolean(const char* key) const;
  Example object(const char* key) const { return {at(key), where_ + ", " + key}; }
  std::vector<Example> objects(const char* key) const;
  bool has(const char* key) const { return json_.contains(key); }
  const Json& at(const char* key) const;
  const std::string& text_of(const Json& value, const char* key) const;

  [[noreturn]] void refuse(const char* key, const Json& found, const std::string& expected) const;

 private:
  Json json_;
  std::string where_;
};

// The first `limit` lines (0: all) of FOLDER/NAME.jsonl or FOLDER/NAME.jsonl.zst, blank ones passed over. `option` is the option that named the folder.
// Throws Error when there is no such folder or file, no example, or a line that is no JSON object.
std::vector<Example> read_examples(const std::filesystem::path& folder, const std::string& name, const std::string& option, int64_t limit = 0);

}  // namespace oryx
