#include "oryx/ops/copies/copies.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace oryx::ops {
namespace {

// Copies of many kinds, more than fit into one launch, on the named device; afterwards every target must hold what a plain copy leaves there, and nothing else may have changed.
void expect_as_plain_copies(at::Device device) {
  at::manual_seed(3);
  const auto values = [&](at::IntArrayRef shape, at::ScalarType dtype) {
    return (dtype == at::kChar || dtype == at::kInt ? at::randint(-100, 100, shape, at::kInt) : at::randn(shape)).to(device, dtype);
  };
  struct Case {
    at::Tensor to, from;
    int64_t to_row, from_row, count;
    // The memory of `to` as a whole: what lies beside it must stay.
    at::Tensor whole() const { return at::empty({0}, to.options()).set_(to.storage(), 0, {static_cast<int64_t>(to.storage().nbytes() / to.element_size())}); }
  };
  std::vector<Case> cases;
  for (const int64_t rows : {1, 3, 40, 257}) {
    cases.push_back({values({rows + 5, 2, 64}, at::kBFloat16), values({rows, 2, 64}, at::kBFloat16), 5, 0, rows});
    cases.push_back({values({rows, 3}, at::kFloat), values({rows + 2, 3}, at::kFloat), 0, 2, rows});
    cases.push_back({values({rows + 3}, at::kChar), values({rows}, at::kChar), 3, 0, rows});             // at odd addresses
    cases.push_back({values({2 * rows, 7}, at::kBFloat16), values({rows, 7}, at::kBFloat16), rows, 0, rows});
    cases.push_back({values({rows, 128}, at::kBFloat16), values({rows, 384}, at::kBFloat16).narrow(1, 128, 128), 0, 0, rows});  // rows apart
    cases.push_back({values({rows, 20}, at::kFloat).narrow(1, 4, 12), values({rows, 12}, at::kFloat), 0, 0, rows});
    cases.push_back({values({rows, 3000}, at::kFloat).narrow(1, 0, 2500), values({rows, 3000}, at::kFloat).narrow(1, 500, 2500), 0, 0, rows});
    cases.push_back({values({rows, 4, 6}, at::kFloat), values({rows, 6, 4}, at::kFloat).transpose(1, 2), 0, 0, rows});  // no launch takes it
    cases.push_back({values({rows, 4}, at::kInt), values({rows, 4}, at::kFloat).round(), 0, 0, rows});                  // another dtype
  }
  cases.push_back({values({300, 1000}, at::kFloat), values({300, 1000}, at::kFloat), 0, 0, 300});
  cases.push_back({values({4, 8}, at::kFloat), values({4, 8}, at::kFloat), 2, 1, 0});  // nothing
  std::vector<at::Tensor> wanted;
  for (const Case& c : cases) {
    const at::Tensor whole = c.whole().clone();
    whole.as_strided(c.to.sizes(), c.to.strides(), c.to.storage_offset()).narrow(0, c.to_row, c.count).copy_(c.from.narrow(0, c.from_row, c.count));
    wanted.push_back(whole);
  }
  Copies copies;
  for (const Case& c : cases) copies.add_rows(c.to, c.to_row, c.from, c.from_row, c.count);
  const at::Tensor one = values({}, at::kFloat), other = values({}, at::kFloat);
  copies.add(one, other);
  copies.run();
  EXPECT_TRUE(copies.empty());
  for (size_t i = 0; i < cases.size(); ++i) EXPECT_TRUE(at::equal(cases[i].whole(), wanted[i])) << "case " << i << ": " << cases[i].to.sizes();
  EXPECT_TRUE(at::equal(one, other));
  copies.run();  // nothing waits
}

TEST(Copies, AreThoseOfTheLibrary) { expect_as_plain_copies(at::kCPU); }

TEST(Copies, AreThoseOfTheLibraryOnCuda) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  expect_as_plain_copies(at::kCUDA);
}

TEST(Copies, WaitOnAGpuAlone) {
  const at::Tensor to = at::zeros({4, 2}), from = at::ones({2, 2});
  Copies copies;
  copies.add_rows(to, 1, from, 0, 2);
  EXPECT_TRUE(copies.empty());
  EXPECT_EQ(to.sum().item<float>(), 4);
}

TEST(Copies, RefuseWhatDoesNotFit) {
  Copies copies;
  const at::Tensor x = at::zeros({4, 2});
  EXPECT_THROW(copies.add_rows(x, 3, at::zeros({2, 2}), 0, 2), c10::Error);
  EXPECT_THROW(copies.add_rows(x, 0, at::zeros({2, 2}), 1, 2), c10::Error);
  EXPECT_THROW(copies.add_rows(x, 0, at::zeros({2, 3}), 0, 2), c10::Error);
  EXPECT_THROW(copies.add(x, at::zeros({2, 2})), c10::Error);
  EXPECT_THROW(copies.add(x, at::zeros({5, 2})), c10::Error);
}

}  // namespace
}  // namespace oryx::ops
