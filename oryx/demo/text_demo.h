// The second half of `oryx demo`: a tokeniser and a small text model, trained for about a minute on a folder of text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "oryx/common/options.h"

namespace oryx {

struct TextDemoOptions {
  std::string text;            // folder or file
  std::filesystem::path out;   // everything is kept here: tokenizer, data set, run folder
  double seconds = 60;         // of training, about: the first steps tell how many fit
  int64_t vocab_size = 2048;
  int64_t sample_tokens = 60;  // of each sample
  int64_t seed = 1;
};

struct TextDemoResult {
  int64_t documents = 0, train_tokens = 0, steps = 0, parameters = 0;
  std::vector<std::pair<std::string, double>> perplexity;      // (schedule, held-out perplexity)
  std::vector<std::pair<std::string, std::string>> samples;    // (schedule, text)
  std::string prompt;
};

// Throws Error where run_text_demo would before it begins: for text that is not there, or a folder `out` that is somebody else's.
void check_text_demo(const TextDemoOptions& options);

// Throws Error for text it cannot use, Interrupted after Ctrl-C (what was trained is kept in `out`).
TextDemoResult run_text_demo(const TextDemoOptions& options);

}  // namespace oryx
