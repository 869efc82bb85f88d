// libtorch's elementwise functions of contiguous tensors (exp, log, sin, sqrt ...) are MKL's, and MKL chooses a function's kernel when the function is first called. Where two
// threads make that first call at once, MKL 2024.2, which libtorch 2.11 holds, runs one of them through a kernel of low accuracy: half of a result is off by up to
// 4000 ulp, once in a process, without a word (pytorch/pytorch issue 188792). So each function is called here on one element, by the one thread that loads the library.
#include <ATen/ATen.h>

namespace {

bool choose_kernels() {
  const c10::InferenceMode no_gradients;
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const at::Tensor x = at::full({1}, 0.5, at::device(at::kCPU).dtype(type));
    for (const auto f : {at::acos, at::asin, at::atan, at::ceil, at::cos, at::cosh, at::erf, at::erfc, at::erfinv, at::exp, at::expm1, at::floor, at::lgamma, at::log, at::log10,
                         at::log1p, at::log2, at::sin, at::sinh, at::sqrt, at::tan, at::tanh, at::trunc}) {
      (void)f(x);
    }
    (void)at::round(x);
    (void)at::pow(x, 1.5);
  }
  return true;
}

[[maybe_unused]] const bool chosen = choose_kernels();

}  // namespace
