// A data set is a folder: train.tok, valid.tok, the tokeniser and dataset.json. They appear together, dataset.json last: a folder without it is not
// a data set, and a build that fails leaves what was there. Built from text in one pass with bounded memory.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "oryx/data/text_source.h"
#include "oryx/data/token_file.h"
#include "oryx/data/tokenizer.h"

namespace oryx {

struct DatasetOptions {
  // The share of documents held out for validation, chosen by a hash of their text: the same document always falls on
  // the same side. At least one is held out; of a single document its last `valid` share of tokens.
  double valid = 0.01;
  uint64_t seed = 0;
  // Shell patterns of the files that are the validation set; then `valid` is not used.
  std::vector<std::string> valid_files = {};
  TokenFileOptions tokens = {};
  bool overwrite = false;  // replaces a data set that is there already
  bool progress = true;
};

struct SplitInfo {
  uint64_t documents = 0, tokens = 0;  // with bos and eos
  uint64_t bytes = 0;                  // of text: nll_sum / (bytes * ln 2) is bits per byte
};

struct DatasetInfo {
  SplitInfo train, valid;
  uint64_t empty_documents = 0;  // passed over
  int64_t vocab_size = 0;
  uint64_t fingerprint = 0;          // of the tokeniser
  std::string tokenizer_file;        // its name inside the folder
  std::vector<std::string> sources;  // names of the text files
};

// Throws Error on bad text (see text_source.h), on a source without documents, and when `out` holds a data set already.
DatasetInfo build_dataset(const std::vector<TextFile>& files, const Tokenizer& tokenizer,
                          const std::filesystem::path& out, const DatasetOptions& options = {});

struct Dataset {
  DatasetInfo info;
  std::shared_ptr<const TokenFile> train, valid;
  std::shared_ptr<const Tokenizer> tokenizer;
};

// Opens all parts and checks that they belong together. Throws Error otherwise.
Dataset open_dataset(const std::filesystem::path& folder);

}  // namespace oryx
