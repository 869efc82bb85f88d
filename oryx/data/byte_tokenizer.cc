#include <array>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"
#include "oryx/data/tokenizer.h"

namespace oryx {

namespace {

constexpr std::string_view kContent = "oryx byte tokenizer 1\n";

class ByteTokenizer : public Tokenizer {
 public:
  ByteTokenizer() {
    for (int i = 0; i < 256; ++i) bytes_[i] = static_cast<char>(i);
  }
  int64_t vocab_size() const override { return 257; }
  int32_t bos_id() const override { return 256; }
  int32_t eos_id() const override { return 256; }
  int32_t unk_id() const override { return -1; }

  std::vector<int32_t> encode(std::string_view text) const override {
    const size_t valid = scan_utf8(text).valid;
    if (valid != text.size()) fail("text to encode is not UTF-8 at byte {}", valid);
    std::vector<int32_t> ids;
    ids.reserve(text.size());
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string_view token_bytes(int32_t id) const override {
    return id < 256 ? std::string_view(&bytes_[id], 1) : std::string_view();
  }
  const std::string& serialized() const override { return content_; }
  std::string file_name() const override { return "tokenizer.model"; }

 private:
  std::array<char, 256> bytes_;
  std::string content_{kContent};
};

bool recognises(const std::filesystem::path&, std::string_view bytes) { return bytes == kContent; }
std::unique_ptr<Tokenizer> load(const std::string&, std::string) { return make_byte_tokenizer(); }

ORYX_TOKENIZER(byte, "byte", "tokenizer.model", 0, recognises, load);

}  // namespace

std::unique_ptr<Tokenizer> make_byte_tokenizer() { return std::make_unique<ByteTokenizer>(); }

}  // namespace oryx
