// The safetensors reader against files made by hand: what is whole is read, what is hostile is refused in one line.
#include "oryx/io/safetensors.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "oryx/common/error.h"
#include "tests/support/folder.h"

namespace oryx {
namespace {

using ::testing::HasSubstr;

std::string with_length(uint64_t length, const std::string& rest) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + rest;
}

std::string file_of(const std::string& header, size_t data_bytes) {
  return with_length(header.size(), header + std::string(data_bytes, '\1'));
}

class Safetensors : public ::testing::Test {
 protected:
  std::string write(const std::string& bytes) const {
    const auto path = folder_ / "x.safetensors";
    std::ofstream(path, std::ios::binary) << bytes;  // many small files: no fsync
    return path.string();
  }
  // The error of opening a file with these bytes; "" when it opens.
  std::string refusal(const std::string& bytes) const {
    const std::string path = write(bytes);
    try {
      SafetensorsReader reader(path);
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), ::testing::StartsWith(path));
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return e.what();
    }
    return "";
  }
  test::TemporaryFolder folder_;
};

TEST_F(Safetensors, RoundTripKeepsEveryBit) {
  const NamedTensors tensors = {{"b", at::randn({3, 5})},
                                {"a", at::randn({2, 3, 4}).to(at::kBFloat16).transpose(0, 2)},
                                {"half", at::randn({7}).to(at::kHalf)},
                                {"double", at::randn({2, 2}, at::kDouble)},
                                {"long", at::arange(-3, 4, at::kLong)},
                                {"int", at::arange(5, at::kInt)},
                                {"bytes", at::arange(9, at::kByte)},
                                {"bool", at::arange(4).remainder(2).to(at::kBool)},
                                {"scalar", at::full({}, 2.5)},
                                {"empty", at::zeros({0, 4})}};
  const auto path = folder_ / "x.safetensors";
  write_safetensors(path, tensors, {{"format", "test"}, {"a \"quoted\" key", "größe"}});
  const SafetensorsReader reader(path);
  EXPECT_EQ(reader.tensors().size(), tensors.size());
  EXPECT_EQ(reader.metadata().at("format"), "test");
  EXPECT_EQ(reader.metadata().at("a \"quoted\" key"), "größe");
  for (const auto& [name, t] : tensors) {
    const at::Tensor back = reader.load(name);
    EXPECT_EQ(back.scalar_type(), t.scalar_type()) << name;
    EXPECT_TRUE(at::equal(back, t)) << name;
  }
}

TEST_F(Safetensors, NothingAtAllIsAFile) {
  write_safetensors(folder_ / "x.safetensors", {});
  EXPECT_TRUE(SafetensorsReader(folder_ / "x.safetensors").tensors().empty());
}

// What a reader does for each tensor does not grow with the number of the others.
TEST_F(Safetensors, AHundredThousandTensors) {
  std::string header = "{";
  for (int i = 0; i < 100000; ++i) header += fmt::format(R"({}"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})", i == 0 ? "" : ",", i);
  EXPECT_EQ(SafetensorsReader(write(file_of(header + "}", 0))).tensors().size(), 100000u);
}

TEST_F(Safetensors, LoadNamesTheNearest) {
  write_safetensors(folder_ / "x.safetensors", {{"embed.weight", at::zeros({1})}});
  const SafetensorsReader reader(folder_ / "x.safetensors");
  try {
    reader.load("embed.weigth");
    FAIL() << "loaded a tensor that is not there";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("holds no tensor 'embed.weigth'. Did you mean 'embed.weight'?"));
  }
}

struct Hostile {
  const char* name;
  std::string bytes;
  const char* message;
};

std::vector<Hostile> hostile() {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  auto entry = [](const std::string& e) { return R"({"a":{)" + e + "}}"; };
  return {
      {"Empty", "", "0 bytes are too few"},
      {"SevenBytes", "1234567", "7 bytes are too few"},
      {"HeaderTooLong", with_length(uint64_t{1} << 60, good),
       "claims a header of 1152921504606846976 bytes, at most 100000000"},
      {"HeaderOfAllOnes", with_length(~uint64_t{0}, good), "at most 100000000"},
      {"HeaderTruncated", with_length(good.size() + 1, good), "but only 54 follow: truncated?"},
      {"ForeignFile", "PK\3\4" + std::string(60, 'x'), "is this a safetensors file?"},
      {"NotJson", file_of("{\"a\":", 0), "not valid JSON"},
      {"EmptyHeader", file_of("", 0), "not valid JSON"},
      {"NotUtf8", file_of("{\"\xFF\":{}}", 0), "not valid JSON"},
      {"HeaderIsAList", file_of("[]", 0), "no JSON object"},
      {"EntryIsANumber", file_of(R"({"a":3})", 0), "entry 'a' is no object"},
      {"DuplicateTensor",
       file_of(
           R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
           1),
       "names 'a' twice"},
      {"DuplicateKey", file_of(entry(R"("dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1])"), 1),
       "names 'dtype' twice"},
      {"DeepNesting", file_of(std::string(100000, '['), 0), "nested deeper"},
      {"DeepInEntry", file_of(entry(R"("dtype":"U8","shape":[[[[1]]]],"data_offsets":[0,1])"), 1), "nested deeper"},
      {"UnknownDtype", file_of(entry(R"("dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8])"), 8),
       "dtype 'F8_E4M3', which is not supported"},
      {"NoDtype", file_of(entry(R"("shape":[8],"data_offsets":[0,8])"), 8), "dtype ''"},
      {"NoShape", file_of(entry(R"("dtype":"F32","data_offsets":[0,8])"), 8), "no valid 'shape'"},
      {"NoOffsets", file_of(entry(R"("dtype":"F32","shape":[2])"), 8), "no valid 'data_offsets'"},
      {"OneOffset", file_of(entry(R"("dtype":"F32","shape":[2],"data_offsets":[8])"), 8), "no valid data_offsets"},
      {"NegativeShape", file_of(entry(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8),
       "something else than a whole number"},
      {"FractionalShape", file_of(entry(R"("dtype":"F32","shape":[2.5],"data_offsets":[0,8])"), 8),
       "something else than a whole number"},
      {"RankTooHigh", file_of(entry(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])"), 1),
       "at most 8 numbers"},
      {"ShapeOverflows", file_of(entry(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])"), 0),
       "size overflows"},
      {"EmptyShapeOverflows", file_of(entry(R"("dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0])"), 0),
       "size overflows"},
      {"NameWithNewline", file_of(R"({"a\nb":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}})", 1), "tensor 'a b' spans 1 bytes"},
      {"ShapeBeyondInt64", file_of(entry(R"("dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,8])"), 8),
       "something else than a whole number"},
      {"OffsetsReversed", file_of(entry(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), 8),
       "no valid data_offsets"},
      {"OffsetPastTheEnd",
       file_of(entry(R"("dtype":"F32","shape":[2],"data_offsets":[9223372036854775000,9223372036854775008])"), 8),
       "but the file holds 8: truncated?"},
      {"DataTruncated", file_of(good, 7), "ends at byte 8 of the data, but the file holds 7: truncated?"},
      {"ExtentAgainstShape", file_of(entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), 8),
       "spans 8 bytes, its dtype and shape want 12"},
      {"ExtentAgainstDtype", file_of(entry(R"("dtype":"F64","shape":[2],"data_offsets":[0,8])"), 8),
       "spans 8 bytes, its dtype and shape want 16"},
      {"Overlap",
       file_of(
           R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}})",
           12),
       "overlap at byte 4"},
      {"SameExtent",
       file_of(
           R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
           8),
       "overlap at byte 0"},
      {"Hole",
       file_of(
           R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}})",
           12),
       "leave a hole at byte 4"},
      {"DataOfNoTensor", file_of(good, 9), "1 bytes of data belong to no tensor"},
      {"LongName", file_of("{\"" + std::string(2000, 'n') + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1),
       "name of 2000 bytes"},
      {"MetadataIsAList", file_of(R"({"__metadata__":[]})", 0), "__metadata__ is no object"},
      {"MetadataOfNumbers", file_of(R"({"__metadata__":{"step":3}})", 0), "'step' is no string"},
  };
}

class HostileSafetensors : public Safetensors, public ::testing::WithParamInterface<Hostile> {};

TEST_P(HostileSafetensors, IsRefusedInOneLine) {
  EXPECT_THAT(refusal(GetParam().bytes), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(Files, HostileSafetensors, ::testing::ValuesIn(hostile()),
                         [](const auto& info) { return std::string(info.param.name); });

// Every prefix of a whole file is refused, whatever part the cut falls into.
TEST_F(Safetensors, EveryTruncationIsRefused) {
  write_safetensors(folder_ / "whole.safetensors", {{"a", at::ones({3})}, {"b", at::ones({2}, at::kLong)}},
                    {{"format", "test"}});
  const std::string whole = read_file(folder_ / "whole.safetensors");
  for (size_t n = 0; n < whole.size(); ++n)
    EXPECT_NE(refusal(whole.substr(0, n)), "") << n << " of " << whole.size() << " bytes";
  EXPECT_EQ(refusal(whole), "");
}

// Any single damaged byte of the header is refused or leaves tensors that lie within the file.
TEST_F(Safetensors, DamagedHeadersNeverReadOutside) {
  write_safetensors(folder_ / "whole.safetensors", {{"a", at::ones({3})}, {"b", at::ones({2}, at::kLong)}});
  const std::string whole = read_file(folder_ / "whole.safetensors");
  for (size_t at = 0; at < whole.size() - 28; ++at) {
    for (const char c : {'\0', '"', '9', '}', '[', '\xFF'}) {
      std::string damaged = whole;
      damaged[at] = c;
      const std::string path = write(damaged);
      try {
        const SafetensorsReader reader(path);
        for (const auto& [name, info] : reader.tensors()) EXPECT_EQ(reader.load(name).nbytes(), info.end - info.begin);
      } catch (const Error&) {
      }
    }
  }
}

TEST_F(Safetensors, MissingFile) {
  EXPECT_THROW(SafetensorsReader(folder_ / "none.safetensors"), Error);
  EXPECT_THROW(SafetensorsReader(folder_.path()), Error);
}

}  // namespace
}  // namespace oryx
