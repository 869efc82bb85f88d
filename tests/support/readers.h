// The readers of foreign bytes, each as a plain function: for files kept in tests/corpus/, for mutations of them, and for a fuzzer.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "oryx/model/language_model.h"

namespace oryx::test {

struct ForeignReader {
  std::string name;  // the folder in tests/corpus/
  // Reads all there is to read. Throws oryx::Error on what is refused; anything else is a fault of the reader.
  void (*read)(std::string_view bytes);
  // Whether a good file that is cut anywhere must be refused (white space at its end aside): all formats but those whose parts are themselves whole.
  bool whole = true;
  // Makes the checksums inside right again, so that a mutation meets what stands behind them; null where there are none.
  void (*reseal)(std::string& bytes) = nullptr;
};

const std::vector<ForeignReader>& foreign_readers();

// The model of the sessions in the corpus. Its fingerprint is not the same with another torch, so that these files bear zeros, which the reader takes for
// the right one.
const LanguageModel& session_model();
inline constexpr std::string_view kAnyFingerprint = "0000000000000000";

}  // namespace oryx::test
