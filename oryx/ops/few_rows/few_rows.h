// Products of a few activations with a weight matrix, as decoding makes them: y = x W^T.
//
// A row of y is a function of its row of x and of W alone, to the last bit: not of how many rows there are, nor of the
// number of threads. That is what lets sequences be decoded side by side and each give the tokens that it gives alone;
// libraries' products choose another order of summation for another number of rows. W is read once for all rows, which
// bounds the time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace oryx::ops {

inline constexpr int64_t kFewRows = 16;

// Whether few_rows_product() takes these: float32 on the CPU, at most kFewRows rows, rows of values side by side, and
// neither is part of what is trained (whether or not gradients are recorded just now: a layer that runs again for its
// backward pass must give what it gave).
bool few_rows_suit(const at::Tensor& x, const at::Tensor& weight);
// x [..., in], weight [out, in] -> [..., out].
at::Tensor few_rows_product(const at::Tensor& x, const at::Tensor& weight);

// x [..., n] as it is, in memory where no row touches the next, if it is float32 on the CPU and has 2 to kFewRows rows. For the library's elementwise
// functions (exp, log1p, sigmoid ...): they go over contiguous values in vectors and over what is left of them by other
// code, which rounds otherwise, so that a value would depend on how many rows stand beside its own. Rows that do not
// touch are gone over one by one.
at::Tensor rows_apart(const at::Tensor& x);

}  // namespace oryx::ops
