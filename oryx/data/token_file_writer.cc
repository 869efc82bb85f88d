#include <zstd.h>

#include <cstring>
#include <limits>

#include "oryx/common/error.h"
#include "oryx/data/token_file.h"

namespace oryx {

struct TokenFileWriter::Compressor {
  explicit Compressor(int level) : context(ZSTD_createCCtx()) {
    ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level);
    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
  }
  ~Compressor() { ZSTD_freeCCtx(context); }
  ZSTD_CCtx* context;
  std::string frame;
};

TokenFileWriter::TokenFileWriter(const std::filesystem::path& path, int64_t vocab_size, uint64_t fingerprint,
                                 const TokenFileOptions& options)
    : file_(path) {
  if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max())
    fail("{}: vocabulary of {}", path.string(), vocab_size);
  std::memcpy(header_.magic, "oryx.tok", 8);
  header_.version = 1;
  header_.token_bytes = vocab_size <= 1 << 16 ? 2 : 4;
  header_.encoding = static_cast<uint32_t>(options.encoding);
  header_.vocab_size = static_cast<uint64_t>(vocab_size);
  header_.fingerprint = fingerprint;
  header_.payload_checksum = header_.tables_checksum = kFnvStart;
  if (options.encoding == TokenEncoding::zstd) {
    header_.block_tokens = options.block_tokens;
    compressor_ = std::make_unique<Compressor>(options.level);
  }
  file_.write(&header_, sizeof header_);
}

TokenFileWriter::~TokenFileWriter() = default;

void TokenFileWriter::add(std::span<const int32_t> document) {
  if (document.empty()) throw std::logic_error("TokenFileWriter: a document without tokens");
  for (const int32_t id : document) {
    if (id < 0 || static_cast<uint64_t>(id) >= header_.vocab_size) {
      throw std::logic_error(fmt::format("TokenFileWriter: token {} in a vocabulary of {}", id, header_.vocab_size));
    }
  }
  if (header_.token_bytes == 2) {
    const std::vector<uint16_t> narrow(document.begin(), document.end());
    put(narrow.data(), narrow.size() * 2);
  } else {
    put(document.data(), document.size() * 4);
  }
  starts_.push_back(starts_.back() + document.size());
}

// Raw bytes go straight to the file, or through the block being filled.
void TokenFileWriter::put(const void* data, size_t size) {
  if (!compressor_) return put_payload(data, size);
  const auto* p = static_cast<const char*>(data);
  const size_t full = size_t{header_.block_tokens} * header_.token_bytes;
  while (size > 0) {
    const size_t n = std::min(size, full - block_.size());
    block_.append(p, n);
    p += n;
    size -= n;
    if (block_.size() == full) compress_block();
  }
}

void TokenFileWriter::put_payload(const void* data, size_t size) {
  header_.payload_checksum = fnv1a(data, size, header_.payload_checksum);
  header_.payload_bytes += size;
  file_.write(data, size);
}

void TokenFileWriter::compress_block() {
  compressor_->frame.resize(ZSTD_compressBound(block_.size()));
  const size_t n = ZSTD_compress2(compressor_->context, compressor_->frame.data(), compressor_->frame.size(),
                                  block_.data(), block_.size());
  if (ZSTD_isError(n)) throw std::runtime_error(fmt::format("zstd: {}", ZSTD_getErrorName(n)));
  put_payload(compressor_->frame.data(), n);
  blocks_.push_back(header_.payload_bytes);
  block_.clear();
}

void TokenFileWriter::finish() { complete().commit(); }

AtomicFile& TokenFileWriter::complete() {
  if (!block_.empty()) compress_block();
  header_.tokens = tokens();
  header_.documents = documents();
  const uint64_t zero = 0;
  file_.write(&zero, (8 - header_.payload_bytes % 8) % 8);
  const auto table = [&](const std::vector<uint64_t>& t) {
    header_.tables_checksum = fnv1a(t.data(), t.size() * 8, header_.tables_checksum);
    file_.write(t.data(), t.size() * 8);
  };
  table(starts_);
  if (compressor_) table(blocks_);
  header_.header_checksum = fnv1a(&header_, sizeof header_ - 8);
  file_.write_at(0, &header_, sizeof header_);
  return file_;
}

}  // namespace oryx
