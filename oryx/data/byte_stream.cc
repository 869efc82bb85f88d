#include <zstd.h>

#include <vector>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/data/text_source.h"

namespace oryx {

namespace {

class PlainStream : public ByteStream {
 public:
  explicit PlainStream(const std::filesystem::path& path) : file_(path) {}
  size_t read(char* out, size_t size) override { return file_.read(out, size); }
  uint64_t consumed() const override { return file_.consumed(); }
  const std::string& path() const { return file_.path(); }

 private:
  InputFile file_;
};

class ZstdStream : public ByteStream {
 public:
  explicit ZstdStream(const std::filesystem::path& path)
      : file_(path), context_(ZSTD_createDCtx()), buffer_(ZSTD_DStreamInSize()) {}

  size_t read(char* out, size_t size) override {
    ZSTD_outBuffer output{out, size, 0};
    while (output.pos < size) {
      if (input_.pos == input_.size && !pending_ && !refill()) break;
      rest_ = ZSTD_decompressStream(context_.get(), &output, &input_);
      if (ZSTD_isError(rest_)) {
        fail("{}: not a zstd file, or damaged near byte {}: {}", file_.path(), consumed(), ZSTD_getErrorName(rest_));
      }
      // A full `out` may have left decompressed bytes inside the decoder: they come out without further input.
      pending_ = output.pos == size && rest_ != 0;
    }
    return output.pos;
  }
  uint64_t consumed() const override { return file_.consumed(); }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* c) const { ZSTD_freeDCtx(c); }
  };

  bool refill() {
    const size_t n = file_.read(buffer_.data(), buffer_.size());
    input_ = {buffer_.data(), n, 0};
    if (n > 0) return true;
    // 0 says that a frame ended exactly here; anything else is what zstd still waits for.
    if (rest_ != 0) fail("{}: truncated zstd file ({} bytes)", file_.path(), consumed());
    return false;
  }

  PlainStream file_;
  std::unique_ptr<ZSTD_DCtx, Free> context_;
  std::vector<char> buffer_;
  ZSTD_inBuffer input_{nullptr, 0, 0};
  size_t rest_ = 1;
  bool pending_ = false;
};

}  // namespace

std::unique_ptr<ByteStream> open_stream(const std::filesystem::path& path) {
  if (path.extension() == ".zst") return std::make_unique<ZstdStream>(path);
  return std::make_unique<PlainStream>(path);
}

}  // namespace oryx
