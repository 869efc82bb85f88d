#include "oryx/data/loader.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "oryx/common/random.h"
#include "oryx/data/test_support.h"

namespace oryx {
namespace {

using test::error_of;
using test::TemporaryFolder;
using ::testing::HasSubstr;

// Token values tell where they come from: documents of consecutive numbers, none of which occurs twice.
class LoaderTest : public ::testing::Test {
 protected:
  std::shared_ptr<const TokenFile> make(int documents, uint64_t longest, TokenEncoding encoding = TokenEncoding::raw) {
    const auto path = folder_ / fmt::format("{}_{}.tok", documents, longest);
    TokenFileWriter w(path, 1 << 20, 1, {.encoding = encoding, .block_tokens = 100});
    CounterRng r(documents);
    int32_t value = 0;
    for (int i = 0; i < documents; ++i) {
      std::vector<int32_t> d(1 + r.below(longest));
      for (auto& t : d) t = value++;
      w.add(d);
    }
    w.finish();
    return std::make_shared<TokenFile>(path);
  }
  TemporaryFolder folder_;
};

std::vector<int64_t> flat(const at::Tensor& t) {
  return {t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel()};
}

std::set<int64_t> document_ends(const TokenFile& file) {
  std::set<int64_t> ends;
  for (uint64_t i = 0; i < file.documents(); ++i) ends.insert(static_cast<int64_t>(file.document_begin(i + 1)) - 1);
  return ends;
}

TEST(Permutation, IsABijectionAndChangesWithSeedAndEpoch) {
  for (const uint64_t n : {1, 2, 3, 5, 16, 17, 100, 1000}) {
    std::set<uint64_t> seen;
    const Permutation p(n, 7, 3);
    for (uint64_t i = 0; i < n; ++i) seen.insert(p(i));
    EXPECT_EQ(seen.size(), n);
    EXPECT_EQ(*seen.rbegin(), n - 1);
  }
  int same_seed = 0, same_epoch = 0, fixed = 0;
  const Permutation a(1000, 7, 0), b(1000, 8, 0), c(1000, 7, 1);
  for (uint64_t i = 0; i < 1000; ++i) {
    same_seed += a(i) == b(i);
    same_epoch += a(i) == c(i);
    fixed += a(i) == i;
  }
  EXPECT_LT(same_seed, 10);
  EXPECT_LT(same_epoch, 10);
  EXPECT_LT(fixed, 10);
}

TEST_F(LoaderTest, TargetsAndBoundsFollowTheDocuments) {
  const auto file = make(40, 30);
  const auto ends = document_ends(*file);
  TrainLoader loader(file, {.batch_size = 3, .seq_len = 17, .seed = 1});
  for (int step = 0; step < 20; ++step) {
    const Batch b = loader.next();
    ASSERT_EQ(b.input_ids.sizes(), (std::vector<int64_t>{3, 17}));
    const auto x = flat(b.input_ids), y = flat(b.targets);
    const std::set<int32_t> starts(b.bounds.begin(), b.bounds.end());
    int64_t kept = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT_EQ(y[i], ends.count(x[i]) ? kIgnoreTarget : x[i] + 1);
      kept += y[i] >= 0;
      // A sequence begins at each row and at each document, and nowhere else.
      const bool begins = i % 17 == 0 || x[i] != x[i - 1] + 1 || ends.count(x[i - 1]) > 0;
      EXPECT_EQ(starts.count(static_cast<int32_t>(i)) > 0, begins) << i;
    }
    EXPECT_EQ(kept, b.kept_targets);
    EXPECT_EQ(b.bounds.back(), 51);
    EXPECT_EQ(b.cu_seqlens.scalar_type(), at::kInt);
    EXPECT_TRUE(at::equal(b.cu_seqlens, at::tensor(b.bounds, at::kInt)));
    int32_t longest = 0;
    for (size_t i = 1; i < b.bounds.size(); ++i) longest = std::max(longest, b.bounds[i] - b.bounds[i - 1]);
    EXPECT_EQ(longest, b.max_seqlen);
  }
}

TEST_F(LoaderTest, EachEpochGivesEachTokenOnceInAnOrderOfItsOwn) {
  const auto file = make(50, 20, TokenEncoding::zstd);
  const auto n = static_cast<int64_t>(file->tokens());
  TrainLoader loader(file, {.batch_size = 1, .seq_len = 1, .seed = 5});
  std::vector<std::vector<int64_t>> epochs(2);
  for (auto& epoch : epochs) {
    for (int64_t i = 0; i < n; ++i) epoch.push_back(flat(loader.next().input_ids)[0]);
  }
  EXPECT_EQ(loader.position().epoch, 2u);
  EXPECT_NE(epochs[0], epochs[1]);
  for (auto& epoch : epochs) {
    std::sort(epoch.begin(), epoch.end());
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(epoch[i], i);
  }
}

TEST_F(LoaderTest, CutsCostNoTarget) {
  const auto file = make(10, 200);
  const auto n = static_cast<int64_t>(file->tokens());
  std::map<int64_t, int> seen;
  TrainLoader loader(file, {.batch_size = 1, .seq_len = 13});
  for (int64_t i = 0; i < n; ++i) {  // 13 epochs
    for (const int64_t t : flat(loader.next().targets)) ++seen[t];
  }
  EXPECT_EQ(seen[kIgnoreTarget], 13 * 10);
  EXPECT_EQ(seen.size(), static_cast<size_t>(n - 10 + 1));
  for (const auto& [token, times] : seen) {
    if (token >= 0) {
      EXPECT_EQ(times, 13) << token;
    }
  }
}

TEST_F(LoaderTest, ResumeEqualsUninterrupted) {
  const auto file = make(30, 40);
  const LoaderOptions options{.batch_size = 2, .seq_len = 31, .seed = 9};
  TrainLoader whole(file, options);
  for (int stop = 0; stop < 40; ++stop) {
    TrainLoader resumed(std::make_shared<TokenFile>(file->path()), options);
    const std::string saved = nlohmann::json(whole.position()).dump();
    resumed.seek(nlohmann::json::parse(saved).get<LoaderPosition>());
    const Batch a = whole.next(), b = resumed.next();
    ASSERT_TRUE(at::equal(a.input_ids, b.input_ids)) << stop;
    ASSERT_TRUE(at::equal(a.targets, b.targets));
    ASSERT_EQ(a.bounds, b.bounds);
    ASSERT_EQ(whole.position(), resumed.position());
  }
  EXPECT_GT(whole.position().epoch, 1u);
}

TEST_F(LoaderTest, RanksTogetherGiveTheRowsOfOne) {
  const auto file = make(30, 40);
  TrainLoader one(file, {.batch_size = 6, .seq_len = 16, .seed = 2});
  std::vector<TrainLoader> ranks;
  for (int r = 0; r < 3; ++r) ranks.emplace_back(file, LoaderOptions{2, 16, 2, r, 3});
  for (int step = 0; step < 25; ++step) {
    std::vector<at::Tensor> parts;
    for (auto& rank : ranks) parts.push_back(rank.next().input_ids);
    ASSERT_TRUE(at::equal(at::cat(parts), one.next().input_ids));
    for (auto& rank : ranks) ASSERT_EQ(rank.position(), one.position());
  }
}

TEST_F(LoaderTest, PositionsOfOtherDataAreRefused) {
  const auto file = make(5, 10), other = make(6, 10);
  TrainLoader loader(file, {.seq_len = 4, .seed = 1});
  const LoaderPosition good = loader.position();
  auto refused = [&](auto change) {
    LoaderPosition p = good;
    change(p);
    return error_of([&] { loader.seek(p); });
  };
  EXPECT_EQ(refused([](auto&) {}), "");
  EXPECT_THAT(refused([&](auto& p) { p.data = other->identity(); }),
              HasSubstr("not the data that this training began"));
  EXPECT_THAT(refused([](auto& p) { p.seed = 2; }), HasSubstr("seed 2"));
  EXPECT_THAT(refused([](auto& p) { p.document = 5; }), HasSubstr("document 5"));
  EXPECT_THAT(refused([](auto& p) { p.offset = 1000; }), HasSubstr("offset 1000"));
  for (const char* bad :
       {"{}", "[]", R"({"epoch": -1})", R"({"epoch":0,"document":0,"offset":0,"data":"x","seed":0})"}) {
    EXPECT_NE(error_of([&] { nlohmann::json::parse(bad).get<LoaderPosition>(); }), "") << bad;
  }
}

TEST_F(LoaderTest, EmptyFilesAreRefused) {
  const auto file = make(0, 1);
  EXPECT_THAT(error_of([&] { TrainLoader(file, {}); }), HasSubstr("nothing to train on"));
  EXPECT_THAT(error_of([&] { EvalReader(file, {}); }), HasSubstr("nothing to score"));
}

TEST_F(LoaderTest, EvalReaderScoresEachTokenOnceWithinItsWindow) {
  const auto file = make(40, 70);
  for (const int64_t per_batch : {0, 64, 1000}) {
    EvalReader reader(file, {.seq_len = 16, .tokens_per_batch = per_batch});
    std::map<int64_t, int> seen;
    uint64_t last = 0;
    while (const auto b = reader.next()) {
      const auto x = flat(b->input_ids), y = flat(b->targets);
      ASSERT_LE(static_cast<int64_t>(x.size()), std::max<int64_t>(per_batch, 16));
      ASSERT_EQ(b->windows.size() + 1, b->bounds.size());
      for (size_t w = 0; w < b->windows.size(); ++w) {
        EXPECT_LE(b->bounds[w + 1] - b->bounds[w], 16);
        EXPECT_GE(b->windows[w].document, last);
        last = b->windows[w].document;
        EXPECT_EQ(x[b->bounds[w]], static_cast<int64_t>(file->document_begin(last) + b->windows[w].begin));
        for (int32_t i = b->bounds[w]; i < b->bounds[w + 1]; ++i) {
          EXPECT_EQ(y[i], x[i] + 1);
          ++seen[y[i]];
        }
      }
    }
    EXPECT_EQ(seen.size(), file->tokens() - file->documents());
    for (const auto& [token, times] : seen) EXPECT_EQ(times, 1) << token;
    reader.rewind();
    EXPECT_TRUE(reader.next().has_value());
  }
}

TEST_F(LoaderTest, EvalReaderStopsAfterTheDocumentThatReachesTheLimit) {
  const auto file = make(40, 70);
  EvalReader reader(file, {.seq_len = 16, .max_tokens = 200});
  uint64_t tokens = 0, last = 0;
  while (const auto b = reader.next()) {
    tokens += b->input_ids.numel();
    last = b->windows.back().document;
  }
  EXPECT_EQ(tokens, file->document_begin(last + 1) - (last + 1));
  EXPECT_GE(tokens, 200u);
  EXPECT_LT(file->document_begin(last) - last, 200u);
}

TEST_F(LoaderTest, EvalWindowsLongerThanTheFileTakeNoMemoryOfTheirLength) {
  const auto file = make(40, 70);
  EvalReader reader(file, {.seq_len = int64_t{1} << 50});
  int64_t tokens = 0;
  while (const auto b = reader.next()) tokens += b->input_ids.numel();
  EXPECT_EQ(tokens, static_cast<int64_t>(file->tokens() - file->documents()));
}

}  // namespace
}  // namespace oryx
