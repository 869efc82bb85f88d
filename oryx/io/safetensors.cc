#include "oryx/io/safetensors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeader = 100'000'000;
constexpr size_t kMaxTensors = 1'000'000, kMaxName = 1024, kMaxRank = 8;

constexpr std::pair<std::string_view, at::ScalarType> kDtypes[] = {
    {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong},
    {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},  {"U8", at::kByte},       {"BOOL", at::kBool}};

// Builds the header's JSON with duplicate keys and deep nesting refused, which the ordinary parser lets pass. (Its form with a callback visits every entry of the
// enclosing object at each object's end: minutes for a header of 200,000 tensors.)
class HeaderBuilder : public nlohmann::detail::json_sax_dom_parser<json> {
  using Base = nlohmann::detail::json_sax_dom_parser<json>;

 public:
  HeaderBuilder(json& root, const std::string& path) : Base(root), path_(path) {}

  bool start_object(std::size_t size) {
    enter();
    keys_.emplace_back();
    return Base::start_object(size);
  }
  bool key(std::string& name) {
    keys_.back().push_back(name);
    return Base::key(name);
  }
  bool end_object() {
    auto& k = keys_.back();
    std::sort(k.begin(), k.end());
    const auto twice = std::adjacent_find(k.begin(), k.end());
    if (twice != k.end()) fail("{}: the safetensors header names '{}' twice", path_, shown(*twice));
    keys_.pop_back();
    --depth_;
    return Base::end_object();
  }
  bool start_array(std::size_t size) {
    enter();
    return Base::start_array(size);
  }
  bool end_array() {
    --depth_;
    return Base::end_array();
  }

 private:
  void enter() {
    if (++depth_ > 5) fail("{}: the safetensors header is nested deeper than the format allows", path_);
  }

  const std::string& path_;
  std::vector<std::vector<std::string>> keys_;  // of the objects that are open
  int depth_ = 0;
};

json parse_header(const std::string& path, std::string_view text) {
  json root;
  HeaderBuilder builder(root, path);
  try {
    json::sax_parse(text, &builder);
  } catch (const json::exception& e) {
    fail("{}: the safetensors header is not valid JSON; is this a safetensors file?", path);
  }
  return root;
}

uint64_t checked_bytes(const std::string& path, const std::string& name, const std::vector<int64_t>& shape, size_t element) {
  int64_t bytes = static_cast<int64_t>(element);
  bool empty = false;
  for (const int64_t n : shape) {
    empty |= n == 0;
    // A length of 0 counts as 1: strides are products of the other lengths.
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(n, 1), &bytes)) fail("{}: tensor '{}' has a shape whose size overflows", path, name);
  }
  return empty ? 0 : static_cast<uint64_t>(bytes);
}

std::vector<uint64_t> numbers(const std::string& path, const std::string& name, const json& entry, const char* key,
                              size_t max_count) {
  const auto it = entry.find(key);
  if (it == entry.end() || !it->is_array() || it->size() > max_count) {
    fail("{}: tensor '{}' has no valid '{}' (a list of at most {} numbers)", path, name, key, max_count);
  }
  std::vector<uint64_t> out;
  for (const auto& x : *it) {
    if (!x.is_number_unsigned() || x.get<uint64_t>() > INT64_MAX) {
      fail("{}: tensor '{}': '{}' holds something else than a whole number", path, name, key);
    }
    out.push_back(x.get<uint64_t>());
  }
  return out;
}

TensorInfo parse_entry(const std::string& path, const std::string& full_name, const json& entry, uint64_t data_size) {
  if (full_name.size() > kMaxName) fail("{}: a tensor name of {} bytes, at most {} are allowed", path, full_name.size(), kMaxName);
  const std::string name = shown(full_name);
  if (!entry.is_object()) fail("{}: the header's entry '{}' is no object", path, name);
  const std::string dtype = entry.contains("dtype") && entry["dtype"].is_string() ? entry["dtype"].get<std::string>() : "";
  const auto* found = std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const auto& d) { return d.first == dtype; });
  if (found == std::end(kDtypes)) fail("{}: tensor '{}' has the dtype '{}', which is not supported", path, name, shown(dtype));
  const auto shape = numbers(path, name, entry, "shape", kMaxRank);
  const auto extent = numbers(path, name, entry, "data_offsets", 2);
  TensorInfo info{found->second, {shape.begin(), shape.end()}, 0, 0};
  if (extent.size() != 2 || extent[0] > extent[1]) fail("{}: tensor '{}' has no valid data_offsets", path, name);
  info.begin = extent[0];
  info.end = extent[1];
  if (info.end > data_size) {
    fail("{}: tensor '{}' ends at byte {} of the data, but the file holds {}: truncated?", path, name, info.end, data_size);
  }
  const uint64_t want = checked_bytes(path, name, info.shape, at::elementSize(info.dtype));
  if (info.end - info.begin != want) {
    fail("{}: tensor '{}' spans {} bytes, its dtype and shape want {}", path, name, info.end - info.begin, want);
  }
  return info;
}

}  // namespace

std::string_view safetensors_dtype(at::ScalarType dtype) {
  for (const auto& [name, type] : kDtypes) {
    if (type == dtype) return name;
  }
  fail("safetensors has no dtype for {}", at::toString(dtype));
}

SafetensorsReader::SafetensorsReader(const std::filesystem::path& path) : path_(path.string()), file_(path) {
  const auto bytes = file_.bytes();
  if (bytes.size() < 8) fail("{}: {} bytes are too few for a safetensors file", path_, bytes.size());
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  if (header > kMaxHeader) fail("{}: claims a header of {} bytes, at most {} are allowed; is this a safetensors file?", path_, header, kMaxHeader);
  if (header > bytes.size() - 8) fail("{}: claims a header of {} bytes, but only {} follow: truncated?", path_, header, bytes.size() - 8);
  data_begin_ = 8 + header;
  parse({reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<size_t>(header)}, bytes.size() - data_begin_);
}

void SafetensorsReader::parse(std::string_view header, uint64_t data_size) {
  const json root = parse_header(path_, header);
  if (!root.is_object()) fail("{}: the safetensors header is no JSON object", path_);
  if (root.size() > kMaxTensors) fail("{}: {} tensors, at most {} are allowed", path_, root.size(), kMaxTensors);
  std::vector<std::pair<uint64_t, uint64_t>> extents;
  for (const auto& [name, entry] : root.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) fail("{}: __metadata__ is no object", path_);
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) fail("{}: __metadata__ '{}' is no string", path_, shown(key));
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    TensorInfo info = parse_entry(path_, name, entry, data_size);
    extents.emplace_back(info.begin, info.end);
    tensors_.emplace(name, std::move(info));
  }
  std::sort(extents.begin(), extents.end());
  uint64_t at = 0;
  for (const auto& [begin, end] : extents) {
    if (begin != at) fail("{}: tensor data {} at byte {}", path_, begin < at ? "overlap" : "leave a hole", begin < at ? begin : at);
    at = end;
  }
  if (at != data_size) fail("{}: {} bytes of data belong to no tensor", path_, data_size - at);
}

at::Tensor SafetensorsReader::load(const std::string& name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    std::vector<std::string> names;
    for (const auto& [n, info] : tensors_) names.push_back(n);
    fail("{}: holds no tensor '{}'{}", path_, name, did_you_mean(name, names));
  }
  const TensorInfo& info = it->second;
  at::Tensor t = at::empty(info.shape, at::TensorOptions().dtype(info.dtype));
  if (info.end > info.begin) std::memcpy(t.data_ptr(), file_.bytes().data() + data_begin_ + info.begin, info.end - info.begin);
  return t;
}

void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const std::map<std::string, std::string>& metadata) {
  AtomicFile file(path);
  put_safetensors(file, tensors, metadata);
  file.commit();
}

void put_safetensors(AtomicFile& file, const NamedTensors& tensors, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t at = 0;
  for (const auto& [name, t] : tensors) {
    const uint64_t end = at + t.nbytes();
    header[name] = {{"dtype", safetensors_dtype(t.scalar_type())}, {"shape", t.sizes().vec()}, {"data_offsets", {at, end}}};
    at = end;
  }
  std::string text = header.is_null() ? "{}" : header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data start aligned
  const uint64_t size = text.size();
  file.write(&size, 8);
  file.write(text);
  for (const auto& [name, t] : tensors) {
    const at::Tensor c = t.detach().contiguous().cpu();
    file.write(c.data_ptr(), c.nbytes());
  }
}

}  // namespace oryx
