// A float32 matrix as two in bfloat16, on CUDA: hands tensors to the launcher of cuda/halves.cu.
#include <torch/library.h>

#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/halves/cuda/halves_launch.h"

namespace oryx::ops {
namespace {

at::Tensor bfloat16_halves_cuda(at::TensorList parts) {
  TORCH_CHECK(!parts.empty() && parts.size() <= kOryxHalvesParts, "bfloat16_halves: ", parts.size(), " parts, expected 1 to ", int{kOryxHalvesParts});
  const c10::cuda::CUDAGuard guard(parts[0].device());
  const int64_t in = parts[0].size(-1);
  at::Tensor own[kOryxHalvesParts];
  const float* data[kOryxHalvesParts] = {};
  int64_t rows[kOryxHalvesParts] = {}, all = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    TORCH_CHECK(parts[i].dim() == 2 && parts[i].size(1) == in && parts[i].scalar_type() == at::kFloat && parts[i].device() == parts[0].device(),
                "bfloat16_halves: part ", i, " is ", parts[i].scalar_type(), " ", parts[i].sizes(), " on ", parts[i].device(), ", expected float32 [rows, ", in, "]");
    own[i] = parts[i].contiguous();
    data[i] = own[i].const_data_ptr<float>();
    all += rows[i] = own[i].size(0);
  }
  const at::Tensor out = at::empty({2 * all, in}, parts[0].options().dtype(at::kBFloat16));
  cuda::check("bfloat16_halves", oryx_bfloat16_halves(data, rows, static_cast<int>(parts.size()), in, out.mutable_data_ptr(), cuda::stream_of(out)));
  return out;
}

}  // namespace
}  // namespace oryx::ops

TORCH_LIBRARY_IMPL(oryx, CUDA, m) { m.impl("_bfloat16_halves", oryx::ops::bfloat16_halves_cuda); }
