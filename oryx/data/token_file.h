// Token files (".tok"): the tokens of many documents, one after the other, memory-mapped or in zstd blocks. Little
// endian.
//
//   bytes 0..127   header (TokenHeader below)
//   payload        raw: tokens * token_bytes bytes; zstd: one frame for each block of block_tokens tokens (the last
//   shorter) padding        zeros to a multiple of 8 documents      (documents + 1) uint64: where each document begins,
//   in tokens; the last is the number of tokens blocks         zstd only: (blocks + 1) uint64: where each frame begins,
//   in payload bytes; the last is payload_bytes
//
// The file ends there. Every length follows from the header, so there are no offsets to forge. A document has at least
// one token.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "oryx/common/file.h"
#include "oryx/common/hash.h"

namespace oryx {

enum class TokenEncoding : uint32_t { raw = 0, zstd = 1 };

struct TokenHeader {
  char magic[8];          // "oryx.tok"
  uint32_t version;       // 1
  uint32_t token_bytes;   // 2 (uint16) for vocabularies up to 65,536, else 4 (uint32)
  uint32_t encoding;      // TokenEncoding
  uint32_t block_tokens;  // 0 when raw
  uint64_t tokens, documents;
  uint64_t vocab_size;
  uint64_t fingerprint;  // of the tokeniser, Tokenizer::fingerprint()
  uint64_t payload_bytes;
  uint64_t payload_checksum;  // FNV-1a of the payload as stored
  uint64_t tables_checksum;   // FNV-1a of documents and blocks
  uint64_t reserved[5];       // 0
  uint64_t header_checksum;   // FNV-1a of the 120 bytes before
};
static_assert(sizeof(TokenHeader) == 128);

struct TokenFileOptions {
  TokenEncoding encoding = TokenEncoding::raw;
  // Small enough that reading one document of a thousand tokens at random does not decompress megabytes.
  uint32_t block_tokens = 1 << 16;
  int level = 3;  // of zstd
};

// The file appears at finish(); without it nothing is left.
class TokenFileWriter {
 public:
  TokenFileWriter(const std::filesystem::path& path, int64_t vocab_size, uint64_t fingerprint,
                  const TokenFileOptions& options = {});
  ~TokenFileWriter();

  // Ids in [0, vocab_size), at least one.
  void add(std::span<const int32_t> document);
  uint64_t tokens() const { return starts_.back(); }
  uint64_t documents() const { return starts_.size() - 1; }
  void finish();
  // All but the appearing, for a caller that commits several files together.
  AtomicFile& complete();

 private:
  void put(const void* data, size_t size);
  void put_payload(const void* data, size_t size);
  void compress_block();

  struct Compressor;
  AtomicFile file_;
  TokenHeader header_{};
  std::vector<uint64_t> starts_{0}, blocks_{0};
  std::string block_;  // raw bytes of the block being filled
  std::unique_ptr<Compressor> compressor_;
};

// Safe to read from several threads.
class TokenFile {
 public:
  // Maps the file and checks header, sizes and tables; the payload is checked as it is read (ids inside the vocabulary,
  // the frames' checksums) and as a whole by verify(). Throws Error on anything foreign, truncated or hostile.
  explicit TokenFile(const std::filesystem::path& path);
  ~TokenFile();

  const std::string& path() const { return path_; }
  const TokenHeader& header() const { return header_; }
  uint64_t tokens() const { return header_.tokens; }
  uint64_t documents() const { return header_.documents; }
  // The first token of document i; for i == documents() the number of tokens.
  uint64_t document_begin(uint64_t i) const { return starts_[i]; }
  uint64_t document_size(uint64_t i) const { return starts_[i + 1] - starts_[i]; }
  // What tells this data from other data, for checkpoints: a hash of header and so of all checksums.
  uint64_t identity() const { return header_.header_checksum; }

  // out[i] = token begin + i. Throws Error when a token is outside the vocabulary or a block is damaged.
  void read(uint64_t begin, std::span<int64_t> out) const;

  // Reads everything. Throws Error on the first damage.
  void verify() const;

 private:
  struct Cache;
  void check_header();
  void check_tables();
  template <typename Token>
  void read_as(uint64_t begin, std::span<int64_t> out) const;
  std::shared_ptr<const std::string> block(uint64_t index) const;

  std::string path_;
  MappedFile file_;
  TokenHeader header_{};
  const std::byte* payload_ = nullptr;
  const uint64_t* starts_ = nullptr;  // [documents + 1]
  const uint64_t* blocks_ = nullptr;  // [block_count_ + 1]
  uint64_t block_count_ = 0;
  std::unique_ptr<Cache> cache_;
};

}  // namespace oryx
