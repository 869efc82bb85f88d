#include "oryx/parallel/process_group.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <map>

#include "oryx/parallel/test_support.h"

namespace oryx {
namespace {

// What rank r of a group contributes: float values whose sum depends on the order.
at::Tensor contribution(int64_t rank, int64_t count, at::ScalarType type) {
  auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(rank) + 1);
  return at::randn({count}, generator, at::TensorOptions(at::kDouble)).mul(1e3).to(type);
}

TEST(ProcessGroupTest, SumsAndGathersOfAnySize) {
  for (const int64_t size : {1, 2, 3, 5}) {
    for (const int64_t part : {1, 37, 200'000}) {
      if (part > 37 && size != 3) continue;  // more than sockets hold
      for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
        SCOPED_TRACE(fmt::format("{} ranks, {} values", size, part));
        at::Tensor want = at::zeros({size * part}, at::kDouble);
        for (int64_t r = 0; r < size; ++r) want += contribution(r, size * part, type).to(at::kDouble);
        std::vector<at::Tensor> summed(static_cast<size_t>(size)), again(static_cast<size_t>(size));
        for (auto* results : {&summed, &again}) {
          test::for_ranks(size, [&](ProcessGroup& group) {
            const at::Tensor x = contribution(group.rank(), size * part, type);
            group.reduce_scatter(x);
            group.all_gather(x);
            group.finish();
            (*results)[static_cast<size_t>(group.rank())] = x;
          });
        }
        EXPECT_LE((summed[0].to(at::kDouble) - want).abs().max().item<double>(), type == at::kFloat ? 2e-3 : 1e-10);
        for (size_t r = 0; r < summed.size(); ++r) {
          EXPECT_TRUE(at::equal(summed[r], summed[0])) << "rank " << r << " has other sums than rank 0";
          EXPECT_TRUE(at::equal(summed[r], again[r])) << "the second time has other bits";
        }
      }
    }
  }
}

TEST(ProcessGroupTest, FewValuesAndTexts) {
  test::for_ranks(3, [](ProcessGroup& group) {
    const at::Tensor x = at::full({2}, static_cast<double>(group.rank() + 1));
    group.all_reduce(x);
    EXPECT_TRUE(at::equal(x, at::full({2}, 6.0, x.scalar_type())));
    const std::string own(static_cast<size_t>(group.rank()) * 3, static_cast<char>('a' + group.rank()));
    EXPECT_EQ(group.gather(own), (std::vector<std::string>{"", "bbb", "cccccc"}));
    EXPECT_TRUE(group.any(group.rank() == 2));
    EXPECT_FALSE(group.any(false));
    const at::Tensor half = at::full({6}, static_cast<double>(group.rank()), at::kBFloat16);
    group.all_gather(half);
    EXPECT_TRUE(at::equal(half.to(at::kFloat), at::tensor({0.0f, 0.0f, 1.0f, 1.0f, 2.0f, 2.0f})));
    group.require_same("alike", "words");
  });
}

TEST(ProcessGroupTest, ARankThatDiffersIsNamedOnAll) {
  try {
    test::for_ranks(3, [](ProcessGroup& group) { group.require_same(group.rank() == 1 ? "5" : "4", "steps"); });
    FAIL() << "nobody noticed";
  } catch (const PeerLost&) {
    FAIL() << "the reason was lost";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "rank 1 has other steps than rank 0: '5' and '4'; all processes must be started alike, on the same files");
  }
}

TEST(ProcessGroupTest, ARankThatLeavesIsNoticed) {
  std::atomic<int> noticed{0};
  test::for_ranks(3, [&](ProcessGroup& group) {
    if (group.rank() == 1) return;
    try {
      for (int i = 0; i < 3; ++i) (void)group.gather("more than one message");
      ADD_FAILURE() << "rank " << group.rank() << " noticed nothing";
    } catch (const PeerLost& e) {
      EXPECT_THAT(e.what(), ::testing::HasSubstr("is gone"));
      ++noticed;
    }
  });
  EXPECT_EQ(noticed, 2);
}

// Whoever connects where ranks meet and is none of them ends and delays no run.
TEST(ProcessGroupTest, StrangersAtThePortAreIgnored) {
  const Rendezvous meeting(2);
  std::vector<Socket> strangers;
  const auto call = [&](std::vector<uint64_t> words) {
    strangers.push_back(connect_to("127.0.0.1", meeting.port()));
    ASSERT_TRUE(strangers.back());
    ASSERT_TRUE(send_all(strangers.back(), words.data(), words.size() * sizeof(uint64_t), 1000));
  };
  call({0x6f7279786d656574, 7, 2, 1});   // a rank that there is not
  call({0x6f7279786d656574, 0, 5, 1});   // another number of ranks
  call({0, 0, 0, 0});
  call({});  // silent
  std::vector<std::thread> ranks;
  for (int64_t rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      Place place;
      place.rank = rank, place.size = 2, place.port = meeting.port(), place.meeting = Place::Meeting::kInLauncher;
      EXPECT_EQ(join_group(place, at::kCPU)->gather(std::to_string(rank)), (std::vector<std::string>{"0", "1"}));
    });
  }
  for (auto& r : ranks) r.join();
}

class PlaceTest : public ::testing::Test {
 protected:
  void TearDown() override {
    for (const char* name : kNames) ::unsetenv(name);
  }
  static std::optional<Place> place(const std::map<std::string, std::string>& variables) {
    for (const char* name : kNames) ::unsetenv(name);
    for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
    return place_from_environment();
  }
  static std::string error(const std::map<std::string, std::string>& variables) {
    try {
      (void)place(variables);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }
  static constexpr const char* kNames[] = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"};
};

TEST_F(PlaceTest, AsLaunchersSayIt) {
  EXPECT_FALSE(place({}));
  EXPECT_FALSE(place({{"RANK", "1"}}));
  const auto p = place({{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "4"}, {"MASTER_ADDR", "node7"}, {"MASTER_PORT", "29500"}});
  ASSERT_TRUE(p);
  EXPECT_EQ(p->rank, 5);
  EXPECT_EQ(p->size, 8);
  EXPECT_EQ(p->local_rank, 1);
  EXPECT_EQ(p->local_size, 4);
  EXPECT_EQ(p->address, "node7");
  EXPECT_EQ(p->port, 29500);
  EXPECT_EQ(p->meeting, Place::Meeting::kInRank0);
  EXPECT_EQ(place({{"WORLD_SIZE", "1"}})->size, 1);
  EXPECT_EQ(place({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "1"}})->local_rank, 1);  // one host
}

TEST_F(PlaceTest, WhatIsMissingOrWrongIsNamed) {
  EXPECT_THAT(error({{"WORLD_SIZE", "two"}}), ::testing::StartsWith("WORLD_SIZE is 'two', expected an integer from 1"));
  EXPECT_THAT(error({{"WORLD_SIZE", "0"}}), ::testing::StartsWith("WORLD_SIZE is '0'"));
  EXPECT_THAT(error({{"WORLD_SIZE", "2"}}), ::testing::StartsWith("WORLD_SIZE is set but RANK is not"));
  EXPECT_THAT(error({{"WORLD_SIZE", "2"}, {"RANK", "2"}}), ::testing::StartsWith("RANK is '2', expected an integer from 0 to 1"));
  EXPECT_THAT(error({{"WORLD_SIZE", "2"}, {"RANK", "0"}, {"MASTER_PORT", "99999"}}), ::testing::StartsWith("MASTER_PORT is '99999'"));
  EXPECT_THAT(error({{"WORLD_SIZE", "2"}, {"RANK", "0"}, {"MASTER_PORT", "2000"}}), ::testing::HasSubstr("MASTER_ADDR is not set"));
}

}  // namespace
}  // namespace oryx
