#include "oryx/data/tokenizer.h"

#include <algorithm>
#include <charconv>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/hash.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace fs = std::filesystem;

namespace {

constexpr uint64_t kLargestFile = uint64_t{1} << 30;  // bytes; the largest vocabularies in use take about 20 MB

std::vector<TokenizerKind>& kinds() {
  static std::vector<TokenizerKind> list;
  return list;
}

fs::path find_in_folder(const fs::path& folder) {
  std::string names;
  for (const auto& kind : kinds()) {
    if (fs::exists(folder / kind.file_name)) return folder / kind.file_name;
    if (names.find(kind.file_name) == std::string::npos) names += (names.empty() ? "" : " or ") + kind.file_name;
  }
  fail("{}: no tokeniser in this folder (expected {})", folder.string(), names);
}

}  // namespace

TokenizerRegistration::TokenizerRegistration(TokenizerKind kind) {
  auto& list = kinds();
  const auto at = std::upper_bound(list.begin(), list.end(), kind,
                                   [](const TokenizerKind& a, const TokenizerKind& b) { return a.order < b.order; });
  list.insert(at, std::move(kind));
}

bool holds_tokenizer(const fs::path& folder) {
  std::error_code ignored;
  return std::any_of(kinds().begin(), kinds().end(), [&](const TokenizerKind& kind) { return fs::exists(folder / kind.file_name, ignored); });
}

std::unique_ptr<Tokenizer> load_tokenizer(const fs::path& path) {
  std::error_code error;
  if (path == "byte" && !fs::exists(path, error)) return make_byte_tokenizer();
  const fs::path file = fs::is_directory(path, error) ? find_in_folder(path) : path;
  if (const auto size = fs::file_size(file, error); !error && size > kLargestFile) {
    fail("{}: {} bytes is too large for a tokeniser", file.string(), size);
  }
  std::string bytes = read_file(file);
  for (const auto& kind : kinds()) {
    if (kind.recognises(file, bytes)) return kind.load(file.string(), std::move(bytes));
  }
  fail("{}: not a tokeniser file (expected a SentencePiece model or a tokenizer.json; make one with: oryx tokenizer train)", file.string());
}

std::vector<int32_t> Tokenizer::encode_prompt(std::string_view text) const {
  std::vector<int32_t> ids = encode(text);
  ids.insert(ids.begin(), bos_id());
  return ids;
}

std::vector<int32_t> Tokenizer::encode_document(std::string_view text) const {
  std::vector<int32_t> ids = encode_prompt(text);
  ids.push_back(eos_id());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  StreamDecoder decoder(*this);
  std::string text;
  for (const int32_t id : ids) text += decoder.add(id);
  return text + decoder.finish();
}

void Tokenizer::save(const fs::path& path) const { write_file(path, serialized()); }

uint64_t Tokenizer::fingerprint() const { return fnv1a(serialized()); }

std::string StreamDecoder::add(int32_t id) {
  if (id < 0 || id >= tokenizer_.vocab_size()) {
    fail("token id {} is outside the tokeniser's vocabulary of {}", id, tokenizer_.vocab_size());
  }
  std::string_view bytes = tokenizer_.token_bytes(id);
  if (drop_space_ && !bytes.empty()) {
    if (bytes.front() == ' ') bytes.remove_prefix(1);
    drop_space_ = false;
  }
  pending_ += bytes;
  std::string out;
  while (true) {
    const Utf8Scan scan = scan_utf8(pending_);
    out.append(pending_, 0, scan.valid);
    pending_.erase(0, scan.valid);
    if (pending_.empty() || scan.incomplete) return out;
    out += "\xEF\xBF\xBD";
    pending_.erase(0, 1);
  }
}

std::string StreamDecoder::finish() {
  drop_space_ = tokenizer_.leading_space();
  return replace_invalid_utf8(std::exchange(pending_, {}));
}

std::string fingerprint_text(uint64_t fingerprint) { return fmt::format("{:016x}", fingerprint); }

uint64_t parse_fingerprint(const std::string& text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (text.size() != 16 || error != std::errc() || end != text.data() + text.size()) {
    fail("'{}' is not a fingerprint; expected 16 hexadecimal digits", text.substr(0, 40));
  }
  return value;
}

}  // namespace oryx
