// The libFuzzer program of the readers of foreign bytes (tests/support/readers.h): ORYX_FUZZ_READER names one. Every input is read, or refused by one
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
  const char* wanted = std::getenv("ORYX_FUZZ_READER");
  std::string known;
  for (const auto& r : oryx::test::foreign_readers()) {
    if (wanted != nullptr && r.name == wanted) return r;
    known += " " + r.name;
  }
  std::fprintf(stderr, "ORYX_FUZZ_READER is '%s', expected one of:%s\n", wanted != nullptr ? wanted : "", known.c_str());
  std::exit(1);
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
