#include "oryx/io/sharded_safetensors.h"

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/json.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr uint64_t kLargestIndex = 100'000'000;  // as of a safetensors header, which lists as much
}  // namespace

ShardedSafetensors::ShardedSafetensors(const fs::path& folder) {
  std::error_code ignored;
  const bool single = fs::exists(folder / kSingle, ignored), index = fs::exists(folder / kIndex, ignored);
  if (single == index) fail("{}: holds {} of {} and {}, expected one", folder.string(), single ? "both" : "none", kSingle, kIndex);
  path_ = (folder / (single ? kSingle : kIndex)).string();
  if (!single) {
    read_index(folder);
    return;
  }
  files_.push_back(std::make_unique<SafetensorsReader>(path_));
  for (const auto& [name, info] : files_.back()->tensors()) where_.emplace(name, files_.back().get());
}

void ShardedSafetensors::read_index(const fs::path& folder) {
  std::error_code error;  // what cannot be asked for its size is refused by read_file
  if (const uint64_t size = fs::file_size(path_, error); !error && size > kLargestIndex) {
    fail("{}: {} bytes, expected an index of at most {}", path_, size, kLargestIndex);
  }
  const Json index = parse_json(read_file(path_), path_);
  if (!index.is_object() || !index.contains("weight_map") || !index.at("weight_map").is_object()) fail("{}: has no object 'weight_map'", path_);
  std::map<std::string, const SafetensorsReader*> shards;
  for (const auto& [name, value] : index.at("weight_map").items()) {
    const std::string file = value.is_string() ? value.get<std::string>() : "";
    // A shard lies beside its index: a path that leads elsewhere is no shard's.
    if (file.empty() || fs::path(file).filename() != file || file == "." || file == "..") {
      fail("{}: weight_map names {} for tensor '{}', expected a file beside the index", path_, describe_json(value), shown(name));
    }
    if (shards.count(file) == 0) {
      files_.push_back(std::make_unique<SafetensorsReader>(folder / file));
      shards.emplace(file, files_.back().get());
    }
    if (!shards.at(file)->has(name)) fail("{}: tensor '{}' is not in {}, where weight_map puts it", path_, shown(name), shown(file));
    where_.emplace(name, shards.at(file));
  }
  for (const auto& file : files_) {
    for (const auto& [name, info] : file->tensors()) {
      if (where_.count(name) == 0) fail("{}: tensor '{}' is not in the index {}", file->path(), shown(name), path_);
    }
  }
}

std::vector<std::string> ShardedSafetensors::names() const {
  std::vector<std::string> out;
  for (const auto& [name, file] : where_) out.push_back(name);
  return out;
}

const SafetensorsReader& ShardedSafetensors::file_of(const std::string& name) const {
  const auto it = where_.find(name);
  if (it == where_.end()) fail("{}: tensor '{}' is missing{}", path_, name, did_you_mean(name, names()));
  return *it->second;
}

}  // namespace oryx
