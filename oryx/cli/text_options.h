// Options that commands which read text have in common.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "oryx/data/text_source.h"

namespace oryx::cli {

inline void add_text_options(CLI::App& app, std::string& folder, TextSourceOptions& options) {
  app.add_option("text", folder, "a folder or file of text: .txt, .jsonl (field \"text\"), each also as .zst")
      ->required();
  app.add_option("--include", options.include, "read only files that match this pattern (may be repeated)")
      ->type_name("PATTERN")
      ->allow_extra_args(false);
  app.add_option("--exclude", options.exclude, "pass over files that match this pattern (may be repeated)")
      ->type_name("PATTERN")
      ->allow_extra_args(false);
  app.add_option("--extension", options.extensions, "an ending to read in place of .txt and .jsonl (may be repeated)")
      ->type_name("EXT")
      ->transform([](const std::string& e) { return e.starts_with('.') ? e : "." + e; })
      ->allow_extra_args(false);
}

}  // namespace oryx::cli
