// What the kernels of RMSNorm and its forms share.
#pragma once

#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/cuda/load_weights.cuh"
#include "oryx/ops/cuda/packet.cuh"

namespace oryx::ops::cuda {
namespace {

constexpr int kPlain = 0, kAdd = 1, kGateAfter = 2, kGateFirst = 3;
constexpr int kThreads = 256;

struct Forward {
  const void *x, *residual, *gate, *weight;
  void *y, *sum;
  float* rstd;
  int64_t rows, dim, groups;
  float eps, weight_offset, inverse_dim;
  int weight_dtype;
};

struct Backward {
  const void *d_y, *x, *gate, *weight;
  const float* rstd;
  const void* d_sum;
  void *d_x, *d_gate;
  float* partial;  // [gridDim.x, groups * dim]
  int64_t rows, dim, groups, per_group;  // rows of a weight group
  float weight_offset, inverse_dim;
  int weight_dtype;
};

// What one element gives to the gradients. With n = u rstd the normalised value and h the gradient at n w:
//   du = rstd (h w - n mean(h w n)),  dw = h n
struct Element {
  float n, h;      // normalised value; gradient of n times weight
  float s, g;      // sigmoid of the gate, gate
  float x, d_y;
};
template <int kForm>
__device__ __forceinline__ Element element(float d_y, float x, float gate, float rstd) {
  Element e{x * rstd, d_y, 0.0f, gate, x, d_y};
  if constexpr (kForm == kGateAfter || kForm == kGateFirst) {
    e.s = sigmoid(gate);
    if constexpr (kForm == kGateAfter) e.h = d_y * gate * e.s;
    if constexpr (kForm == kGateFirst) e.n *= gate * e.s;
  }
  return e;
}
// d_x and d_gate of it, given its weight and mean(h w n).
template <int kForm>
__device__ __forceinline__ void finish(const Element& e, float w, float rstd, float mean, float& d_x, float& d_gate) {
  const float d_u = rstd * (e.h * w - e.n * mean);
  d_x = d_u;
  if constexpr (kForm == kGateAfter) d_gate = e.d_y * e.n * w * silu_slope(e.g, e.s);
  if constexpr (kForm == kGateFirst) {
    d_x = d_u * e.g * e.s;
    d_gate = d_u * e.x * silu_slope(e.g, e.s);
  }
}

}  // namespace
}  // namespace oryx::ops::cuda
