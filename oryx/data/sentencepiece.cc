#include "oryx/data/sentencepiece.h"

#include <dlfcn.h>

#include <filesystem>

#include <c10/util/Exception.h>

#include "oryx/common/error.h"
#include "oryx/data/sentencepiece_plugin/plugin.h"

#if defined(__SANITIZE_ADDRESS__)
#define ORYX_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ORYX_ADDRESS_SANITIZER
#endif
#endif

namespace oryx {

namespace {

namespace fs = std::filesystem;

// SentencePiece's library and libtorch's libc10 both define the global FLAGS_minloglevel, of different types. Linked side by side,
// the dynamic linker makes them one, and SentencePiece's constructor writes over libc10's next variables (an allocation that fails then aborts
// the process). Opened with RTLD_DEEPBIND the plug-in prefers its own. The sanitizers do not support that flag; their builds go without.
constexpr int kOpen = RTLD_NOW | RTLD_LOCAL
#ifndef ORYX_ADDRESS_SANITIZER
                      | RTLD_DEEPBIND
#endif
    ;

fs::path beside_this_library(const char* name) {
  Dl_info info{};
  TORCH_CHECK(dladdr(reinterpret_cast<const void*>(&load_sentencepiece), &info) != 0, "the library's own path is not known");
  return fs::path(info.dli_fname).parent_path() / name;
}

sentencepiece_plugin::Functions open_plugin() {
  const fs::path path = beside_this_library("liboryx_sentencepiece.so");
  void* library = dlopen(path.c_str(), kOpen);
  if (library == nullptr) fail("{}: cannot be loaded ({}); build it with the library, and keep the two in one folder", path.string(), dlerror());
  using Entry = sentencepiece_plugin::Functions (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "oryx_sentencepiece_functions"));
  if (entry == nullptr) fail("{}: is not the SentencePiece plug-in of this library", path.string());
  return entry();
}

// Opened on first use, once a process.
const sentencepiece_plugin::Functions& plugin() {
  static const sentencepiece_plugin::Functions functions = open_plugin();
  return functions;
}

// A ModelProto begins with field 1 (a piece), length-delimited.
bool recognises(const fs::path& path, std::string_view bytes) { return path.extension() == ".model" || bytes.starts_with('\n'); }

ORYX_TOKENIZER(sentencepiece, "sentencepiece", "tokenizer.model", 100, recognises, load_sentencepiece);

}  // namespace

std::unique_ptr<Tokenizer> load_sentencepiece(const std::string& path, std::string bytes) { return plugin().load_model(path, std::move(bytes)); }

std::unique_ptr<Tokenizer> train_sentencepiece(TextSource& source, const SentencePieceTraining& options) {
  return plugin().train_model(source, options);
}

}  // namespace oryx
