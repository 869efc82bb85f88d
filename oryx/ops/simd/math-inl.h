// Elementary functions and partial loads on Highway vectors of float32, for the kernel files. Included once for each
// instruction set, after hwy/foreach_target.h.
//
// Errors: silu within 4 units in the last place of float64's wherever the result is normal (swiglu_test.cc measures it). NaN
// stays NaN, so that a loss that is not finite is seen.
#if defined(ORYX_OPS_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORYX_OPS_SIMD_MATH_INL_H_
#undef ORYX_OPS_SIMD_MATH_INL_H_
#else
#define ORYX_OPS_SIMD_MATH_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace oryx::simd::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The first n < Lanes(d) floats, zeros behind them; reads nothing further.
template <class D>
HWY_INLINE hn::Vec<D> load_first(D d, const float* p, size_t n) {
#if HWY_MEM_OPS_MIGHT_FAULT
  HWY_ALIGN float lanes[HWY_MAX_BYTES / sizeof(float)] = {};
  for (size_t i = 0; i < n; ++i) lanes[i] = p[i];
  return hn::Load(d, lanes);
#else
  return hn::MaskedLoad(hn::FirstN(d, n), d, p);
#endif
}

// Writes the first n < Lanes(d) lanes and nothing further.
template <class D>
HWY_INLINE void store_first(hn::Vec<D> v, D d, float* p, size_t n) {
#if HWY_MEM_OPS_MIGHT_FAULT
  HWY_ALIGN float lanes[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(v, d, lanes);
  for (size_t i = 0; i < n; ++i) p[i] = lanes[i];
#else
  hn::BlendedStore(v, hn::FirstN(d, n), d, p);
#endif
}

// bfloat16 as its bits. Rounded to nearest even when stored; NaN stays NaN.
template <class D>
HWY_INLINE hn::Vec<D> load_bf16(D d, const uint16_t* p) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> du16;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(du16, p))));
}

template <class D>
HWY_INLINE void store_bf16(hn::Vec<D> v, [[maybe_unused]] D d, uint16_t* p) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint16_t, D> du16;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fffu)));
  const auto nan = hn::Set(du, 0x7fc00000u);
  const auto kept = hn::IfThenElse(hn::RebindMask(du, hn::Ne(v, v)), nan, rounded);
  hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di, hn::ShiftRight<16>(kept))), du16, p);
}

template <class D>
struct ExpParts {
  hn::Vec<D> value;                           // e^r, |r| <= log(2)/2
  hn::Vec<hn::RebindToSigned<D>> power_of_2;  // e^x = value * 2^power_of_2
};

// Cody and Waite: x = q log 2 + r. The polynomial was interpolated at Chebyshev nodes, with 1 + r exact: error 1.1e-8.
template <class D>
HWY_INLINE ExpParts<D> exp_parts(D d, hn::Vec<D> x) {
  const hn::RebindToSigned<D> di;
  const auto magic = hn::Set(d, 12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const auto shifted = hn::MulAdd(x, hn::Set(d, 1.44269504f), magic);
  const auto q = hn::Sub(shifted, magic);
  auto r = hn::NegMulAdd(q, hn::Set(d, 0.693359375f), x);
  r = hn::NegMulAdd(q, hn::Set(d, -2.12194440e-4f), r);
  auto p = hn::Set(d, 1.3926213e-3f);
  p = hn::MulAdd(p, r, hn::Set(d, 8.363203e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1666556e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.66665763e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.5f));
  const auto value = hn::Add(hn::MulAdd(hn::Mul(r, r), p, r), hn::Set(d, 1.0f));
  return {value, hn::Sub(hn::BitCast(di, shifted), hn::BitCast(di, magic))};
}

template <class D>
HWY_INLINE hn::Vec<D> power_of_2(D d, hn::Vec<hn::RebindToSigned<D>> q) {
  const hn::RebindToSigned<D> di;
  return hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(q, hn::Set(di, 127))));
}

// e^x for any x: infinity above 88.73, subnormal and then 0 below -87.3.
template <class D>
HWY_INLINE hn::Vec<D> exp(D d, hn::Vec<D> x) {
  // Comparisons instead of Min and Max, which may drop a NaN.
  x = hn::IfThenElse(hn::Lt(x, hn::Set(d, -104.0f)), hn::Set(d, -104.0f), x);
  x = hn::IfThenElse(hn::Gt(x, hn::Set(d, 89.0f)), hn::Set(d, 89.0f), x);
  const ExpParts<D> e = exp_parts(d, x);
  const auto half = hn::ShiftRight<1>(e.power_of_2);  // 2^128 and 2^-150 are no floats, their halves are
  return hn::Mul(hn::Mul(e.value, power_of_2(d, half)), power_of_2(d, hn::Sub(e.power_of_2, half)));
}

// e^x for x <= 0 (softmax): 0 below -87.3, where the result would be subnormal.
template <class D>
HWY_INLINE hn::Vec<D> exp_nonpositive(D d, hn::Vec<D> x) {
  const ExpParts<D> e = exp_parts(d, x);
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.3f)), hn::Mul(e.value, power_of_2(d, e.power_of_2)));
}

template <class D>
HWY_INLINE hn::Vec<D> sigmoid(D d, hn::Vec<D> x) {
  const auto one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, exp(d, hn::Neg(x))));
}

// x * sigmoid(x)
template <class D>
HWY_INLINE hn::Vec<D> silu(D d, hn::Vec<D> x) {
  return hn::Div(x, hn::Add(hn::Set(d, 1.0f), exp(d, hn::Neg(x))));
}

// d silu(x) / dx, given s = sigmoid(x)
template <class D>
HWY_INLINE hn::Vec<D> silu_slope(D d, hn::Vec<D> x, hn::Vec<D> s) {
  return hn::Mul(s, hn::MulAdd(x, hn::Sub(hn::Set(d, 1.0f), s), hn::Set(d, 1.0f)));
}

}  // namespace oryx::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
