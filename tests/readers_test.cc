// The readers of foreign bytes: every file of tests/corpus/ and thousands of mutations of them are read or refused in
// one line.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "oryx/common/error.h"
#include "oryx/common/file.h"
#include "oryx/common/random.h"
#include "oryx/model/state_file.h"
#include "tests/support/paths.h"
#include "tests/support/readers.h"

namespace oryx::test {
namespace {

namespace fs = std::filesystem;

// ORYX_MUTATIONS=100000 tries more of them.
int mutations() {
  const char* given = std::getenv("ORYX_MUTATIONS");
  return given != nullptr ? std::atoi(given) : 4000;
}

std::vector<std::pair<std::string, std::string>> corpus(const std::string& reader) {
  std::vector<std::pair<std::string, std::string>> files;
  for (const auto& entry : fs::directory_iterator(test::source_path("tests/corpus/") + reader)) {
    files.emplace_back(entry.path().filename().string(), read_file(entry.path()));
  }
  std::sort(files.begin(), files.end());
  return files;
}

// "" when it was read.
std::string refusal(const ForeignReader& reader, std::string_view bytes) {
  try {
    reader.read(bytes);
  } catch (const Error& e) {
    const std::string what = e.what();
    EXPECT_FALSE(what.empty());
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    EXPECT_LT(what.size(), 2000u) << what;
    return what;
  } catch (const std::exception& e) {
    ADD_FAILURE() << reader.name << ": not an oryx::Error: " << e.what();
    return e.what();
  }
  return "";
}

void mutate(std::string& bytes, CounterRng& draw, const std::string& other) {
  static constexpr uint64_t kNumbers[] = {
      0, 1, 255, 256, 65535, 65536, 0x7FFFFFFF, 0xFFFFFFFF, uint64_t{1} << 60, INT64_MAX, UINT64_MAX};
  const auto place = [&] { return static_cast<size_t>(draw.below(bytes.size() + 1)); };
  const size_t at = place();
  switch (draw.below(8)) {
    case 0:  // a bit
      if (at < bytes.size()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << draw.below(8)));
      break;
    case 1:  // a sign of the formats
      if (at < bytes.size()) bytes[at] = "\0\xFF\"{}[]:,@-%09\n\\"[draw.below(16)];
      break;
    case 2:
      bytes.resize(at);
      break;
    case 3:
      bytes.erase(at, draw.below(16) + 1);
      break;
    case 4:
      bytes.insert(at, bytes.substr(place(), draw.below(64)));
      break;
    case 5: {  // a number, in binary
      const uint64_t n = kNumbers[draw.below(std::size(kNumbers))];
      const size_t size = draw.below(2) ? 8 : 4;
      if (at + size <= bytes.size()) std::memcpy(bytes.data() + at, &n, size);
      break;
    }
    case 6:  // a number, in text
      bytes.insert(at, std::to_string(kNumbers[draw.below(std::size(kNumbers))]));
      break;
    default:
      bytes = bytes.substr(0, at) + other.substr(std::min<size_t>(place(), other.size()));
  }
}

class Readers : public ::testing::TestWithParam<ForeignReader> {};

TEST_P(Readers, CorpusIsReadOrRefused) {
  const auto files = corpus(GetParam().name);
  int good = 0;
  for (const auto& [name, bytes] : files) {
    SCOPED_TRACE(name);
    const std::string message = refusal(GetParam(), bytes);
    // The name says what is expected: good-*, bad-*.
    EXPECT_EQ(message.empty(), name.starts_with("good-")) << message;
    good += message.empty();
  }
  EXPECT_GE(good, 1);
}

// Cut at every byte (of long files behind the first 4,000 at every seventh). White space at the end may go.
TEST_P(Readers, EveryBeginningOfAGoodFileIsRefused) {
  for (const auto& [name, bytes] : corpus(GetParam().name)) {
    if (!name.starts_with("good-")) continue;
    size_t end = bytes.size();
    while (end > 0 && std::isspace(static_cast<unsigned char>(bytes[end - 1]))) --end;
    for (size_t size = 0; size < end && !HasFailure(); size += size < 4000 ? 1 : 7) {
      SCOPED_TRACE(fmt::format("{} cut to {} of {} bytes", name, size, bytes.size()));
      const std::string message = refusal(GetParam(), std::string_view(bytes).substr(0, size));
      if (GetParam().whole) {
        EXPECT_FALSE(message.empty());
      }
    }
  }
}

TEST_P(Readers, MutationsAreReadOrRefused) {
  const auto files = corpus(GetParam().name);
  ASSERT_FALSE(files.empty());
  int refused = 0;
  for (int i = 0; i < mutations() && !HasFailure(); ++i) {
    CounterRng draw(1, static_cast<uint64_t>(i));
    std::string bytes = files[draw.below(files.size())].second;
    const std::string& other = files[draw.below(files.size())].second;
    for (uint64_t n = 1 + draw.below(4); n > 0; --n) mutate(bytes, draw, other);
    if (GetParam().reseal != nullptr && draw.below(4) != 0) GetParam().reseal(bytes);
    SCOPED_TRACE(i);
    refused += !refusal(GetParam(), bytes).empty();
  }
  EXPECT_GT(refused, mutations() / 10);
}

// Writes tests/corpus/session/good-* anew, for when what a state holds has changed:
// build/cpu/tests/test_program --gtest_also_run_disabled_tests --gtest_filter='*WriteSessions'
TEST(SessionCorpus, DISABLED_WriteSessions) {
  const LanguageModel& m = session_model();
  const at::NoGradGuard no_grad;
  const auto write = [&](const char* name, int64_t sequences, const StateOptions& options) {
    State state = m.make_state(sequences, options);
    for (int64_t piece = 0; piece < 2; ++piece) {
      ModelInput in;
      in.input_ids = at::arange(3 * sequences, at::kLong).view({sequences, 3});
      in.routing = {std::make_shared<Routing>(sequences, 3, options.drop_rows ? "gated_delta_net" : "attention")};
      in.state = &state;
      (void)m.hidden(in);
    }
    const fs::path path = source_path("tests/corpus/session/") + std::string(name);
    save_state(m, state, path);
    std::string bytes = read_file(path);
    bytes.replace(bytes.find(fingerprint(m)), kAnyFingerprint.size(), kAnyFingerprint);
    write_file(path, bytes);
  };
  write("good-checkpoints", 1, {2, 2, true});
  write("good-dropped", 1, {0, 0, false, true});
  write("good-two", 2, {});
}

INSTANTIATE_TEST_SUITE_P(All, Readers, ::testing::ValuesIn(foreign_readers()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace oryx::test
