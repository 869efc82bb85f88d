// The first half of byte-level BPE: text cut into the pieces that merges stay within, as a tokenizer.json's "pre_tokenizer" says.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace oryx::bpe {

// A compiled regular expression (PCRE2, Unicode properties). Matching is safe from several threads.
class Regex {
 public:
  // Throws Error with `where` in front when the pattern cannot be compiled.
  Regex(std::string_view pattern, const std::string& where);
  // Byte ranges [begin, end) of the non-empty matches in order. `text` must be UTF-8.
  std::vector<std::pair<size_t, size_t>> matches(std::string_view text) const;

 private:
  std::shared_ptr<void> code_;
};

class PreTokenizer {
 public:
  // The "pre_tokenizer" of a tokenizer.json: ByteLevel, Split, Digits or a Sequence of them that ends in ByteLevel. Throws Error on any other,
  // with `where` (the file's name) in front.
  PreTokenizer(const nlohmann::json& json, const std::string& where);
  // The pieces of `text`, as raw bytes.
  std::vector<std::string> split(std::string_view text) const;
  // Whether a text's first piece is given a space that it did not have.
  bool adds_space() const;

 private:
  struct Step {
    enum class Kind { kIsolate, kRemove, kMergeWithPrevious, kMergeWithNext, kKeep } kind = Kind::kIsolate;
    std::vector<Regex> regex;  // one; none: the piece is left whole
    bool invert = false;       // what the expression does not match is the delimiter
    bool add_space = false;    // before cutting, where a piece does not begin with one
  };
  void add(const nlohmann::json& json, const std::string& where);
  static void cut(const Step& step, std::string_view text, std::vector<std::string>& out);

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace oryx::bpe
