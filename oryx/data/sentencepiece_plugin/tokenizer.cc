#include "oryx/data/sentencepiece_plugin/plugin.h"

#include <sentencepiece_processor.h>

#include <array>
#include <filesystem>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx {

namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, which stands for a space inside the model
// Long texts are encoded in pieces cut before a newline: the encoder's working memory is about 100 bytes a character.
constexpr size_t kPiece = 1 << 16;

// A field of a protocol buffer's message: https://protobuf.dev/programming-guides/encoding
struct WireField {
  uint64_t number;
  std::string_view content;  // of a length-delimited one, else empty
};

bool take_varint(std::string_view& rest, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 64 && !rest.empty(); shift += 7) {
    const auto byte = static_cast<unsigned char>(rest.front());
    rest.remove_prefix(1);
    *value |= uint64_t{byte & 0x7FU} << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

// The next field, or false at the end and where there is none.
bool take_field(std::string_view& rest, WireField* field) {
  uint64_t tag = 0, size = 0;
  if (!take_varint(rest, &tag)) return false;
  *field = {tag >> 3, {}};
  switch (tag & 7) {
    case 0:
      return take_varint(rest, &size);
    case 1:
      size = 8;
      break;
    case 2:
      if (!take_varint(rest, &size)) return false;
      break;
    case 5:
      size = 4;
      break;
    default:  // the begin and the end of a group, whose fields are then taken for fields
      return true;
  }
  if (size > rest.size()) return false;
  if ((tag & 7) == 2) field->content = rest.substr(0, size);
  rest.remove_prefix(size);
  return true;
}

// A model's pieces are its field 1, their text is their field 1. SentencePiece's trie throws at a NUL byte in one, where nothing can catch it.
void check_pieces(const std::string& path, std::string_view model) {
  for (WireField piece; take_field(model, &piece);) {
    if (piece.number != 1) continue;
    for (WireField text; take_field(piece.content, &text);) {
      if (text.number == 1 && text.content.find('\0') != std::string_view::npos) {
        fail("{}: not a SentencePiece model, or damaged (the piece '{}' holds a NUL byte)", path, shown(text.content));
      }
    }
  }
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(const std::string& path, std::string bytes) : serialized_(std::move(bytes)) {
    check_pieces(path, serialized_);
    const auto status = model_.LoadFromSerializedProto(serialized_);
    if (!status.ok()) fail("{}: not a SentencePiece model, or damaged", path);  // the library's reasons are places in its sources
    const int n = model_.GetPieceSize();
    if (n <= 0) fail("{}: a SentencePiece model without pieces", path);
    eos_ = model_.eos_id();
    if (eos_ < 0) fail("{}: this SentencePiece model has no end-of-text piece, which separates documents", path);
    bos_ = model_.bos_id() >= 0 ? model_.bos_id() : eos_;
    for (int id = 0; id < n; ++id) bytes_.push_back(decoded(id));
    find_byte_pieces();
    probe(path);
  }

  int64_t vocab_size() const override { return static_cast<int64_t>(bytes_.size()); }
  int32_t bos_id() const override { return bos_; }
  int32_t eos_id() const override { return eos_; }
  int32_t unk_id() const override { return model_.unk_id(); }
  bool leading_space() const override { return dummy_prefix_; }
  std::string_view token_bytes(int32_t id) const override { return bytes_[id]; }
  const std::string& serialized() const override { return serialized_; }
  std::string file_name() const override { return "tokenizer.model"; }

  std::vector<int32_t> encode(std::string_view text) const override {
    const size_t valid = scan_utf8(text).valid;
    if (valid != text.size()) fail("text to encode is not UTF-8 at byte {}", valid);
    std::vector<int32_t> ids;
    // A model that puts a space before its text would put one before every piece.
    if (dummy_prefix_) {
      append(text, ids);
      return ids;
    }
    while (!text.empty()) {
      const size_t size = piece_size(text);
      append_marked(text.substr(0, size), ids);
      text.remove_prefix(size);
    }
    return ids;
  }

 private:
  static std::string first_line(const std::string& text) {
    return text.substr(0, std::min(text.find('\n'), size_t{200}));
  }

  // Newline is a piece of its own in the models trained here, so a cut before one changes no id.
  size_t piece_size(std::string_view text) const {
    if (text.size() <= kPiece || !newline_alone_) return text.size();
    const size_t newline = text.find('\n', kPiece);
    return newline == std::string_view::npos ? text.size() : newline;
  }

  // The text's own U+2581 would come back as a space: it goes in as its three bytes.
  void append_marked(std::string_view text, std::vector<int32_t>& ids) const {
    while (has_bytes_) {
      const size_t mark = text.find(kSpaceMark);
      if (mark == std::string_view::npos) break;
      append(text.substr(0, mark), ids);
      for (const char c : kSpaceMark) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
      text.remove_prefix(mark + kSpaceMark.size());
    }
    append(text, ids);
  }

  void append(std::string_view text, std::vector<int32_t>& ids) const {
    if (text.empty()) return;
    std::vector<int> part;
    const auto status = model_.Encode(absl::string_view(text.data(), text.size()), &part);
    if (!status.ok()) fail("SentencePiece could not encode the text: {}", first_line(status.ToString()));
    ids.insert(ids.end(), part.begin(), part.end());
  }

  std::string decoded(int id) const {
    if (model_.IsUnknown(id)) return "\xEF\xBF\xBD";
    if (model_.IsControl(id)) return "";
    const std::string& piece = model_.IdToPiece(id);
    if (model_.IsByte(id)) return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
    std::string out;
    for (size_t i = 0; i < piece.size();) {
      const bool mark = std::string_view(piece).substr(i).starts_with(kSpaceMark);
      out += mark ? ' ' : piece[i];
      i += mark ? kSpaceMark.size() : 1;
    }
    return out;
  }

  void find_byte_pieces() {
    int found = 0;
    for (int id = 0; id < model_.GetPieceSize(); ++id) {
      if (!model_.IsByte(id)) continue;
      byte_ids_[static_cast<unsigned char>(bytes_[id][0])] = id;
      ++found;
    }
    has_bytes_ = found == 256;
  }

  // Some of a model's settings are not in the library's interface, but show in what it does.
  void probe(const std::string& path) {
    std::vector<int> ids;
    if (!model_.Encode("a", &ids).ok()) fail("{}: this SentencePiece model cannot encode", path);
    dummy_prefix_ = !ids.empty() && !bytes_[ids[0]].empty() && bytes_[ids[0]][0] == ' ';
    const auto whole = model_.EncodeAsIds("a\n a"), head = model_.EncodeAsIds("a"), tail = model_.EncodeAsIds("\n a");
    newline_alone_ = !tail.empty() && head.size() + tail.size() == whole.size() && model_.IdToPiece(tail.at(0)) == "\n";
  }

  sentencepiece::SentencePieceProcessor model_;
  std::string serialized_;
  std::vector<std::string> bytes_;
  std::array<int32_t, 256> byte_ids_{};
  int32_t bos_ = -1, eos_ = -1;
  bool has_bytes_ = false, dummy_prefix_ = false, newline_alone_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> sentencepiece_plugin::load(const std::string& path, std::string bytes) {
  return std::make_unique<SentencePieceTokenizer>(path, std::move(bytes));
}

}  // namespace oryx

extern "C" oryx::sentencepiece_plugin::Functions oryx_sentencepiece_functions() {
  return {oryx::sentencepiece_plugin::load, oryx::sentencepiece_plugin::train};
}
