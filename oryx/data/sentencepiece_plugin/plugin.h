// What the plug-in with SentencePiece in it hands to the library (see oryx/data/sentencepiece.cc for why it is one).
#pragma once

#include <memory>
#include <string>

#include "oryx/data/sentencepiece.h"

namespace oryx::sentencepiece_plugin {

std::unique_ptr<Tokenizer> load(const std::string& path, std::string bytes);
std::unique_ptr<Tokenizer> train(TextSource& source, const SentencePieceTraining& options);

struct Functions {
  std::unique_ptr<Tokenizer> (*load_model)(const std::string& path, std::string bytes);
  std::unique_ptr<Tokenizer> (*train_model)(TextSource& source, const SentencePieceTraining& options);
};

}  // namespace oryx::sentencepiece_plugin

// The plug-in's one entry point.
extern "C" oryx::sentencepiece_plugin::Functions oryx_sentencepiece_functions();
