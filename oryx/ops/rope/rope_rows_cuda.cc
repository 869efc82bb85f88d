#include "oryx/ops/rope/rope_rows_cuda.h"

#include <ATen/ATen.h>

#include <bit>
#include <map>
#include <mutex>
#include <tuple>

namespace oryx::ops {

at::Tensor rope_rows_on(at::Device device, int64_t n, double theta, int64_t rotary_dim) {
  static std::mutex mutex;
  // Never destroyed: at exit the CUDA runtime may be gone before it.
  static auto& tables = *new std::map<std::tuple<int, double, int64_t>, at::Tensor>();
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& kept = tables[{device.index(), theta, rotary_dim}];
  if (kept.defined() && kept.size(0) >= n) return kept;
  const auto rows = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(n, 256))));
  const auto wide = at::device(device).dtype(at::kDouble);
  const at::Tensor frequencies = at::pow(theta, at::arange(0, rotary_dim, 2, wide) / -static_cast<double>(rotary_dim));
  const at::Tensor angles = at::arange(rows, wide).unsqueeze(1) * frequencies;  // [rows, rotary_dim / 2]
  kept = at::stack({angles.cos(), angles.sin()}, 1).to(at::kFloat);
  return kept;
}

}  // namespace oryx::ops
