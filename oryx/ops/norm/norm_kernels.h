// Vector kernels of RMSNorm and its gated forms, float32. A "row" here is a slice that is normalised by itself: one of
// `groups` equal parts of the last axis; row r uses weights [(r % groups) * dim, ...).
//
//   kPlain      u = x                  y = u * rstd * w
//   kAdd        u = x + residual       y = u * rstd * w            (u is written to `sum`)
//   kGateAfter  u = x                  y = u * rstd * w * silu(gate)
//   kGateFirst  u = x * silu(gate)     y = u * rstd * w
//
// with rstd = 1 / sqrt(mean u^2 + eps).
#pragma once

#include <cstdint>

namespace oryx::ops::kernels {

enum class NormForm { kPlain, kAdd, kGateAfter, kGateFirst };

struct NormForward {
  const float *x, *residual, *gate, *weight;  // residual: kAdd only; gate: the gated forms only
  float *y, *sum, *rstd;                      // sum: kAdd only; rstd [rows]
  int64_t dim, groups;
  float eps;
};
void norm_forward(NormForm form, const NormForward& a, int64_t row_begin, int64_t row_end);

struct NormBackward {
  const float *d_y, *x, *gate, *weight, *rstd;
  const float* d_sum;  // added to d_x, may be null. kPlain and kAdd only; x is then the sum
  float *d_x, *d_gate;
  int64_t dim, groups;
};
// Adds this range's share of the weight's gradient to d_weight [groups * dim].
void norm_backward(NormForm form, const NormBackward& a, float* d_weight, int64_t row_begin, int64_t row_end);

}  // namespace oryx::ops::kernels
