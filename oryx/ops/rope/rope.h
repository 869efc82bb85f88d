// Rotary position embedding, rotate-half (Su et al. 2021, arXiv 2104.09864; the NeoX pairing m with m + d/2).
//
//   w_m = theta^(-2m/d), m < d/2;  y[m] = x[m] cos(p w_m) - x[m + d/2] sin(p w_m),  y[m + d/2] = x[m + d/2] cos + x[m] sin
//
// Angles are computed in float64: near position 1000 and beyond float32 angles cost digits.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::ops {

// x [B, T, H, d]; positions [B, T] int32: returns x rotated, same dtype. rotary_dim > 0 rotates only the first rotary_dim of d.
// Differentiable in x.
at::Tensor rope(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim = 0);
at::Tensor rope_naive(const at::Tensor& x, const at::Tensor& positions, double theta, int64_t rotary_dim = 0);

// Positions within each sequence, [B, T] int32: token t of a row (or of a packed document) is t - start + offset[n].
// cu_seqlens [N + 1] int32 (B = 1) or absent (N = B); offset [N] int32 or absent (0).
at::Tensor sequence_positions(int64_t B, int64_t T, const std::optional<at::Tensor>& cu_seqlens = {},
                              const std::optional<at::Tensor>& offset = {});

}  // namespace oryx::ops
