// Vector kernels of products of a few rows, without torch headers.
#pragma once

#include <cstdint>

namespace oryx::ops::kernels {

// y[m, n] = sum_k x[m, k] w[n, k] for n in [begin, end); x is M rows at distance x_stride, w rows at distance w_stride,
// y rows at distance y_stride, all in elements. The order of the sum depends on K alone.
void few_rows_product(const float* x, int64_t M, int64_t K, int64_t x_stride, const float* w, int64_t w_stride,
                      int64_t begin, int64_t end, float* y, int64_t y_stride);

}  // namespace oryx::ops::kernels
