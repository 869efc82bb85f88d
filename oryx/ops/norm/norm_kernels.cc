#include "oryx/ops/norm/norm_kernels.h"

#include <cmath>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/norm/norm_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "oryx/ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = oryx::simd::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// n lanes at p: all of them, or (kPart) the rest of a row.
template <bool kPart>
HWY_INLINE V load(const float* p, [[maybe_unused]] size_t n) {
  if constexpr (kPart) {
    return simd::load_first(D(), p, n);
  } else {
    return hn::LoadU(D(), p);
  }
}

template <bool kPart>
HWY_INLINE void store(V v, float* p, [[maybe_unused]] size_t n) {
  if constexpr (kPart) {
    simd::store_first(v, D(), p, n);
  } else {
    hn::StoreU(v, D(), p);
  }
}

HWY_INLINE float sum_of_lanes(V v) { return hn::GetLane(hn::SumOfLanes(D(), v)); }

// ---- forward

template <NormForm kForm>
struct ForwardRow {
  const float *x, *residual, *gate, *w;
  float *y, *sum;

  // Writes u where the second pass cannot read it from x, and returns u^2 added to acc.
  template <bool kPart>
  HWY_INLINE V squares(size_t i, size_t n, V acc) const {
    V u = load<kPart>(x + i, n);
    if constexpr (kForm == NormForm::kAdd) {
      u = hn::Add(u, load<kPart>(residual + i, n));
      store<kPart>(u, sum + i, n);
    }
    if constexpr (kForm == NormForm::kGateFirst) {
      u = hn::Mul(u, simd::silu(D(), load<kPart>(gate + i, n)));
      store<kPart>(u, y + i, n);
    }
    return hn::MulAdd(u, u, acc);
  }

  template <bool kPart>
  HWY_INLINE void scale(size_t i, size_t n, V rstd) const {
    const float* u = kForm == NormForm::kAdd ? sum : kForm == NormForm::kGateFirst ? y : x;
    V out = hn::Mul(hn::Mul(load<kPart>(u + i, n), rstd), load<kPart>(w + i, n));
    if constexpr (kForm == NormForm::kGateAfter) out = hn::Mul(out, simd::silu(D(), load<kPart>(gate + i, n)));
    store<kPart>(out, y + i, n);
  }
};

template <NormForm kForm>
HWY_INLINE float forward_row(const ForwardRow<kForm>& row, size_t dim, float eps) {
  const D d;
  const size_t lanes = hn::Lanes(d), whole = dim - dim % lanes;
  V acc = hn::Zero(d);
  for (size_t i = 0; i < whole; i += lanes) acc = row.template squares<false>(i, lanes, acc);
  if (whole < dim) acc = row.template squares<true>(whole, dim - whole, acc);
  const float rstd = 1.0f / std::sqrt(sum_of_lanes(acc) / static_cast<float>(dim) + eps);
  const V scale = hn::Set(d, rstd);
  for (size_t i = 0; i < whole; i += lanes) row.template scale<false>(i, lanes, scale);
  if (whole < dim) row.template scale<true>(whole, dim - whole, scale);
  return rstd;
}

template <NormForm kForm>
HWY_INLINE void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  int64_t group = begin % a.groups;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * a.dim;
    ForwardRow<kForm> row{a.x + at, nullptr, nullptr, a.weight + group * a.dim, a.y + at, nullptr};
    if constexpr (kForm == NormForm::kAdd) row.residual = a.residual + at, row.sum = a.sum + at;
    if constexpr (kForm == NormForm::kGateAfter || kForm == NormForm::kGateFirst) row.gate = a.gate + at;
    a.rstd[r] = forward_row(row, static_cast<size_t>(a.dim), a.eps);
    if (++group == a.groups) group = 0;
  }
}

void Forward(NormForm form, const NormForward& a, int64_t begin, int64_t end) {
  switch (form) {
    case NormForm::kPlain:
      return forward_rows<NormForm::kPlain>(a, begin, end);
    case NormForm::kAdd:
      return forward_rows<NormForm::kAdd>(a, begin, end);
    case NormForm::kGateAfter:
      return forward_rows<NormForm::kGateAfter>(a, begin, end);
    case NormForm::kGateFirst:
      return forward_rows<NormForm::kGateFirst>(a, begin, end);
  }
}

// ---- backward: with a = dL/d(u * rstd),  du = rstd * (a - u * rstd * mean(a * u * rstd))

template <NormForm kForm>
struct BackwardRow {
  static constexpr bool kGated = kForm != NormForm::kPlain;
  const float *d_y, *x, *gate, *w, *d_sum;
  float *d_x, *d_gate, *d_w;

  // Returns a * u added to acc. sigmoid(gate) rests in d_gate until the second pass overwrites it.
  template <bool kPart>
  HWY_INLINE V products(size_t i, size_t n, V acc) const {
    V u = load<kPart>(x + i, n);
    if constexpr (kGated) {
      const V g = load<kPart>(gate + i, n), s = simd::sigmoid(D(), g);
      store<kPart>(s, d_gate + i, n);
      u = hn::Mul(u, hn::Mul(g, s));  // the same product, whether silu belongs to a or to u
    }
    return hn::MulAdd(hn::Mul(load<kPart>(d_y + i, n), load<kPart>(w + i, n)), u, acc);
  }

  template <bool kPart>
  HWY_INLINE void gradients(size_t i, size_t n, V rstd, V mean) const {
    const V dy = load<kPart>(d_y + i, n), in = load<kPart>(x + i, n), dyw = hn::Mul(dy, load<kPart>(w + i, n));
    const V weight_before = load<kPart>(d_w + i, n);
    if constexpr (kForm == NormForm::kPlain) {
      const V unit = hn::Mul(in, rstd);
      V dx = hn::Mul(rstd, hn::NegMulAdd(unit, mean, dyw));
      if (d_sum != nullptr) dx = hn::Add(dx, load<kPart>(d_sum + i, n));
      store<kPart>(dx, d_x + i, n);
      store<kPart>(hn::MulAdd(dy, unit, weight_before), d_w + i, n);
      return;
    }
    if constexpr (kGated) {
      const V g = load<kPart>(gate + i, n), s = load<kPart>(d_gate + i, n);
      const V silu = hn::Mul(g, s), slope = simd::silu_slope(D(), g, s);
      if constexpr (kForm == NormForm::kGateAfter) {
        const V unit = hn::Mul(in, rstd);
        store<kPart>(hn::Mul(rstd, hn::NegMulAdd(unit, mean, hn::Mul(dyw, silu))), d_x + i, n);
        store<kPart>(hn::Mul(hn::Mul(dyw, unit), slope), d_gate + i, n);
        store<kPart>(hn::MulAdd(hn::Mul(dy, silu), unit, weight_before), d_w + i, n);
      } else {
        const V unit = hn::Mul(hn::Mul(in, silu), rstd);
        const V du = hn::Mul(rstd, hn::NegMulAdd(unit, mean, dyw));
        store<kPart>(hn::Mul(du, silu), d_x + i, n);
        store<kPart>(hn::Mul(hn::Mul(du, in), slope), d_gate + i, n);
        store<kPart>(hn::MulAdd(dy, unit, weight_before), d_w + i, n);
      }
    }
  }
};

template <NormForm kForm>
HWY_INLINE void backward_row(const BackwardRow<kForm>& row, size_t dim, float rstd) {
  const D d;
  const size_t lanes = hn::Lanes(d), whole = dim - dim % lanes;
  V acc = hn::Zero(d);
  for (size_t i = 0; i < whole; i += lanes) acc = row.template products<false>(i, lanes, acc);
  if (whole < dim) acc = row.template products<true>(whole, dim - whole, acc);
  const V scale = hn::Set(d, rstd), mean = hn::Set(d, sum_of_lanes(acc) * rstd / static_cast<float>(dim));
  for (size_t i = 0; i < whole; i += lanes) row.template gradients<false>(i, lanes, scale, mean);
  if (whole < dim) row.template gradients<true>(whole, dim - whole, scale, mean);
}

template <NormForm kForm>
HWY_INLINE void backward_rows(const NormBackward& a, float* d_weight, int64_t begin, int64_t end) {
  int64_t group = begin % a.groups;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * a.dim, to = group * a.dim;
    BackwardRow<kForm> row{a.d_y + at, a.x + at, nullptr, a.weight + to, nullptr, a.d_x + at, nullptr, d_weight + to};
    if constexpr (kForm != NormForm::kPlain) row.gate = a.gate + at, row.d_gate = a.d_gate + at;
    if (a.d_sum != nullptr) row.d_sum = a.d_sum + at;
    backward_row(row, static_cast<size_t>(a.dim), a.rstd[r]);
    if (++group == a.groups) group = 0;
  }
}

void Backward(NormForm form, const NormBackward& a, float* d_weight, int64_t begin, int64_t end) {
  switch (form) {
    case NormForm::kPlain:
    case NormForm::kAdd:
      return backward_rows<NormForm::kPlain>(a, d_weight, begin, end);
    case NormForm::kGateAfter:
      return backward_rows<NormForm::kGateAfter>(a, d_weight, begin, end);
    case NormForm::kGateFirst:
      return backward_rows<NormForm::kGateFirst>(a, d_weight, begin, end);
  }
}

}  // namespace oryx::ops::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops::kernels {

HWY_EXPORT(Forward);
HWY_EXPORT(Backward);

void norm_forward(NormForm form, const NormForward& a, int64_t row_begin, int64_t row_end) {
  HWY_DYNAMIC_DISPATCH(Forward)(form, a, row_begin, row_end);
}

void norm_backward(NormForm form, const NormBackward& a, float* d_weight, int64_t row_begin, int64_t row_end) {
  HWY_DYNAMIC_DISPATCH(Backward)(form, a, d_weight, row_begin, row_end);
}

}  // namespace oryx::ops::kernels
#endif
