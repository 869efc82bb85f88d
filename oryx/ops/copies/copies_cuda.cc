// Copies that run together on CUDA: hands them to the launcher of cuda/copies.cu.
#include <torch/library.h>

#include "oryx/ops/copies/cuda/copies_launch.h"
#include "oryx/ops/cuda/launch.h"

namespace oryx::ops {
namespace {

void copy_together_cuda(const at::Tensor& where, at::IntArrayRef copies) {
  const c10::cuda::CUDAGuard guard(where.device());
  TORCH_CHECK(copies.size() % kOryxCopyWords == 0 && copies.size() <= static_cast<size_t>(kOryxCopies) * kOryxCopyWords, "copies: ", copies.size(), " numbers");
  cuda::check("copies", oryx_copy_together(copies.data(), static_cast<int>(copies.size() / kOryxCopyWords), cuda::stream_of(where)));
}

}  // namespace
}  // namespace oryx::ops

TORCH_LIBRARY_IMPL(oryx, CUDA, m) { m.impl("_copy_together", oryx::ops::copy_together_cuda); }
