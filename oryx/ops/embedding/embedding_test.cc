// Gradients of a table's rows: the CPU's, and on a GPU the same bits every time, for small tables, which libtorch would sum by atomic operations, and large ones.
#include "oryx/ops/embedding/embedding.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

namespace oryx {
namespace {

TEST(Embedding, CudaRepeats) {
  if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA in this build or on this machine";
  for (const int64_t rows : {64, 5000}) {
    const at::Tensor weight = at::randn({rows, 128}), ids = (at::rand({1, 1 << 15}).pow(3) * static_cast<double>(rows)).to(at::kLong), up = at::randn({1, 1 << 15, 128});
    const auto gradient = [&](at::Device device) {
      const at::Tensor w = weight.to(device, at::kFloat, false, /*copy=*/true).requires_grad_(true);
      const at::Tensor y = ops::embedding(w, ids.to(device));
      EXPECT_TRUE(at::equal(y.detach().cpu(), at::embedding(weight, ids)));
      torch::autograd::backward({y}, {up.to(device)});
      return w.grad();
    };
    const at::Tensor want = gradient(at::kCPU), first = gradient(at::kCUDA);
    EXPECT_LT(((first.cpu() - want).norm() / want.norm()).item<double>(), 1e-5);
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(at::equal(gradient(at::kCUDA), first)) << rows << " rows";
    EXPECT_FALSE(at::globalContext().deterministicAlgorithms());
  }
}

}  // namespace
}  // namespace oryx
