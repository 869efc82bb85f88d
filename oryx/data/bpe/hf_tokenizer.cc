// Byte-level BPE from a Hugging Face tokenizer.json (https://huggingface.co/docs/tokenizers), the form in which Llama 3, Qwen, GPT-2, OLMo and
// Granite are published. Ids equal those of the `tokenizers` library with add_special_tokens=False.
//
// bos and eos are not part of a tokenizer.json: they come from tokenizer_config.json beside it, else from the file's post_processor and the
// usual names. The copy that goes with data sets and checkpoints marks the added tokens that were found, with the key "oryx": there, because
// the `tokenizers` library refuses a file with an unknown key at the top and passes over one within an added token.
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/json.h"
#include "oryx/common/utf8.h"
#include "oryx/data/bpe/merges.h"
#include "oryx/data/bpe/pre_tokenizer.h"
#include "oryx/data/tokenizer.h"

namespace oryx {

namespace {

namespace fs = std::filesystem;
using JsonMap = nlohmann::json;  // with a logarithmic search: vocabularies have 10^5 keys

// Text that is one token wherever it stands.
struct AddedToken {
  std::string content;
  int32_t id;
  bool strips_left, strips_right;
};

std::string nfc(std::string_view text) {
  utf8proc_uint8_t* out = nullptr;
  const auto flags = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()), &out, flags);
  if (size < 0) fail("text of {} bytes cannot be brought to NFC: {}", text.size(), utf8proc_errmsg(size));
  std::string result(reinterpret_cast<char*>(out), static_cast<size_t>(size));
  std::free(out);
  return result;
}

// A whole code point's length at `at` and whether it is white space.
bool space_at(std::string_view text, size_t at, size_t* length) {
  utf8proc_int32_t c = 0;
  const auto n = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data() + at), static_cast<utf8proc_ssize_t>(text.size() - at), &c);
  *length = n > 0 ? static_cast<size_t>(n) : 1;
  if ((c >= 9 && c <= 13) || c == 0x85) return true;
  const auto category = utf8proc_category(c);
  return category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL || category == UTF8PROC_CATEGORY_ZP;
}

class AddedTokens {
 public:
  void add(AddedToken token) { by_first_[static_cast<unsigned char>(token.content.front())].push_back(std::move(token)); }
  void sort() {
    for (auto& list : by_first_) {
      std::sort(list.begin(), list.end(), [](const AddedToken& a, const AddedToken& b) { return a.content.size() > b.content.size(); });
    }
  }
  // Calls text(part) and token(id) in order; leftmost first, the longest among equals.
  template <class Text, class Token>
  void cut(std::string_view text, const Text& on_text, const Token& on_token) const {
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
      const AddedToken* found = find(text.substr(at));
      if (found == nullptr) {
        ++at;
        continue;
      }
      size_t left = at, right = at + found->content.size();
      size_t n = 0;
      if (found->strips_left) {
        for (size_t i = begin, run = begin; i <= at; i += n) {  // the white space that ends at the token
          if (i == at) {
            left = run;
            break;
          }
          if (!space_at(text, i, &n)) run = i + n;
        }
      }
      while (found->strips_right && right < text.size() && space_at(text, right, &n)) right += n;
      if (left > begin) on_text(text.substr(begin, left - begin));
      on_token(found->id);
      begin = at = right;
    }
    if (begin < text.size()) on_text(text.substr(begin));
  }

 private:
  const AddedToken* find(std::string_view rest) const {
    for (const auto& t : by_first_[static_cast<unsigned char>(rest.front())]) {
      if (rest.starts_with(t.content)) return &t;
    }
    return nullptr;
  }
  std::array<std::vector<AddedToken>, 256> by_first_;
};

struct Frame {
  int32_t bos = -1, eos = -1;
};

class HuggingFaceTokenizer : public Tokenizer {
 public:
  HuggingFaceTokenizer(const std::string& path, const JsonMap& json)
      : pieces_(json.value("pre_tokenizer", JsonMap()), path), merges_(json.value("model", JsonMap()), path), tokens_(merges_.tokens()) {
    read_normalizer(json.value("normalizer", JsonMap()), path);
    read_added(json.value("added_tokens", JsonMap::array()), path);
    frame_ = find_frame(path, json);
    // The copy that travels says what bos and eos are, whatever lies beside it.
    JsonMap copy = json;
    for (auto& token : copy["added_tokens"]) {
      const bool bos = token["id"] == frame_.bos, eos = token["id"] == frame_.eos;
      if (bos || eos) token["oryx"] = bos && eos ? "bos eos" : bos ? "bos" : "eos";
    }
    serialized_ = copy.dump();
  }

  int64_t vocab_size() const override { return static_cast<int64_t>(tokens_.size()); }
  int32_t bos_id() const override { return frame_.bos; }
  int32_t eos_id() const override { return frame_.eos; }
  int32_t unk_id() const override { return -1; }
  bool leading_space() const override { return pieces_.adds_space(); }
  const std::string& serialized() const override { return serialized_; }
  std::string file_name() const override { return "tokenizer.json"; }

  std::string_view token_bytes(int32_t id) const override {
    if (id == frame_.bos || id == frame_.eos) return {};
    return tokens_[static_cast<size_t>(id)];
  }

  std::vector<int32_t> encode(std::string_view text) const override {
    if (const Utf8Scan scan = scan_utf8(text); scan.valid != text.size()) fail("text is not UTF-8 at byte {}", scan.valid);
    std::vector<int32_t> ids;
    const auto token = [&](int32_t id) { ids.push_back(id); };
    const auto plain = [&](std::string_view part) {
      for (const auto& piece : pieces_.split(part)) merges_.encode(piece, ids);
    };
    // Tokens of the text as it came, then those of the text as it is after normalisation.
    raw_added_.cut(text, [&](std::string_view part) { normal_added_.cut(normalize_ ? nfc(part) : std::string(part), plain, token); }, token);
    return ids;
  }

 private:
  void read_normalizer(const JsonMap& json, const std::string& path) {
    if (json.is_null()) return;
    const std::string type = json.is_object() ? json.value("type", "") : "";
    if (type == "Sequence" && json.contains("normalizers") && json["normalizers"].is_array()) {
      for (const auto& part : json["normalizers"]) read_normalizer(part, path);
    } else if (type == "NFC") {
      normalize_ = true;
    } else {
      fail("{}: normalizer is {}, expected none or NFC", path, json.dump().substr(0, 80));
    }
  }

  void read_added(const JsonMap& list, const std::string& path) {
    if (!list.is_array()) fail("{}: added_tokens is not a list", path);
    for (const auto& json : list) {
      const bool whole = json.is_object() && json.contains("content") && json["content"].is_string() && json.contains("id") &&
                         json["id"].is_number_integer() && !json["content"].get_ref<const std::string&>().empty();
      const int64_t id = whole ? json["id"].get<int64_t>() : -1;
      if (!whole || id < 0 || id > INT32_MAX / 128) fail("{}: added_tokens: found {}, expected an id and content", path, json.dump().substr(0, 80));
      if (json.value("single_word", false)) fail("{}: added token '{}' is a single_word, which is not read", path, shown(json["content"].get<std::string>()));
      AddedToken t{json["content"].get<std::string>(), static_cast<int32_t>(id), json.value("lstrip", false), json.value("rstrip", false)};
      if (static_cast<size_t>(id) >= tokens_.size()) tokens_.resize(static_cast<size_t>(id) + 1);
      tokens_[static_cast<size_t>(id)] = t.content;
      by_content_[t.content] = t.id;
      const bool normalized = json.value("normalized", true);
      if (normalized && normalize_) t.content = nfc(t.content);  // it is looked for in normalised text
      (normalized ? normal_added_ : raw_added_).add(std::move(t));
    }
    raw_added_.sort();
    normal_added_.sort();
  }

  int32_t id_of(const JsonMap& name) const {
    const JsonMap& text = name.is_object() && name.contains("content") ? name["content"] : name;
    if (!text.is_string()) return -1;
    const auto it = by_content_.find(text.get<std::string>());
    return it == by_content_.end() ? -1 : it->second;
  }

  // What a TemplateProcessing puts in front of a single text and behind it.
  void read_post_processor(const JsonMap& json, Frame* f) const {
    if (!json.is_object()) return;
    if (json.contains("processors") && json["processors"].is_array()) {
      for (const auto& part : json["processors"]) read_post_processor(part, f);
    }
    if (json.value("type", "") != "TemplateProcessing" || !json.contains("single") || !json["single"].is_array()) return;
    bool behind = false;
    for (const auto& part : json["single"]) {
      if (!part.is_object()) continue;
      behind |= part.contains("Sequence");
      if (!part.contains("SpecialToken") || !part["SpecialToken"].is_object()) continue;
      int32_t& id = behind ? f->eos : f->bos;
      if (id < 0) id = id_of(part["SpecialToken"].value("id", JsonMap()));
    }
  }

  Frame find_frame(const std::string& path, const JsonMap& json) const {
    Frame f;
    for (const auto& token : json.value("added_tokens", JsonMap::array())) {
      if (!token.contains("oryx")) continue;
      const JsonMap& mark = token["oryx"];
      if (mark != "bos" && mark != "eos" && mark != "bos eos") fail("{}: added_tokens: oryx is {}, expected bos, eos or bos eos", path, shown(mark.dump()));
      const int32_t id = token["id"].get<int32_t>();
      if (mark != "eos") f.bos = id;
      if (mark != "bos") f.eos = id;
    }
    if (f.bos >= 0 && f.eos >= 0) return f;
    f = {};
    const fs::path config = fs::path(path).parent_path() / "tokenizer_config.json";
    if (std::error_code ignored; fs::exists(config, ignored)) {
      const std::string text = read_file(config);
      check_json_depth(text, config.string());
      const JsonMap c = JsonMap::parse(text, nullptr, false);
      if (c.is_object()) f = {id_of(c.value("bos_token", JsonMap())), id_of(c.value("eos_token", JsonMap()))};
    }
    read_post_processor(json.value("post_processor", JsonMap()), &f);
    for (const char* name : {"<|begin_of_text|>", "<s>", "<bos>"}) f.bos = f.bos < 0 ? id_of(name) : f.bos;
    for (const char* name : {"<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"}) f.eos = f.eos < 0 ? id_of(name) : f.eos;
    if (f.eos < 0) fail("{}: no token that ends a text was found; name it as eos_token in tokenizer_config.json beside the file", path);
    if (f.bos < 0) f.bos = f.eos;
    return f;
  }

  bpe::PreTokenizer pieces_;
  bpe::Merges merges_;
  std::vector<std::string> tokens_;
  AddedTokens raw_added_, normal_added_;
  std::unordered_map<std::string, int32_t> by_content_;
  Frame frame_;
  bool normalize_ = false;
  std::string serialized_;
};

std::unique_ptr<Tokenizer> load(const std::string& path, std::string bytes) {
  check_json_depth(bytes, path);
  const JsonMap json = JsonMap::parse(bytes, nullptr, false);
  if (!json.is_object()) fail("{}: is not a JSON object; was the file cut short?", path);
  if (!json.contains("model") || !json["model"].is_object()) fail("{}: not a tokenizer.json: it has no object \"model\"", path);
  try {
    return std::make_unique<HuggingFaceTokenizer>(path, json);
  } catch (const nlohmann::json::exception& e) {  // a key of another type than it must have
    fail("{}: not a tokenizer.json: {}", path, e.what());
  }
}

bool recognises(const fs::path& path, std::string_view bytes) { return path.extension() == ".json" || bytes.starts_with('{'); }

ORYX_TOKENIZER(huggingface, "Hugging Face tokenizer.json", "tokenizer.json", 50, recognises, load);

}  // namespace

}  // namespace oryx
