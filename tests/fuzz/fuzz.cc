// A libFuzzer program for one reader of foreign bytes (tests/support/readers.h), which ORYX_FUZZ_READER names: every input is read, or refused by one
// line of oryx::Error. Anything else, a sanitizer's finding included, ends the program.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "oryx/common/error.h"
#include "tests/support/readers.h"

namespace {

const oryx::test::ForeignReader& reader() {
  for (const auto& r : oryx::test::foreign_readers()) {
    if (r.name == ORYX_FUZZ_READER) return r;
  }
  std::fprintf(stderr, "no reader '%s'\n", ORYX_FUZZ_READER);
  std::abort();
}

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto& r = reader();
  try {
    r.read({reinterpret_cast<const char*>(data), size});
  } catch (const oryx::Error& e) {
    const std::string what = e.what();
    if (what.empty() || what.size() > 2000 || what.find('\n') != std::string::npos) {
      std::fprintf(stderr, "not a message of one line: %s\n", what.c_str());
      std::abort();
    }
  }
  return 0;
}

// Checksums are made right again, so that most mutations meet what stands behind them.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  static const auto& r = reader();
  size = LLVMFuzzerMutate(data, size, max_size);
  if (r.reseal == nullptr || seed % 8 == 0) return size;
  std::string bytes(reinterpret_cast<const char*>(data), size);
  r.reseal(bytes);
  std::memcpy(data, bytes.data(), std::min(bytes.size(), max_size));
  return std::min(bytes.size(), max_size);
}
