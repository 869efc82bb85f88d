// Training of SentencePiece models (https://github.com/google/sentencepiece; BPE, Sennrich et al. 2016).
//
// What is trained here loses nothing: identity normalisation, spaces and newlines kept as they are, digits split, bytes
// for every character outside the vocabulary. Ids: unk 0, bos 1, eos 2, then newline and tab, the 256 bytes, merges,
// characters.
#pragma once

#include <memory>

#include "oryx/data/text_source.h"
#include "oryx/data/tokenizer.h"

namespace oryx {

struct SentencePieceTraining {
  int64_t vocab_size = 32000;
  // Bytes of text learnt from: a sample, uniform over the whole source, in pieces of a few lines. Memory is about eight
  // times that.
  uint64_t sample_bytes = uint64_t{32} << 20;
  uint64_t seed = 1;
  bool progress = true;
};

// Deterministic: the same text and options give the same model. A text too small for `vocab_size` gives a smaller
// vocabulary, with a warning. Throws Error on an empty source or a vocabulary without room for bytes and characters.
std::unique_ptr<Tokenizer> train_sentencepiece(TextSource& source, const SentencePieceTraining& options);

// From the bytes of a model file; `path` is for messages. Throws Error when they are not a SentencePiece model.
std::unique_ptr<Tokenizer> load_sentencepiece(const std::string& path, std::string bytes);

}  // namespace oryx
