#include "oryx/ops/swiglu/swiglu_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/swiglu/swiglu_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "oryx/ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = oryx::simd::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// The rest of an array is computed by the same vector code on a padded copy, so that an element's value does not depend
// on where the array was split.
constexpr size_t kMaxLanes = HWY_MAX_BYTES / sizeof(float);

HWY_INLINE V load(const float* p) { return hn::LoadU(D(), p); }
HWY_INLINE V load(const uint16_t* p) { return simd::load_bf16(D(), p); }
HWY_INLINE void store(V v, float* p) { hn::StoreU(v, D(), p); }
HWY_INLINE void store(V v, uint16_t* p) { simd::store_bf16(v, D(), p); }

template <class T>
HWY_INLINE void forward_vector(const T* gate, const T* up, T* y) {
  store(hn::Mul(simd::silu(D(), load(gate)), load(up)), y);
}

template <class T>
HWY_INLINE void backward_vector(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up) {
  const D d;
  const V g = load(gate), dy = load(d_y);
  const V s = simd::sigmoid(d, g);
  store(hn::Mul(hn::Mul(dy, load(up)), simd::silu_slope(d, g, s)), d_gate);
  store(hn::Mul(dy, hn::Mul(g, s)), d_up);
}

template <class T>
HWY_INLINE void copy(const T* from, T* to, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = from[i];
}

template <class T>
HWY_INLINE void forward(const T* gate, const T* up, T* y, size_t n) {
  const size_t lanes = hn::Lanes(D());
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) forward_vector(gate + i, up + i, y + i);
  if (i == n) return;
  T g[kMaxLanes] = {}, u[kMaxLanes] = {}, out[kMaxLanes];
  copy(gate + i, g, n - i);
  copy(up + i, u, n - i);
  forward_vector(g, u, out);
  copy(out, y + i, n - i);
}

template <class T>
HWY_INLINE void backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up, size_t n) {
  const size_t lanes = hn::Lanes(D());
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) backward_vector(d_y + i, gate + i, up + i, d_gate + i, d_up + i);
  if (i == n) return;
  T dy[kMaxLanes] = {}, g[kMaxLanes] = {}, u[kMaxLanes] = {}, dg[kMaxLanes], du[kMaxLanes];
  copy(d_y + i, dy, n - i);
  copy(gate + i, g, n - i);
  copy(up + i, u, n - i);
  backward_vector(dy, g, u, dg, du);
  copy(dg, d_gate + i, n - i);
  copy(du, d_up + i, n - i);
}

void ForwardF32(const float* gate, const float* up, float* y, int64_t n) { forward(gate, up, y, n); }
void ForwardBf16(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t n) { forward(gate, up, y, n); }
void BackwardF32(const float* d_y, const float* gate, const float* up, float* d_gate, float* d_up, int64_t n) {
  backward(d_y, gate, up, d_gate, d_up, n);
}
void BackwardBf16(const uint16_t* d_y, const uint16_t* gate, const uint16_t* up, uint16_t* d_gate, uint16_t* d_up,
                  int64_t n) {
  backward(d_y, gate, up, d_gate, d_up, n);
}

}  // namespace oryx::ops::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::kernels {

HWY_EXPORT(ForwardF32);
HWY_EXPORT(ForwardBf16);
HWY_EXPORT(BackwardF32);
HWY_EXPORT(BackwardBf16);

void swiglu_forward(const float* gate, const float* up, float* y, int64_t n) {
  HWY_DYNAMIC_DISPATCH(ForwardF32)(gate, up, y, n);
}
void swiglu_forward(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t n) {
  HWY_DYNAMIC_DISPATCH(ForwardBf16)(gate, up, y, n);
}
void swiglu_backward(const float* d_y, const float* gate, const float* up, float* d_gate, float* d_up, int64_t n) {
  HWY_DYNAMIC_DISPATCH(BackwardF32)(d_y, gate, up, d_gate, d_up, n);
}
void swiglu_backward(const uint16_t* d_y, const uint16_t* gate, const uint16_t* up, uint16_t* d_gate, uint16_t* d_up,
                     int64_t n) {
  HWY_DYNAMIC_DISPATCH(BackwardBf16)(d_y, gate, up, d_gate, d_up, n);
}

}  // namespace oryx::ops::kernels
#endif
