#include "oryx/eval/json_lines.h"

#include "oryx/data/text_source.h"

namespace oryx {

namespace fs = std::filesystem;

const Json& Example::at(const char* key) const {
  const auto it = json_.find(key);
  if (it == json_.end()) fail("{}: no '{}' in {}, expected an example of this task", where_, key, describe_json(json_));
  return *it;
}

void Example::refuse(const char* key, const Json& found, const std::string& expected) const {
  fail("{}: '{}' is {}, expected {}", where_, key, describe_json(found), expected);
}

const std::string& Example::text_of(const Json& value, const char* key) const {
  if (!value.is_string()) refuse(key, value, "a string");
  return value.get_ref<const std::string&>();
}

std::vector<std::string> Example::texts(const char* key) const {
  const Json& value = at(key);
  if (!value.is_array() || value.empty()) refuse(key, value, "a list of strings");
  std::vector<std::string> all;
  for (const Json& v : value) all.push_back(text_of(v, key));
  return all;
}

int64_t Example::integer(const char* key) const {
  const Json& value = at(key);
  if (!value.is_number_integer()) refuse(key, value, "an integer");
  return value.get<int64_t>();
}

bool Example::boolean(const char* key) const {
  const Json& value = at(key);
  if (!value.is_boolean()) refuse(key, value, "true or false");
  return value.get<bool>();
}

std::vector<Example> Example::objects(const char* key) const {
  const Json& value = at(key);
  if (!value.is_array()) refuse(key, value, "a list of objects");
  std::vector<Example> all;
  for (const Json& v : value) all.emplace_back(v, where_ + ", " + key);
  return all;
}

std::vector<Example> read_examples(const fs::path& folder, const std::string& name, const std::string& option, int64_t limit) {
  if (folder.empty()) fail("{} is missing; give the folder that holds {}.jsonl or {}.jsonl.zst", option, name, name);
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) fail("{}: there is no such folder; {} is the folder that holds {}.jsonl or {}.jsonl.zst", folder.string(), option, name, name);
  fs::path path = folder / (name + ".jsonl");
  if (!fs::exists(path, ignored)) path += ".zst";
  if (!fs::exists(path, ignored)) fail("{}: holds no {}.jsonl and no {}.jsonl.zst; is it the folder that {} wants?", folder.string(), name, name, option);
  const auto stream = open_stream(path);
  std::vector<Example> all;
  std::string pending, chunk(size_t{1} << 16, '\0');
  int64_t line = 0;
  const auto take = [&](std::string_view text) {
    ++line;
    if (text.find_first_not_of(" \t\r") == std::string_view::npos) return;
    const std::string where = fmt::format("{}: line {}", path.string(), line);
    Json json = parse_json(text, where);
    if (!json.is_object()) fail("{}: {}, expected an object", where, describe_json(json));
    all.emplace_back(std::move(json), where);
  };
  const auto full = [&] { return limit > 0 && static_cast<int64_t>(all.size()) >= limit; };
  for (size_t n = 1; n > 0 && !full();) {
    n = stream->read(chunk.data(), chunk.size());
    pending.append(chunk.data(), n);
    size_t begin = 0;
    for (size_t end; (end = pending.find('\n', begin)) != std::string::npos && !full(); begin = end + 1) take(std::string_view(pending).substr(begin, end - begin));
    pending.erase(0, begin);
    if (pending.size() > kLongestLine) fail("{}: line {} is longer than {} bytes", path.string(), line + 1, kLongestLine);
  }
  if (!pending.empty() && !full()) take(pending);
  if (all.empty()) fail("{}: holds no example", path.string());
  return all;
}

}  // namespace oryx
