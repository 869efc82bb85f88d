// Text for a model, from wherever it comes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>

#include "oryx/data/token_file.h"
#include "oryx/data/tokenizer.h"
#include "oryx/eval/task.h"

namespace oryx {

struct EvalText {
  std::shared_ptr<const TokenFile> tokens;
  std::shared_ptr<const Tokenizer> owned;  // a data set's
  const Tokenizer* tokenizer = nullptr;
};

// `path`: a data set (its held-out part, or the one for training), a .tok file, or text, which is tokenised with the model's tokeniser into a scratch file, up to the document
// that reaches max_tokens (0: all). Throws Error for text without a tokeniser, tokens of another one, or a vocabulary that is larger than the model's.
EvalText open_text(const EvalSubject& subject, const std::filesystem::path& path, int64_t max_tokens, bool training = false);

}  // namespace oryx
