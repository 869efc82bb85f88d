#include "oryx/data/token_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <fstream>
#include <functional>

#include "oryx/common/random.h"
#include "oryx/data/test_support.h"

namespace oryx {
namespace {

using test::error_of;
using test::TemporaryFolder;
using ::testing::HasSubstr;

std::vector<std::vector<int32_t>> make_documents(uint64_t seed, int count, int64_t vocab, uint64_t longest) {
  std::vector<std::vector<int32_t>> docs;
  CounterRng r(seed);
  for (int i = 0; i < count; ++i) {
    std::vector<int32_t> d(1 + r.below(longest));
    for (auto& t : d) t = static_cast<int32_t>(r.below(vocab));
    d.back() = static_cast<int32_t>(vocab - 1);
    docs.push_back(std::move(d));
  }
  return docs;
}

void write(const std::filesystem::path& path, const std::vector<std::vector<int32_t>>& docs, int64_t vocab,
           const TokenFileOptions& options) {
  TokenFileWriter w(path, vocab, 0xABCD, options);
  for (const auto& d : docs) w.add(d);
  w.finish();
}

class TokenFileTest : public ::testing::TestWithParam<std::tuple<TokenEncoding, int64_t>> {};

TEST_P(TokenFileTest, RoundTrip) {
  const auto [encoding, vocab] = GetParam();
  TemporaryFolder folder;
  for (const uint64_t longest : {1, 5, 300}) {
    for (const int count : {0, 1, 100}) {
      const auto docs = make_documents(longest, count, vocab, longest);
      const TokenFileOptions options{.encoding = encoding, .block_tokens = 64};
      write(folder / "a.tok", docs, vocab, options);
      const TokenFile file(folder / "a.tok");
      EXPECT_EQ(file.header().token_bytes, vocab <= 65536 ? 2u : 4u);
      EXPECT_EQ(file.header().fingerprint, 0xABCDu);
      ASSERT_EQ(file.documents(), docs.size());
      for (size_t i = 0; i < docs.size(); ++i) {
        std::vector<int64_t> out(file.document_size(i));
        file.read(file.document_begin(i), out);
        EXPECT_EQ(std::vector<int32_t>(out.begin(), out.end()), docs[i]);
      }
      file.verify();
      EXPECT_THROW(
          {
            std::vector<int64_t> out(2);
            file.read(file.tokens() - (file.tokens() > 0), out);
          },
          std::out_of_range);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, TokenFileTest,
                         ::testing::Combine(::testing::Values(TokenEncoding::raw, TokenEncoding::zstd),
                                            ::testing::Values(int64_t{65536}, int64_t{65537})));

TEST(TokenFile, CompressedBlocksCrossDocumentsAndAreSmallerForRepetitiveText) {
  TemporaryFolder folder;
  const std::vector<std::vector<int32_t>> docs(50, std::vector<int32_t>(1000, 7));
  write(folder / "raw.tok", docs, 100, {});
  write(folder / "zstd.tok", docs, 100, {.encoding = TokenEncoding::zstd, .block_tokens = 4096});
  EXPECT_LT(std::filesystem::file_size(folder / "zstd.tok") * 10, std::filesystem::file_size(folder / "raw.tok"));
  std::vector<int64_t> all(50000);
  TokenFile(folder / "zstd.tok").read(0, all);
  EXPECT_EQ(all, std::vector<int64_t>(50000, 7));
}

TEST(TokenFile, NothingIsLeftWithoutFinish) {
  TemporaryFolder folder;
  {
    TokenFileWriter w(folder / "a.tok", 10, 0);
    w.add(std::vector<int32_t>{1, 2, 3});
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(TokenFile, WriterRefusesForeignTokens) {
  TemporaryFolder folder;
  TokenFileWriter w(folder / "a.tok", 10, 0);
  EXPECT_THROW(w.add(std::vector<int32_t>{10}), std::logic_error);
  EXPECT_THROW(w.add(std::vector<int32_t>{-1}), std::logic_error);
  EXPECT_THROW(w.add(std::vector<int32_t>{}), std::logic_error);
}

// What a bad file is made of: a good one (three documents, 12 tokens, vocabulary 20) and a change. `reseal` makes the
// checksums right again, as someone who means harm would.
struct BadFile {
  std::string name, message;
  std::function<void(std::string&)> change;
  bool reseal;
};

template <typename T>
void set(std::string& bytes, size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof value);
}

void reseal(std::string& bytes) {
  TokenHeader h;
  std::memcpy(&h, bytes.data(), sizeof h);
  const size_t tables = sizeof h + (h.payload_bytes + 7) / 8 * 8;
  if (tables < bytes.size())
    set(bytes, offsetof(TokenHeader, tables_checksum), fnv1a(std::string_view(bytes).substr(tables)));
  set(bytes, offsetof(TokenHeader, header_checksum), fnv1a(bytes.data(), 120));
}

class BadTokenFile : public ::testing::TestWithParam<TokenEncoding> {
 protected:
  std::string good() {
    write(folder_ / "good.tok", {{1, 2, 3, 4}, {5, 6, 7}, {8, 9, 10, 11, 19}}, 20,
          {.encoding = GetParam(), .block_tokens = 8});
    return read_file(folder_ / "good.tok");
  }
  // The message for a file of these bytes, read to its end.
  std::string message(const std::string& bytes) {
    std::ofstream(folder_ / "bad.tok", std::ios::binary) << bytes;
    return error_of([&] { TokenFile(folder_ / "bad.tok").verify(); });
  }
  TemporaryFolder folder_;
};

TEST_P(BadTokenFile, EveryDamageHasItsMessage) {
  const std::string good_bytes = good();
  ASSERT_EQ(message(good_bytes), "");
  const bool zstd = GetParam() == TokenEncoding::zstd;
  TokenHeader h;
  std::memcpy(&h, good_bytes.data(), sizeof h);
  const size_t tables = sizeof h + (h.payload_bytes + 7) / 8 * 8;
  const uint64_t huge = uint64_t{1} << 63;
  std::vector<BadFile> table = {
      {"empty", "too short for a token file", [](auto& b) { b.clear(); }, false},
      {"short header", "too short for a token file", [](auto& b) { b.resize(127); }, false},
      {"header only", "is it truncated?", [](auto& b) { b.resize(128); }, false},
      {"one byte less", "is it truncated?", [](auto& b) { b.pop_back(); }, false},
      {"one byte more", "something was appended", [](auto& b) { b += 'x'; }, false},
      {"foreign", "not a token file", [](auto& b) { b[0] = 'X'; }, false},
      {"future", "version 2", [&](auto& b) { set<uint32_t>(b, offsetof(TokenHeader, version), 2); }, true},
      {"flipped header bit", "damaged header", [](auto& b) { b[40] ^= 1; }, false},
      {"flipped table bit", "damaged tables", [&](auto& b) { b[tables] ^= 1; }, false},
      {"flipped payload bit", "damaged", [](auto& b) { b[129] ^= 1; }, false},
      {"encoding", "unknown encoding 9", [](auto& b) { set<uint32_t>(b, offsetof(TokenHeader, encoding), 9); }, true},
      {"width", "tokens of 3 bytes", [](auto& b) { set<uint32_t>(b, offsetof(TokenHeader, token_bytes), 3); }, true},
      {"no vocabulary", "vocabulary of 0", [](auto& b) { set<uint64_t>(b, offsetof(TokenHeader, vocab_size), 0); },
       true},
      {"wide vocabulary", "vocabulary of 65537",
       [](auto& b) { set<uint64_t>(b, offsetof(TokenHeader, vocab_size), 65537); }, true},
      {"tokens", "impossible counts", [&](auto& b) { set(b, offsetof(TokenHeader, tokens), huge); }, true},
      {"tokens that wrap", "bad.tok", [&](auto& b) { set(b, offsetof(TokenHeader, tokens), huge / 8 - 1); }, true},
      // Tables of 2^60 entries each: eight times their sum is 2^64, which is 0.
      {"tables that wrap", "impossible counts",
       [&](auto& b) {
         b.resize(sizeof h);
         set(b, offsetof(TokenHeader, tokens), huge / 8 - 1);
         set(b, offsetof(TokenHeader, documents), huge / 8 - 1);
         set<uint64_t>(b, offsetof(TokenHeader, payload_bytes), 0);
         set(b, offsetof(TokenHeader, tables_checksum), kFnvStart);
         set<uint32_t>(b, offsetof(TokenHeader, encoding), 1);
         set<uint32_t>(b, offsetof(TokenHeader, block_tokens), 1);
       },
       true},
      {"documents", "impossible counts", [&](auto& b) { set(b, offsetof(TokenHeader, documents), huge); }, true},
      {"payload", "of tokens alone; is it truncated?", [&](auto& b) { set(b, offsetof(TokenHeader, payload_bytes), huge); }, true},
      {"fewer documents", "something was appended",
       [](auto& b) { set<uint64_t>(b, offsetof(TokenHeader, documents), 2); }, true},
      {"unsorted", "document 0 ends before it begins", [&](auto& b) { set<uint64_t>(b, tables + 8, 0); }, true},
      {"unsorted later", "document 1 ends before it begins", [&](auto& b) { set(b, tables + 8, huge); }, true},
      {"not from 0", "do not cover the tokens", [&](auto& b) { set<uint64_t>(b, tables, 1); }, true},
      {"not to the end", "do not cover the tokens", [&](auto& b) { set<uint64_t>(b, tables + 24, 11); }, true},
      {"block size", "impossible block size",
       [&](auto& b) { set<uint32_t>(b, offsetof(TokenHeader, block_tokens), zstd ? 0 : 8); }, true},
  };
  if (zstd) {
    table.push_back({"huge blocks", "impossible block size",
                     [](auto& b) { set<uint32_t>(b, offsetof(TokenHeader, block_tokens), ~0u); }, true});
    table.push_back({"longer block", "block 0 holds 16 bytes, expected 22",
                     [](auto& b) { set<uint32_t>(b, offsetof(TokenHeader, block_tokens), 11); }, true});
    table.push_back({"shorter block", "block 0 holds 16 bytes, expected 12",
                     [](auto& b) { set<uint32_t>(b, offsetof(TokenHeader, block_tokens), 6); }, true});
    table.push_back(
        {"blocks", "block 0 ends before it begins", [&](auto& b) { set<uint64_t>(b, tables + 32 + 8, 0); }, true});
    table.push_back({"blocks past the end", "block 1 ends before it begins",
                     [&](auto& b) { set(b, tables + 32 + 8, huge); }, true});
  } else {
    table.push_back({"id outside", "token 500 after token 0 is outside the vocabulary of 20",
                     [](auto& b) {
                       set<uint16_t>(b, 128, 500);
                       set(b, offsetof(TokenHeader, payload_checksum), fnv1a(b.data() + 128, 24));
                     },
                     true});
    table.push_back({"count and bytes", "24 bytes for 11 tokens",
                     [](auto& b) { set<uint64_t>(b, offsetof(TokenHeader, tokens), 11); }, true});
  }
  for (const auto& bad : table) {
    std::string bytes = good_bytes;
    bad.change(bytes);
    if (bad.reseal) reseal(bytes);
    const std::string m = message(bytes);
    EXPECT_THAT(m, HasSubstr(bad.message)) << bad.name;
    EXPECT_THAT(m, HasSubstr("bad.tok")) << bad.name;
    EXPECT_THAT(m, ::testing::Not(HasSubstr("\n"))) << bad.name;
  }
}

TEST_P(BadTokenFile, EveryTruncationAndRandomDamageIsAnError) {
  const std::string bytes = good();
  for (size_t n = 0; n < bytes.size(); ++n) EXPECT_NE(message(bytes.substr(0, n)), "") << n;
  CounterRng r(3);
  for (int i = 0; i < 300; ++i) {
    std::string bad = bytes;
    const size_t where = r.below(bad.size());
    bad[where] ^= static_cast<char>(1 + r.below(255));
    // Padding carries nothing: damage there may pass.
    TokenHeader h;
    std::memcpy(&h, bytes.data(), sizeof h);
    const size_t end = sizeof h + h.payload_bytes;
    if (where >= end && where < (end + 7) / 8 * 8) continue;
    EXPECT_NE(message(bad), "") << where;
    // With the checksums made right again any outcome is fine but a crash.
    reseal(bad);
    message(bad);
  }
}

INSTANTIATE_TEST_SUITE_P(All, BadTokenFile, ::testing::Values(TokenEncoding::raw, TokenEncoding::zstd));

}  // namespace
}  // namespace oryx
