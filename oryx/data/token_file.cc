#include "oryx/data/token_file.h"

#include <zstd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <list>

#include "oryx/common/error.h"

namespace oryx {

static_assert(std::endian::native == std::endian::little, "token files are read in place");

namespace {
constexpr size_t kCachedBlocks = 32;       // 4 MiB of uint16 tokens at the default block size
constexpr size_t kCachedBytes = 64 << 20;  // and no more than that of larger ones, which a small file may claim; the newest block stays
constexpr uint64_t kLargestBlock = uint64_t{1} << 26;
constexpr uint64_t kLargestCount = uint64_t{1} << 58;  // eight times the entries of both tables still fits into 64 bits
}  // namespace

// The blocks used last, newest in front.
struct TokenFile::Cache {
  std::mutex mutex;
  std::list<std::pair<uint64_t, std::shared_ptr<const std::string>>> blocks;
};

TokenFile::TokenFile(const std::filesystem::path& path)
    : path_(path.string()), file_(path), cache_(std::make_unique<Cache>()) {
  check_header();
  check_tables();
}

TokenFile::~TokenFile() = default;

void TokenFile::check_header() {
  const auto bytes = file_.bytes();
  if (bytes.size() < sizeof header_) fail("{}: {} bytes, too short for a token file", path_, bytes.size());
  std::memcpy(&header_, bytes.data(), sizeof header_);
  const TokenHeader& h = header_;
  if (std::memcmp(h.magic, "oryx.tok", 8) != 0) {
    fail("{}: not a token file; make one from text with: oryx data build", path_);
  }
  if (h.version != 1) fail("{}: token file of version {}, this program reads version 1", path_, h.version);
  if (h.header_checksum != fnv1a(&h, sizeof h - 8)) fail("{}: damaged header (checksum)", path_);
  const bool zstd = h.encoding == static_cast<uint32_t>(TokenEncoding::zstd);
  if (!zstd && h.encoding != 0) fail("{}: unknown encoding {}", path_, h.encoding);
  if (h.token_bytes != 2 && h.token_bytes != 4) fail("{}: tokens of {} bytes, expected 2 or 4", path_, h.token_bytes);
  const uint64_t most = h.token_bytes == 2 ? 1 << 16 : uint64_t{1} << 31;
  if (h.vocab_size == 0 || h.vocab_size > most) {
    fail("{}: vocabulary of {} with tokens of {} bytes", path_, h.vocab_size, h.token_bytes);
  }
  if (zstd ? h.block_tokens == 0 || h.block_tokens > kLargestBlock : h.block_tokens != 0) {
    fail("{}: impossible block size {}", path_, h.block_tokens);
  }
  if (h.tokens >= kLargestCount || h.documents > h.tokens) {
    fail("{}: impossible counts ({} tokens, {} documents)", path_, h.tokens, h.documents);
  }
  if (h.payload_bytes > bytes.size()) {
    fail("{}: {} bytes, but its header speaks of {} of tokens alone; is it truncated?", path_, bytes.size(), h.payload_bytes);
  }
  if (!zstd && h.payload_bytes != h.tokens * h.token_bytes) {
    fail("{}: {} bytes for {} tokens of {}", path_, h.payload_bytes, h.tokens, h.token_bytes);
  }
  block_count_ = zstd ? (h.tokens + h.block_tokens - 1) / h.block_tokens : 0;
}

void TokenFile::check_tables() {
  const auto bytes = file_.bytes();
  const TokenHeader& h = header_;
  // None of these can overflow: payload_bytes fits the file, the counts are below 2^58.
  const uint64_t tables = sizeof h + (h.payload_bytes + 7) / 8 * 8;
  const uint64_t starts = h.documents + 1, blocks = h.encoding == 0 ? 0 : block_count_ + 1;
  const uint64_t expected = tables + 8 * (starts + blocks);
  if (bytes.size() != expected) {
    fail("{}: {} bytes, but its header says {}; {}", path_, bytes.size(), expected,
         bytes.size() < expected ? "is it truncated?" : "something was appended");
  }
  payload_ = bytes.data() + sizeof h;
  starts_ = reinterpret_cast<const uint64_t*>(bytes.data() + tables);
  blocks_ = starts_ + starts;
  if (fnv1a(starts_, 8 * (starts + blocks)) != h.tables_checksum) fail("{}: damaged tables (checksum)", path_);
  for (uint64_t i = 0; i < h.documents; ++i) {
    if (starts_[i] >= starts_[i + 1]) fail("{}: document {} ends before it begins", path_, i);
  }
  if (starts_[0] != 0 || starts_[h.documents] != h.tokens) fail("{}: the documents do not cover the tokens", path_);
  if (blocks == 0) return;
  for (uint64_t i = 0; i < block_count_; ++i) {
    if (blocks_[i] >= blocks_[i + 1]) fail("{}: block {} ends before it begins", path_, i);
  }
  if (blocks_[0] != 0 || blocks_[block_count_] != h.payload_bytes)
    fail("{}: the blocks do not cover the payload", path_);
}

// A frame is decompressed into a buffer of the size that the header implies; what the frame says itself is only
// compared.
std::shared_ptr<const std::string> TokenFile::block(uint64_t index) const {
  std::lock_guard lock(cache_->mutex);
  auto& cached = cache_->blocks;
  const auto found = std::find_if(cached.begin(), cached.end(), [&](const auto& b) { return b.first == index; });
  if (found != cached.end()) {
    cached.splice(cached.begin(), cached, found);
    return found->second;
  }
  const uint64_t begin = index * header_.block_tokens;
  const size_t size = std::min<uint64_t>(header_.block_tokens, header_.tokens - begin) * header_.token_bytes;
  const size_t stored = blocks_[index + 1] - blocks_[index];
  // Asked before memory is taken: a small file may claim large blocks.
  if (const auto says = ZSTD_getFrameContentSize(payload_ + blocks_[index], stored);
      says != size && says != ZSTD_CONTENTSIZE_UNKNOWN && says != ZSTD_CONTENTSIZE_ERROR) {
    fail("{}: block {} holds {} bytes, expected {}", path_, index, says, size);
  }
  auto data = std::make_shared<std::string>(size, '\0');
  const size_t n = ZSTD_decompress(data->data(), size, payload_ + blocks_[index], stored);
  if (ZSTD_isError(n)) fail("{}: damaged block {}: {}", path_, index, ZSTD_getErrorName(n));
  if (n != size) fail("{}: block {} holds {} bytes, expected {}", path_, index, n, size);
  cached.emplace_front(index, data);
  while (cached.size() > kCachedBlocks || (cached.size() > 1 && cached.size() * size > kCachedBytes)) cached.pop_back();
  return data;
}

template <typename Token>
void TokenFile::read_as(uint64_t begin, std::span<int64_t> out) const {
  const auto copy = [&](const void* from, std::span<int64_t> to) {
    const auto* tokens = static_cast<const Token*>(from);
    uint64_t largest = 0;
    for (size_t i = 0; i < to.size(); ++i) {
      to[i] = static_cast<int64_t>(tokens[i]);
      largest = std::max<uint64_t>(largest, tokens[i]);
    }
    if (largest >= header_.vocab_size) {
      fail("{}: token {} after token {} is outside the vocabulary of {}; the file is damaged", path_, largest, begin,
           header_.vocab_size);
    }
  };
  if (header_.encoding == 0) return copy(reinterpret_cast<const Token*>(payload_) + begin, out);
  while (!out.empty()) {
    const uint64_t index = begin / header_.block_tokens, offset = begin % header_.block_tokens;
    const auto data = block(index);
    const size_t n = std::min(out.size(), data->size() / sizeof(Token) - offset);
    copy(reinterpret_cast<const Token*>(data->data()) + offset, out.first(n));
    out = out.subspan(n);
    begin += n;
  }
}

void TokenFile::read(uint64_t begin, std::span<int64_t> out) const {
  if (begin > header_.tokens || out.size() > header_.tokens - begin) {
    throw std::out_of_range(fmt::format("{}: tokens {} to {} of {}", path_, begin, begin + out.size(), header_.tokens));
  }
  header_.token_bytes == 2 ? read_as<uint16_t>(begin, out) : read_as<uint32_t>(begin, out);
}

void TokenFile::verify() const {
  if (fnv1a(payload_, header_.payload_bytes) != header_.payload_checksum) fail("{}: damaged payload (checksum)", path_);
  std::vector<int64_t> buffer(1 << 16);
  for (uint64_t i = 0; i < header_.tokens; i += buffer.size()) {
    read(i, std::span(buffer).first(std::min<uint64_t>(buffer.size(), header_.tokens - i)));
  }
}

}  // namespace oryx
