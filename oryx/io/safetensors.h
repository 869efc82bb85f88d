// The safetensors format (https://github.com/huggingface/safetensors): 8 bytes of header length (little endian), a JSON header
// {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {string: string}}, then the data.
//
// The reader trusts nothing: lengths, extents, dtypes, names and nesting are checked before any use, with checked arithmetic.
// Limits: header 100 MB (the reference implementation's), 1,000,000 tensors, names of 1,024 bytes, rank 8.
// As in the reference, the extents must cover the data without holes or overlaps.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "oryx/common/file.h"

namespace oryx {

struct TensorInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin, end;  // bytes, from the start of the data
};

class SafetensorsReader {
 public:
  // Maps the file and checks its header. Throws Error on anything foreign, truncated or hostile.
  explicit SafetensorsReader(const std::filesystem::path& path);

  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }
  bool has(const std::string& name) const { return tensors_.count(name) > 0; }

  // An owned copy on the CPU. Throws Error when there is no such tensor.
  at::Tensor load(const std::string& name) const;

 private:
  void parse(std::string_view header, uint64_t data_size);

  std::string path_;
  MappedFile file_;
  uint64_t data_begin_ = 0;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// Writes the tensors (any device, any strides) in the order given; the file is whole or absent.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const std::map<std::string, std::string>& metadata = {});

// The same into a file that the caller commits (to make several appear together).
void put_safetensors(AtomicFile& file, const NamedTensors& tensors, const std::map<std::string, std::string>& metadata = {});

// The format's name of a dtype ("F32", "BF16", "I64" ...). Throws Error for one that the format lacks.
std::string_view safetensors_dtype(at::ScalarType dtype);

}  // namespace oryx
