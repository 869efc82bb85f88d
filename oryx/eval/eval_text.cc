#include "oryx/eval/eval_text.h"

#include <unistd.h>

#include <filesystem>

#include "oryx/common/error.h"
#include "oryx/common/interrupt.h"
#include "oryx/common/progress.h"
#include "oryx/data/dataset.h"

namespace oryx {

namespace {

namespace fs = std::filesystem;

void check_tokenizer(const EvalSubject& subject, const TokenFile& file) {
  if (subject.tokenizer != nullptr && file.header().fingerprint != subject.tokenizer->fingerprint()) {
    fail("{}: was written with another tokeniser than that of {} ({}, expected {})", file.path(), subject.name,
         fingerprint_text(file.header().fingerprint), fingerprint_text(subject.tokenizer->fingerprint()));
  }
  if (static_cast<int64_t>(file.header().vocab_size) > subject.model.config().vocab_size) {
    fail("{}: its vocabulary of {} is larger than the model's {}", file.path(), file.header().vocab_size, subject.model.config().vocab_size);
  }
}

// Removed at once with all it holds; a mapped file in it stays readable.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string name = (fs::temp_directory_path() / "oryx_eval_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) fail_errno(name, "create");
    path_ = name;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// Text is tokenised into a scratch file, so that memory stays bounded.
std::shared_ptr<const TokenFile> tokenize(const fs::path& path, const Tokenizer& tokenizer, int64_t max_tokens) {
  TextSource source(list_text_files(path));
  ScratchFolder folder;
  const fs::path file = folder.path() / "text.tok";
  TokenFileWriter writer(file, tokenizer.vocab_size(), tokenizer.fingerprint());
  ProgressBar bar("tokenising", static_cast<int64_t>(source.total_bytes()), "B");
  for (Document d; source.next(d);) {
    check_interrupt();
    writer.add(tokenizer.encode_document(d.text));
    bar.update(static_cast<int64_t>(source.consumed_bytes()));
    if (max_tokens > 0 && static_cast<int64_t>(writer.tokens()) >= max_tokens + static_cast<int64_t>(writer.documents())) break;
  }
  bar.finish();
  if (writer.documents() == 0) fail("{}: holds no text", path.string());
  writer.finish();
  return std::make_shared<TokenFile>(file);
}

}  // namespace

EvalText open_text(const EvalSubject& subject, const fs::path& path, int64_t max_tokens, bool training) {
  EvalText text;
  text.tokenizer = subject.tokenizer;
  if (path.extension() == ".tok") {
    text.tokens = std::make_shared<TokenFile>(path);
  } else if (fs::exists(path / "dataset.json")) {
    const Dataset data = open_dataset(path);
    text.tokens = training ? data.train : data.valid;
    text.owned = data.tokenizer;
    if (text.tokenizer == nullptr) text.tokenizer = text.owned.get();
  } else {
    if (subject.tokenizer == nullptr) fail("{}: has no tokeniser to read text with; give a data set or a .tok file", subject.name);
    text.tokens = tokenize(path, *subject.tokenizer, max_tokens);
  }
  check_tokenizer(subject, *text.tokens);
  return text;
}

}  // namespace oryx
