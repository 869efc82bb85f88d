// The tensors of a model's folder as Hugging Face lays it out: model.safetensors, or model.safetensors.index.json
// ({"weight_map": {tensor: file}}) and the files it names.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "oryx/io/safetensors.h"

namespace oryx {

class ShardedSafetensors {
 public:
  // Throws Error for a folder without either, a shard that is missing or damaged, and an index that does not fit its shards.
  explicit ShardedSafetensors(const std::filesystem::path& folder);

  const std::string& path() const { return path_; }  // of model.safetensors or the index: for messages
  std::vector<std::string> names() const;            // sorted
  bool has(const std::string& name) const { return where_.count(name) > 0; }
  // These throw Error when there is no such tensor.
  const TensorInfo& info(const std::string& name) const { return file_of(name).tensors().at(name); }
  at::Tensor load(const std::string& name) const { return file_of(name).load(name); }
  // The file that holds it: for messages.
  const SafetensorsReader& file_of(const std::string& name) const;

 private:
  void read_index(const std::filesystem::path& folder);

  std::string path_;
  std::vector<std::unique_ptr<SafetensorsReader>> files_;
  std::map<std::string, const SafetensorsReader*> where_;
};

}  // namespace oryx
