// From tokens to text as it comes, up to a stop string.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "oryx/data/tokenizer.h"

namespace oryx::serve {

// Of UTF-8: code points.
int64_t count_characters(std::string_view text);

// Whole characters only, and nothing that may still turn out to be part of a stop string, which is not part of the
// text.
class TextStream {
 public:
  // The prompt goes through the decoder too: the text begins behind it. The tokeniser must outlive the stream.
  TextStream(const Tokenizer& tokenizer, std::span<const int32_t> prompt, std::vector<std::string> stops);

  // -> what can be shown now.
  std::string add(int32_t id) { return give(decoder_.add(id)); }
  // Characters of all tokens so far, held back ones included and half ones not; behind a stop string they are not counted on.
  int64_t characters() const { return characters_; }
  // A stop string has come: nothing follows.
  bool stopped() const { return stopped_; }
  // -> what was held back, and what is left of half a character; nothing behind a stop string.
  std::string finish();

 private:
  std::string give(std::string piece);

  StreamDecoder decoder_;
  std::vector<std::string> stops_;
  std::string held_;
  int64_t characters_ = 0;
  bool stopped_ = false;
};

}  // namespace oryx::serve
