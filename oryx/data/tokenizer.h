// Tokenisers behind one interface. A second kind is added as a file that registers itself (ORYX_TOKENIZER), not by
// editing these.
//
// Every document in a token file, and every prompt, is framed the same way: [bos] ids [eos]. eos separates documents;
// where a tokeniser has no bos of its own, bos_id() is its eos.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace oryx {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual int64_t vocab_size() const = 0;
  virtual int32_t bos_id() const = 0;
  virtual int32_t eos_id() const = 0;
  virtual int32_t unk_id() const = 0;  // -1: there is none, every text can be written

  // The ids of `text`, no bos or eos added. Throws Error when `text` is not UTF-8. Safe to call from several threads.
  virtual std::vector<int32_t> encode(std::string_view text) const = 0;
  // The bytes that an id stands for, perhaps a part of a character; "" for bos and eos. 0 <= id < vocab_size().
  virtual std::string_view token_bytes(int32_t id) const = 0;
  // True when a text's first token brings a space of its own, which decode drops again.
  virtual bool leading_space() const { return false; }

  // The tokeniser as a file, and the name it has inside a data set or checkpoint ("tokenizer.model").
  virtual const std::string& serialized() const = 0;
  virtual std::string file_name() const = 0;

  // bos ids eos, and bos ids.
  std::vector<int32_t> encode_document(std::string_view text) const;
  std::vector<int32_t> encode_prompt(std::string_view text) const;

  // Always UTF-8: bytes that form no character become U+FFFD. decode(encode(x)) == x for the tokenisers trained here.
  // Throws Error on an id outside the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;

  void save(const std::filesystem::path& path) const;  // atomic
  // A hash of serialized(): data, models and tokenisers that belong together carry the same.
  uint64_t fingerprint() const;
};

// Decodes as tokens come, giving out whole characters only: the concatenation of add() and finish() is decode() of all
// ids.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer), drop_space_(tokenizer.leading_space()) {}
  std::string add(int32_t id);
  std::string finish();  // what is left of an incomplete character, as U+FFFD; the decoder starts anew

 private:
  const Tokenizer& tokenizer_;
  std::string pending_;
  bool drop_space_;
};

// A file, a folder that holds one ("tokenizer.model", "tokenizer.json"), or the word "byte" for the built-in ByteTokenizer. Throws Error
// on what no registered kind reads.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path);

// Whether a folder holds a file that some registered kind is kept in ("tokenizer.model").
bool holds_tokenizer(const std::filesystem::path& folder);

// 256 bytes, then eos (256), which is bos too. For tests and tiny demos.
std::unique_ptr<Tokenizer> make_byte_tokenizer();

// "0123456789abcdef", the written form of a fingerprint, and back (throws Error on anything else).
std::string fingerprint_text(uint64_t fingerprint);
uint64_t parse_fingerprint(const std::string& text);

// A kind of tokeniser file. `load` is called with the whole file when `recognises` (which may see foreign or hostile
// bytes) says yes; the first kind by `order` wins, so the pickiest have the lowest.
struct TokenizerKind {
  std::string name, file_name;
  int order;
  bool (*recognises)(const std::filesystem::path& path, std::string_view bytes);
  std::unique_ptr<Tokenizer> (*load)(const std::string& path, std::string bytes);
};
struct TokenizerRegistration {
  explicit TokenizerRegistration(TokenizerKind kind);
};
#define ORYX_TOKENIZER(id, ...)                                    \
  static const ::oryx::TokenizerRegistration oryx_tokenizer_##id { \
    ::oryx::TokenizerKind { __VA_ARGS__ }                          \
  }

}  // namespace oryx
