#include "oryx/ops/few_rows/few_rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "oryx/ops/few_rows/few_rows_kernels.h"

namespace oryx::ops {
namespace {

constexpr int64_t kFewRowsGrain = 1 << 16;  // multiply-adds a thread must have at least

at::Tensor few_rows_cpu(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "few_rows_product: x ", x.sizes(),
              " and a weight of ", weight.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat, "few_rows_product: x is ",
              x.scalar_type(), ", the weight ", weight.scalar_type(), ", expected float32");
  const int64_t K = x.size(-1), N = weight.size(0);
  const at::Tensor flat = x.reshape({-1, K}).contiguous(), w = weight.stride(1) == 1 ? weight : weight.contiguous();
  const int64_t M = flat.size(0);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = N;
  at::Tensor y = at::empty(shape, x.options());
  const float *xs = flat.const_data_ptr<float>(), *ws = w.const_data_ptr<float>();
  float* ys = y.mutable_data_ptr<float>();
  const int64_t w_stride = w.stride(0), grain = std::max<int64_t>(4, kFewRowsGrain / std::max<int64_t>(1, M * K));
  at::parallel_for(0, N, grain, [=](int64_t begin, int64_t end) {
    kernels::few_rows_product(xs, M, K, K, ws, w_stride, begin, end, ys, N);
  });
  return y;
}

}  // namespace

bool few_rows_suit(const at::Tensor& x, const at::Tensor& weight) {
  return x.is_cpu() && weight.is_cpu() && x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
         x.size(-1) > 0 && x.numel() <= kFewRows * x.size(-1) && weight.stride(1) == 1 && !x.requires_grad() &&
         !weight.requires_grad();
}

at::Tensor rows_apart(const at::Tensor& x) {
  const int64_t rows = x.dim() > 0 && x.size(-1) > 0 ? x.numel() / x.size(-1) : 0;
  if (!x.is_cpu() || x.scalar_type() != at::kFloat || rows < 2 || rows > kFewRows) return x;
  return at::constant_pad_nd(x, {0, 1}).narrow(-1, 0, x.size(-1));
}

at::Tensor few_rows_product(const at::Tensor& x, const at::Tensor& weight) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("oryx::few_rows_product", "").typed<decltype(few_rows_cpu)>();
  return op.call(x, weight);
}

TORCH_LIBRARY_FRAGMENT(oryx, m) { m.def("few_rows_product(Tensor x, Tensor weight) -> Tensor"); }
TORCH_LIBRARY_IMPL(oryx, CPU, m) { m.impl("few_rows_product", few_rows_cpu); }

}  // namespace oryx::ops
