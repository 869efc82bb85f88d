// The readers of foreign bytes, each as a plain function: for files kept in tests/corpus/, for mutations of them, and for a fuzzer.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace oryx::test {

struct ForeignReader {
  std::string name;  // the folder in tests/corpus/
  // Reads all there is to read. Throws oryx::Error on what is refused; anything else is a fault of the reader.
  void (*read)(std::string_view bytes);
};

const std::vector<ForeignReader>& foreign_readers();

}  // namespace oryx::test
