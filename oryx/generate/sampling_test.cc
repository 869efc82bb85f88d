#include "oryx/generate/sampling.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "oryx/common/error.h"

namespace oryx {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

at::Tensor logits_of(const std::vector<double>& probabilities) { return at::tensor(probabilities, at::kFloat).log(); }

std::vector<double> frequencies(const at::Tensor& logits, const SamplingOptions& options, int64_t draws) {
  std::vector<double> f(static_cast<size_t>(logits.numel()), 0);
  for (int64_t i = 0; i < draws; ++i) f[static_cast<size_t>(sample_token(logits, options, static_cast<uint64_t>(i)))] += 1;
  for (double& x : f) x /= static_cast<double>(draws);
  return f;
}

// Within four standard deviations of a binomial; draws are counter-based, so that this holds always or never.
void expect_distribution(const std::vector<double>& found, const std::vector<double>& expected, int64_t draws) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    const double p = expected[i];
    EXPECT_NEAR(found[i], p, 4 * std::sqrt(p * (1 - p) / static_cast<double>(draws))) << "token " << i;
  }
}

const std::vector<double> kProbabilities = {0.1, 0.4, 0.05, 0.25, 0.2};
constexpr int64_t kDraws = 20000;

TEST(Sampling, GreedyTakesTheFirstOfEquals) {
  EXPECT_EQ(sample_token(at::tensor({0.5f, 2.f, -1.f, 2.f}), {}, 0), 1);
  EXPECT_EQ(sample_token(at::zeros({7}), {}, 3), 0);
  EXPECT_EQ(sample_token(at::tensor({-kInf, -kInf, -3.f}), {}, 3), 2);
  EXPECT_EQ(sample_token(at::tensor({1.f, 3.f, 2.f}).to(at::kBFloat16), {}, 0), 1);
}

TEST(Sampling, DrawsTheModelsDistribution) {
  expect_distribution(frequencies(logits_of(kProbabilities), {.temperature = 1}, kDraws), kProbabilities, kDraws);
  // The constant that a softmax drops plays no part, however large.
  expect_distribution(frequencies(logits_of(kProbabilities) + 3000, {.temperature = 1, .seed = 5}, kDraws), kProbabilities, kDraws);
}

TEST(Sampling, ARaceDrawsTheSameDistribution) {
  expect_distribution(frequencies(logits_of(kProbabilities), {.temperature = 1, .race = true}, kDraws), kProbabilities, kDraws);
  expect_distribution(frequencies(logits_of(kProbabilities), {.temperature = 1, .top_k = 2, .seed = 4, .race = true}, kDraws), {0, 0.4 / 0.65, 0, 0.25 / 0.65, 0}, kDraws);
  EXPECT_EQ(frequencies(logits_of(kProbabilities), {.temperature = 1e-300, .race = true}, 50)[1], 1);
  EXPECT_EQ(frequencies(at::tensor({-kInf, 0.f, -kInf}), {.temperature = 1, .race = true}, 50)[1], 1);
}

// What drafts want: rows that are nearly alike draw the same token, as often as 1 - TV over 1 + TV at least (TV: half the sum of differences), whatever the order of ids.
TEST(Sampling, ARaceOfNearlyTheSameIsNearlyAlwaysTheSame) {
  std::vector<double> one(64, 1.0 / 64), other = one;
  for (size_t i = 0; i < 64; i += 2) other[i] *= 1.1, other[i + 1] *= 0.9;
  const double tv = 0.05;
  int same = 0;
  constexpr int kTries = 4000;
  for (uint64_t i = 0; i < kTries; ++i) {
    const SamplingOptions o{.temperature = 1, .race = true};
    same += sample_token(logits_of(one), o, i) == sample_token(logits_of(other), o, i) ? 1 : 0;
  }
  EXPECT_GT(static_cast<double>(same) / kTries, (1 - tv) / (1 + tv) - 0.02);
}

TEST(Sampling, TemperatureRaisesProbabilitiesToAPower) {
  for (const double temperature : {0.5, 2.0}) {
    std::vector<double> expected;
    double sum = 0;
    for (const double p : kProbabilities) sum += expected.emplace_back(std::pow(p, 1 / temperature));
    for (double& p : expected) p /= sum;
    expect_distribution(frequencies(logits_of(kProbabilities), {.temperature = temperature}, kDraws), expected, kDraws);
  }
  EXPECT_EQ(frequencies(logits_of(kProbabilities), {.temperature = 1e-300}, 50)[1], 1);
}

TEST(Sampling, TopKKeepsTheLikeliest) {
  expect_distribution(frequencies(logits_of(kProbabilities), {.temperature = 1, .top_k = 2}, kDraws), {0, 0.4 / 0.65, 0, 0.25 / 0.65, 0}, kDraws);
  expect_distribution(frequencies(logits_of(kProbabilities), {.temperature = 1, .top_k = 100}, kDraws), kProbabilities, kDraws);
  // Of equals the lower id stays.
  EXPECT_EQ(frequencies(at::zeros({6}), {.temperature = 1, .top_k = 1}, 50)[0], 1);
}

TEST(Sampling, TopPKeepsTheFewestThatReachIt) {
  const auto with = [](double p, int64_t k = 0) { return SamplingOptions{.temperature = 1, .top_k = k, .top_p = p}; };
  expect_distribution(frequencies(logits_of(kProbabilities), with(0.6), kDraws), {0, 0.4 / 0.65, 0, 0.25 / 0.65, 0}, kDraws);
  expect_distribution(frequencies(logits_of(kProbabilities), with(0.7), kDraws), {0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85}, kDraws);
  EXPECT_EQ(frequencies(logits_of(kProbabilities), with(1e-9), 50)[1], 1);
  // After top-k its share is of what is left: 0.4 / 0.65 alone reaches 0.6.
  EXPECT_EQ(frequencies(logits_of(kProbabilities), with(0.6, 2), 50)[1], 1);
}

TEST(Sampling, MinPLeavesOutTheUnlikely) {
  const double kept = 0.4 + 0.25 + 0.2;
  expect_distribution(frequencies(logits_of(kProbabilities), {.temperature = 1, .min_p = 0.3}, kDraws), {0, 0.4 / kept, 0, 0.25 / kept, 0.2 / kept}, kDraws);
}

TEST(Sampling, ADrawIsAFunctionOfSeedPositionAndSequence) {
  const at::Tensor logits = at::zeros({1000});
  const SamplingOptions options{.temperature = 1, .seed = 9};
  std::vector<int64_t> forward, backward;
  for (uint64_t i = 0; i < 20; ++i) forward.push_back(sample_token(logits, options, i));
  for (uint64_t i = 20; i-- > 0;) backward.insert(backward.begin(), sample_token(logits, options, i));
  EXPECT_EQ(forward, backward);
  std::vector<int64_t> other_seed, other_sequence;
  for (uint64_t i = 0; i < 20; ++i) other_seed.push_back(sample_token(logits, {.temperature = 1, .seed = 10}, i));
  for (uint64_t i = 0; i < 20; ++i) other_sequence.push_back(sample_token(logits, options, i, 1));
  EXPECT_NE(forward, other_seed);
  EXPECT_NE(forward, other_sequence);
}

TEST(Sampling, RefusesBadOptions) {
  const at::Tensor logits = at::zeros({4});
  const double nan = std::nan("");
  const std::vector<SamplingOptions> bad = {{.temperature = -0.1}, {.temperature = nan}, {.temperature = kInf}, {.top_k = -1}, {.top_p = 0},
                                            {.top_p = 1.1},        {.top_p = nan},       {.min_p = -0.1},       {.min_p = 2},  {.seed = -1}};
  for (const auto& options : bad) EXPECT_THROW(sample_token(logits, options, 0), Error);
}

TEST(Sampling, RefusesLogitsThatAreNotFinite) {
  for (const double temperature : {0.0, 1.0}) {
    const SamplingOptions options{.temperature = temperature};
    EXPECT_THROW(sample_token(at::tensor({0.f, std::nanf(""), 1.f}), options, 0), Error);
    EXPECT_THROW(sample_token(at::tensor({0.f, kInf}), options, 0), Error);
    EXPECT_THROW(sample_token(at::full({3}, -kInf), options, 0), Error);
  }
}

}  // namespace
}  // namespace oryx
