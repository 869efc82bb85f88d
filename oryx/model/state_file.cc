#include "oryx/model/state_file.h"

#include <ATen/ATen.h>

#include <charconv>
#include <cstring>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/hash.h"
#include "oryx/common/options.h"
#include "oryx/common/progress.h"
#include "oryx/common/utf8.h"
#include "oryx/io/safetensors.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kFormatName = "oryx-state ";
constexpr const char* kFormat = "oryx-state 1";
constexpr const char* kEndLogits = "end.logits";
constexpr const char* kEndIds = "end.ids";
// Lengths and settings: positions behind a sequence this long still fit into 32 bits.
constexpr int64_t kMostNumber = int64_t{1} << 30;

// FNV-1a over 64-bit words, the rest by bytes: weights are many. Its values stand in files, so it never changes.
uint64_t hash_words(const void* data, size_t size, uint64_t hash) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  size_t at = 0;
  for (; at + 8 <= size; at += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + at, 8);
    hash = (hash ^ word) * 0x100000001b3;
    hash ^= hash >> 32;  // a product alone never carries a high bit down
  }
  return fnv1a(bytes + at, size - at, hash);
}

class Metadata {
 public:
  explicit Metadata(const SafetensorsReader& file) : file_(file) {}
  const std::string& text(const std::string& key) const {
    const auto it = file_.metadata().find(key);
    if (it == file_.metadata().end()) fail("{}: no '{}' in its metadata, expected a session file written by oryx", file_.path(), key);
    return it->second;
  }
  bool has(const std::string& key) const { return file_.metadata().count(key) > 0; }
  // Non-negative integers between commas.
  std::vector<int64_t> list(const std::string& key, std::string_view text) const {
    std::vector<int64_t> out;
    while (!text.empty()) {
      const size_t comma = std::min(text.find(','), text.size());
      int64_t value = -1;
      const auto [end, error] = std::from_chars(text.data(), text.data() + comma, value);
      if (error != std::errc() || end != text.data() + comma || value < 0 || value > kMostNumber) {
        fail("{}: '{}' in its metadata is '{}', expected integers of 0 to {}", file_.path(), key, shown(this->text(key)), kMostNumber);
      }
      out.push_back(value);
      text.remove_prefix(std::min(comma + 1, text.size()));
    }
    return out;
  }
  int64_t number(const std::string& key) const {
    const auto all = list(key, text(key));
    if (all.size() != 1) fail("{}: '{}' in its metadata is '{}', expected one integer", file_.path(), key, shown(text(key)));
    return all[0];
  }

 private:
  const SafetensorsReader& file_;
};

std::string config_hash(const LanguageModel& model) { return fmt::format("{:016x}", fnv1a(dump_options(model.config()))); }

// Which of the three that make a fingerprint is another, as far as the file says.
std::string difference(const Metadata& meta, const LanguageModel& model) {
  const char* own = at::toString(model.compute_dtype());
  if (!meta.has("precision") || !meta.has("config")) return "";
  if (meta.text("precision") != own) return fmt::format("; it was saved in {}, this one computes in {}", shown(meta.text("precision")), own);
  return meta.text("config") != config_hash(model) ? "; the configs differ" : "; the configs are the same, the weights differ";
}

// What a file says of dropped rows must be what a state of these options would have dropped.
void check_rows_from(const std::string& path, const RowBound& bound, const std::vector<int64_t>& lengths, const std::vector<int64_t>& from) {
  if (from.size() != lengths.size()) fail("{}: rows_from of {} sequences, expected {}", path, from.size(), lengths.size());
  for (size_t n = 0; n < from.size(); ++n) {
    const int64_t least = bound.on() && lengths[n] - bound.last > bound.first ? lengths[n] - bound.last : 0;
    const bool none = from[n] == 0 && least == 0, some = bound.on() && from[n] > bound.first && from[n] >= least && from[n] <= lengths[n];
    if (!none && !some) fail("{}: rows from {} on of a sequence of {} tokens, expected {} or more", path, from[n], lengths[n], least);
  }
}

// The file's tensors are there; what it makes a state allocate besides is a ring of convolution inputs and a first page of rows.
void check_memory(const std::string& path, const std::vector<std::vector<SlotSpec>>& layers, size_t sequences, const StateOptions& options) {
  double bytes = 0;
  for (const auto& slots : layers) {
    for (const SlotSpec& slot : slots) {
      const double ring = slot.kind == SlotKind::kTail ? static_cast<double>(options.ring) * slot.shape[0] * at::elementSize(slot.dtype) : 0;
      const double page = slot.kind == SlotKind::kPerToken ? static_cast<double>(options.page_tokens) * slot.bytes() : 0;
      bytes += static_cast<double>(sequences) * (ring + page);
    }
  }
  if (const auto free = static_cast<double>(available_memory()); bytes > free) {
    fail("{}: its ring of {} tokens and pages of {} would take {}, but only {} of memory are free", path, options.ring, options.page_tokens, human_bytes(bytes),
         human_bytes(free));
  }
}

constexpr std::string_view kRouterGains = "router.gains.";

// A tensor of that name, type and shape; -1: a size that is the file's.
at::Tensor router_tensor(const SafetensorsReader& file, const std::string& name, at::ScalarType dtype, int64_t size) {
  const auto it = file.tensors().find(name);
  if (it == file.tensors().end()) fail("{}: tensor '{}' is missing, which belongs to what a router goes on by", file.path(), name);
  if (it->second.dtype != dtype || it->second.shape.size() != 1 || (size >= 0 && it->second.shape[0] != size)) {
    fail("{}: tensor '{}' is {} [{}], expected {} [{}]", file.path(), name, safetensors_dtype(it->second.dtype), fmt::join(it->second.shape, ", "), safetensors_dtype(dtype),
         size < 0 ? "any" : std::to_string(size));
  }
  return file.load(name);
}

TextRouters load_routers(const SafetensorsReader& file, const ModelConfig& config, int64_t length) {
  TextRouters r;
  if (file.tensors().count("router.hidden") == 0) return r;
  const at::Tensor ids = router_tensor(file, "router.ids", at::kInt, length), prompts = router_tensor(file, "router.prompts", at::kInt, -1);
  r.hidden = router_tensor(file, "router.hidden", at::kFloat, config.layer.hidden_size);
  r.ids.assign(ids.const_data_ptr<int32_t>(), ids.const_data_ptr<int32_t>() + ids.numel());
  for (const int32_t id : r.ids) {
    if (id < 0 || id >= config.vocab_size) fail("{}: tensor 'router.ids' holds the token {}, expected 0 to {}", file.path(), id, config.vocab_size - 1);
  }
  const int32_t* bound = prompts.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < prompts.numel(); ++i) {
    const bool rises = bound[i] >= 0 && bound[i] <= length && (i == 0 || (i % 2 == 1 ? bound[i] > bound[i - 1] : bound[i] >= bound[i - 1]));
    if (!rises || prompts.numel() % 2 == 1) fail("{}: tensor 'router.prompts' does not hold ranges of {} tokens that rise", file.path(), length);
    if (i % 2 == 1) r.prompts.emplace_back(bound[i - 1], bound[i]);
  }
  for (const auto& [name, info] : file.tensors()) {
    if (!name.starts_with(kRouterGains)) continue;
    const at::Tensor gains = router_tensor(file, name, at::kFloat, length);
    if (gains.isinf().any().item<bool>()) fail("{}: tensor '{}' holds a gain that is infinite; the file is damaged", file.path(), name);
    r.gains[name.substr(kRouterGains.size())].assign(gains.const_data_ptr<float>(), gains.const_data_ptr<float>() + gains.numel());
  }
  return r;
}

TextEnd load_end(const SafetensorsReader& file, int64_t vocabulary) {
  TextEnd end;
  const auto logits = file.tensors().find(kEndLogits), ids = file.tensors().find(kEndIds);
  if (logits == file.tensors().end() && ids == file.tensors().end()) return end;
  if (logits == file.tensors().end() || ids == file.tensors().end()) fail("{}: has one of '{}' and '{}', expected both or none", file.path(), kEndLogits, kEndIds);
  if (logits->second.dtype != at::kFloat || logits->second.shape != std::vector<int64_t>{vocabulary}) {
    fail("{}: tensor '{}' is {} [{}], expected F32 [{}]", file.path(), kEndLogits, safetensors_dtype(logits->second.dtype), fmt::join(logits->second.shape, ", "), vocabulary);
  }
  if (ids->second.dtype != at::kInt || ids->second.shape.size() != 1 || ids->second.shape[0] > static_cast<int64_t>(TextEnd::kIds)) {
    fail("{}: tensor '{}' is {} [{}], expected I32 [{}] at most", file.path(), kEndIds, safetensors_dtype(ids->second.dtype), fmt::join(ids->second.shape, ", "), TextEnd::kIds);
  }
  end.logits = file.load(kEndLogits);
  const at::Tensor values = file.load(kEndIds);
  end.ids.assign(values.const_data_ptr<int32_t>(), values.const_data_ptr<int32_t>() + values.numel());
  for (const int32_t id : end.ids) {
    if (id < 0 || id >= vocabulary) fail("{}: tensor '{}' holds the token {}, expected 0 to {}", file.path(), kEndIds, id, vocabulary - 1);
  }
  return end;
}

}  // namespace

std::string fingerprint(const LanguageModel& model) {
  uint64_t hash = fnv1a(dump_options(model.config()));
  hash = fnv1a(at::toString(model.compute_dtype()), std::strlen(at::toString(model.compute_dtype())), hash);
  for (const auto& p : model.parameters()) {
    const at::Tensor x = p.detach().contiguous().cpu();
    hash = hash_words(x.const_data_ptr(), x.nbytes(), hash);
  }
  return fmt::format("{:016x}", hash);
}

void save_state(const LanguageModel& model, const State& state, const fs::path& path, const TextEnd& end) {
  std::vector<std::string> checkpoints;
  for (const auto& positions : state.checkpoints()) checkpoints.push_back(fmt::format("{}", fmt::join(positions, ",")));
  const StateOptions& o = state.options();
  auto tensors = state.tensors();
  if (end.logits.defined()) {
    TORCH_CHECK(state.sequences() == 1 && end.ids.size() <= TextEnd::kIds, "save_state: an end of ", end.ids.size(), " tokens for ", state.sequences(), " sequences");
    tensors.emplace_back(kEndLogits, end.logits);
    tensors.emplace_back(kEndIds, at::tensor(end.ids, at::kInt));
  }
  if (const TextRouters& r = end.routers; r.known()) {
    TORCH_CHECK(state.sequences() == 1 && static_cast<int64_t>(r.ids.size()) == state.lengths()[0], "save_state: routers of ", r.ids.size(), " tokens");
    std::vector<int32_t> prompts;
    for (const auto& [begin, stop] : r.prompts) prompts.insert(prompts.end(), {static_cast<int32_t>(begin), static_cast<int32_t>(stop)});
    tensors.emplace_back("router.ids", at::tensor(r.ids, at::kInt));
    tensors.emplace_back("router.hidden", r.hidden);
    tensors.emplace_back("router.prompts", at::tensor(prompts, at::kInt));
    for (const auto& [identity, gains] : r.gains) tensors.emplace_back(std::string(kRouterGains) + identity, at::tensor(gains, at::kFloat));
  }
  write_safetensors(path, tensors,
                    {{"format", kFormat},
                     {"model", fingerprint(model)},
                     {"precision", at::toString(model.compute_dtype())},
                     {"config", config_hash(model)},
                     {"lengths", fmt::format("{}", fmt::join(state.lengths(), ","))},
                     {"checkpoints", fmt::format("{}", fmt::join(checkpoints, ";"))},
                     {"checkpoint_every", std::to_string(o.checkpoint_every)},
                     {"ring", std::to_string(o.ring)},
                     {"keep_rows", o.keep_rows ? "1" : "0"},
                     {"drop_rows", o.drop_rows ? "1" : "0"},
                     {"bound", fmt::format("{},{},{}", o.bound.first, o.bound.window, o.bound.back)},
                     {"rows_from", fmt::format("{}", fmt::join(state.rows_from(), ","))},
                     {"kept", o.kept.on() ? kv_text(o) : ""},
                     {"kept_lost", fmt::format("{}", fmt::join(state.kept().lost(), ","))},
                     {"page_tokens", std::to_string(o.page_tokens)}});
}

State load_state(const LanguageModel& model, const fs::path& path, int64_t budget, TextEnd* end) {
  const SafetensorsReader file(path);
  const Metadata meta(file);
  if (meta.text("format") != kFormat) {
    fail("{}: its format is '{}', expected '{}'{}", file.path(), shown(meta.text("format")), kFormat,
         meta.text("format").starts_with(kFormatName) ? "; another version of oryx wrote it" : "");
  }
  const std::string own = fingerprint(model);
  if (meta.text("model") != own) {
    fail("{}: is the session of another model (fingerprint {}, this one's is {}{}); load the model, weights and precision that it was saved with", file.path(),
         shown(meta.text("model")), own, difference(meta, model));
  }
  const std::vector<int64_t> lengths = meta.list("lengths", meta.text("lengths"));
  if (lengths.empty()) fail("{}: holds no sequence", file.path());
  std::vector<std::vector<int64_t>> checkpoints;
  std::string_view rest = meta.text("checkpoints");
  for (const int64_t length : lengths) {
    const size_t end = std::min(rest.find(';'), rest.size());
    checkpoints.push_back(meta.list("checkpoints", rest.substr(0, end)));
    int64_t last = 0;
    for (const int64_t at : checkpoints.back()) {
      if (at <= last || at > length) fail("{}: a checkpoint at {} in a sequence of {} tokens, after one at {}", file.path(), at, length, last);
      last = at;
    }
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  StateOptions options;
  options.checkpoint_every = meta.number("checkpoint_every");
  options.ring = meta.number("ring");
  options.keep_rows = meta.number("keep_rows") != 0;
  options.drop_rows = meta.number("drop_rows") != 0;
  options.budget = budget;
  std::vector<int64_t> rows_from(lengths.size(), 0), kept_lost(lengths.size(), 0);
  if (meta.has("bound")) {  // files of before bounds have none
    const auto bound = meta.list("bound", meta.text("bound"));
    if (bound.size() != 3) fail("{}: 'bound' in its metadata is '{}', expected three integers", file.path(), shown(meta.text("bound")));
    options.bound = {bound[0], bound[1], bound[2]};
    options.page_tokens = meta.number("page_tokens");
    rows_from = meta.list("rows_from", meta.text("rows_from"));
  }
  try {
    if (meta.has("kept") && !meta.text("kept").empty()) {
      StateOptions kept;
      set_kv(kept, meta.text("kept"));
      options.kept = kept.kept;
      kept_lost = meta.list("kept_lost", meta.text("kept_lost"));
      if (kept_lost.size() != lengths.size()) fail("kept_lost of {} sequences, expected {}", kept_lost.size(), lengths.size());
    }
    options.validate();
  } catch (const Error& e) {
    fail("{}: {}", file.path(), e.what());
  }
  check_rows_from(file.path(), options.row_bound(model.refill_tokens()), lengths, rows_from);
  const auto rows_of = [&](size_t n) { return rows_from[n] > 0 ? options.bound.first + lengths[n] - rows_from[n] : lengths[n]; };
  const auto get = [&](const std::string& name, const SlotSpec& spec, int64_t rows) {
    std::vector<int64_t> shape = spec.shape;
    const auto it = file.tensors().find(name);
    if (it == file.tensors().end()) fail("{}: tensor '{}' is missing", file.path(), name);
    if (rows == State::kAnyRows) rows = it->second.shape.empty() ? 0 : it->second.shape[0];
    if (rows >= 0) shape.insert(shape.begin(), rows);
    if (it->second.shape != shape || it->second.dtype != spec.dtype) {
      fail("{}: tensor '{}' is {} [{}], expected {} [{}]", file.path(), name, safetensors_dtype(it->second.dtype), fmt::join(it->second.shape, ", "),
           safetensors_dtype(spec.dtype), fmt::join(shape, ", "));
    }
    return file.load(name);
  };
  // Before anything is allocated for its lengths: the file must have what they say.
  const auto layers = LanguageModel::slots(model.config(), model.compute_dtype(), options);
  for (size_t n = 0; n < lengths.size(); ++n) {
    for (size_t i = 0; i < layers.size(); ++i) {
      for (const auto& slot : layers[i]) {
        const auto it = file.tensors().find(fmt::format("sequence{}.{}.{}", n, i, slot.name));
        const bool rows = slot.kind == SlotKind::kPerToken;
        if (it == file.tensors().end() || (rows && (it->second.shape.empty() || it->second.shape[0] != rows_of(n)))) {
          fail("{}: tensor 'sequence{}.{}.{}' is missing or not of {} tokens", file.path(), n, i, slot.name, rows_of(n));
        }
      }
    }
  }
  check_memory(file.path(), layers, lengths.size(), options);
  if (end != nullptr) {
    *end = load_end(file, model.config().vocab_size);
    if (lengths.size() == 1) end->routers = load_routers(file, model.config(), lengths[0]);
  }
  State state = model.make_state(static_cast<int64_t>(lengths.size()), options);
  state.assign(lengths, rows_from, checkpoints, kept_lost, get);
  return state;
}

}  // namespace oryx
