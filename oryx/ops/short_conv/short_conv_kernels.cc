#include "oryx/ops/short_conv/short_conv_kernels.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/short_conv/short_conv_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace oryx::ops {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// So many channels at a time that the w rows, the filter and the output stay in the first-level cache (float32, w = 4:
// 36 KiB).
constexpr int64_t kChannelBlock = 1024;
// Backward keeps d_z of a block of tokens as well: less, so that it stays in the second-level cache.
constexpr int64_t kBackwardBlock = kShortConvBackwardBlock;

// 1 / (1 + e^-x). The cap keeps e^-x finite; x / (1 + e^88) is below 1e-36.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Sigmoid(D d, V x) {
  const V one = hn::Set(d, 1);
  return hn::Div(one, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(x), hn::Set(d, 88)))));
}

// The token (or history row) at `time`; null for what lies outside.
template <typename T>
const T* RowAt(const ShortConvSequence<T>& s, const ShortConvShape& shape, int64_t time) {
  return time >= 0 ? s.x + time * s.x_stride : s.history + (time + shape.width - 1) * shape.channels;
}

// sum_j weight[j, c] row_j[c] + bias[c] for one vector of channels. W is the width when it is known at compile time,
// else 0.
template <int W, class D, typename T = hn::TFromD<D>>
HWY_INLINE hn::Vec<D> Convolve(D d, const ShortConvShape& shape, const T* const* rows, const T* weight, const T* bias,
                               int64_t c) {
  const int64_t w = W > 0 ? W : shape.width;
  hn::Vec<D> sum = bias != nullptr ? hn::LoadU(d, bias + c) : hn::Zero(d);
  for (int64_t j = 0; j < w; ++j) {
    sum = hn::MulAdd(hn::LoadU(d, weight + j * shape.channels + c), hn::LoadU(d, rows[j] + c), sum);
  }
  return sum;
}

// Runs body(d, c) over the channels c0 .. c1: whole vectors, then single lanes.
template <typename T, class Body>
HWY_INLINE void OverChannels(int64_t c0, int64_t c1, const Body& body) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t c = c0;
  for (; c + lanes <= c1; c += lanes) body(d, c);
  for (; c < c1; ++c) body(hn::CappedTag<T, 1>(), c);
}

template <int W, typename T>
void ForwardWidth(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end,
                  const T* weight, const T* bias, T* y) {
  const T* rows[kShortConvMaxWidth];
  for (int64_t c0 = 0; c0 < shape.channels; c0 += kChannelBlock) {
    const int64_t c1 = std::min(shape.channels, c0 + kChannelBlock);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t j = 0; j < shape.width; ++j) rows[j] = RowAt(seq, shape, t - shape.width + 1 + j);
      T* out = y + t * shape.channels;
      OverChannels<T>(c0, c1, [&](auto d, int64_t c) {
        const auto z = Convolve<W>(d, shape, rows, weight, bias, c);
        hn::StoreU(shape.silu ? hn::Mul(z, Sigmoid(d, z)) : z, d, out + c);
      });
    }
  }
}

template <typename T>
void Forward(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end, const T* weight,
             const T* bias, T* y) {
  const auto run = shape.width == 4 ? ForwardWidth<4, T> : ForwardWidth<0, T>;
  run(shape, seq, begin, end, weight, bias, y);
}

// Gradient at z, the input of the activation, for the tokens begin <= t < end; rows of d_z hold the channels c0 .. c1.
// silu'(z) = s (1 + z (1 - s)), s = sigmoid(z).
template <int W, typename T>
void ActivationBackward(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end,
                        const T* weight, const T* bias, const T* d_y, int64_t d_y_stride, T* d_z, int64_t c0,
                        int64_t c1) {
  const T* rows[kShortConvMaxWidth];
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t j = 0; j < shape.width; ++j) rows[j] = RowAt(seq, shape, t - shape.width + 1 + j);
    const T* dy = d_y + t * d_y_stride;
    T* dz = d_z + (t - begin) * kBackwardBlock - c0;
    OverChannels<T>(c0, c1, [&](auto d, int64_t c) {
      auto g = hn::LoadU(d, dy + c);
      if (shape.silu) {
        const auto one = hn::Set(d, 1);
        const auto z = Convolve<W>(d, shape, rows, weight, bias, c);
        const auto s = Sigmoid(d, z);
        g = hn::Mul(g, hn::Mul(s, hn::MulAdd(z, hn::Sub(one, s), one)));
      }
      hn::StoreU(g, d, dz + c);
    });
  }
}

// Gradient of the input at `time` (negative: a history row), from d_z of times first .. last - 1.
template <typename T>
void InputBackward(const ShortConvShape& shape, int64_t length, int64_t time, const T* weight, const T* d_z,
                   int64_t first, int64_t last, const T* d_final_state, T* out, int64_t c0, int64_t c1) {
  const int64_t w = shape.width, state_row = time - (length - (w - 1));
  const T* from_state =
      d_final_state != nullptr && state_row >= 0 ? d_final_state + state_row * shape.channels : nullptr;
  const int64_t t0 = std::max(time, first), t1 = std::min(time + w, last);  // the outputs that read this input
  OverChannels<T>(c0, c1, [&](auto d, int64_t c) {
    auto sum = from_state != nullptr ? hn::LoadU(d, from_state + c) : hn::Zero(d);
    for (int64_t t = t0; t < t1; ++t) {
      sum = hn::MulAdd(hn::LoadU(d, weight + (w - 1 - (t - time)) * shape.channels + c),
                       hn::LoadU(d, d_z + (t - first) * kBackwardBlock + c - c0), sum);
    }
    hn::StoreU(sum, d, out + c);
  });
}

// Adds the filter's gradient of tokens begin <= t < end. Known widths keep the sums and the last w - 1 inputs in
// registers.
template <int W, typename T>
void FilterBackward(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end,
                    const T* d_z, T* d_filter, int64_t c0, int64_t c1) {
  const int64_t C = shape.channels;
  OverChannels<T>(c0, c1, [&](auto d, int64_t c) {
    using V = hn::Vec<decltype(d)>;
    V x[W], sum[W + 1];
    for (int j = 0; j < W - 1; ++j) x[j] = hn::LoadU(d, RowAt(seq, shape, begin - W + 1 + j) + c);
    for (int j = 0; j <= W; ++j) sum[j] = hn::LoadU(d, d_filter + j * C + c);
    for (int64_t t = begin; t < end; ++t) {
      const V g = hn::LoadU(d, d_z + (t - begin) * kBackwardBlock + c - c0);
      x[W - 1] = hn::LoadU(d, seq.x + t * seq.x_stride + c);
      for (int j = 0; j < W; ++j) sum[j] = hn::MulAdd(g, x[j], sum[j]);
      sum[W] = hn::Add(sum[W], g);
      for (int j = 0; j < W - 1; ++j) x[j] = x[j + 1];
    }
    for (int j = 0; j <= W; ++j) hn::StoreU(sum[j], d, d_filter + j * C + c);
  });
}

template <typename T>
void FilterBackwardAnyWidth(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end,
                            const T* d_z, T* d_filter, int64_t c0, int64_t c1) {
  const int64_t w = shape.width, C = shape.channels;
  for (int64_t t = begin; t < end; ++t) {
    const T* dz = d_z + (t - begin) * kBackwardBlock - c0;
    for (int64_t j = 0; j <= w; ++j) {
      T* out = d_filter + j * C;
      const T* row = j < w ? RowAt(seq, shape, t - w + 1 + j) : nullptr;
      OverChannels<T>(c0, c1, [&](auto d, int64_t c) {
        const auto g = hn::LoadU(d, dz + c), sum = hn::LoadU(d, out + c);
        hn::StoreU(row != nullptr ? hn::MulAdd(g, hn::LoadU(d, row + c), sum) : hn::Add(g, sum), d, out + c);
      });
    }
  }
}

template <int W, typename T>
void BackwardWidth(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end,
                   const T* weight, const T* bias, const ShortConvGradients<T>& grad) {
  const int64_t w = shape.width, C = shape.channels;
  const int64_t last = std::min(seq.length, end + w - 1);  // outputs up to here read this piece's inputs
  const int64_t first = begin == 0 ? -(w - 1) : begin;
  for (int64_t c0 = 0; c0 < C; c0 += kBackwardBlock) {
    const int64_t c1 = std::min(C, c0 + kBackwardBlock);
    ActivationBackward<W>(shape, seq, begin, last, weight, bias, grad.d_y, grad.d_y_stride, grad.scratch, c0, c1);
    for (int64_t time = first; time < end; ++time) {
      T* out = time >= 0 ? grad.d_x + time * C : grad.d_history + (time + w - 1) * C;
      InputBackward(shape, seq.length, time, weight, grad.scratch, begin, last, grad.d_final_state, out, c0, c1);
    }
    if constexpr (W > 0) {
      FilterBackward<W>(shape, seq, begin, end, grad.scratch, grad.d_filter, c0, c1);
    } else {
      FilterBackwardAnyWidth(shape, seq, begin, end, grad.scratch, grad.d_filter, c0, c1);
    }
  }
}

template <typename T>
void Backward(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end, const T* weight,
              const T* bias, const ShortConvGradients<T>& grad) {
  const auto run = shape.width == 4 ? BackwardWidth<4, T> : BackwardWidth<0, T>;
  run(shape, seq, begin, end, weight, bias, grad);
}

// Width 4 (every model of the field): the three history values and four taps of each channel are de-interleaved on
// load.
int64_t StepWidth4(const ShortConvShape& shape, const float* x, const float* weight, const float* bias, float* state,
                   float* y) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t c = 0;
  for (; c + lanes <= shape.channels; c += lanes) {
    hn::Vec<decltype(d)> s0, s1, s2, w0, w1, w2, w3;
    hn::LoadInterleaved3(d, state + 3 * c, s0, s1, s2);
    hn::LoadInterleaved4(d, weight + 4 * c, w0, w1, w2, w3);
    const auto now = hn::LoadU(d, x + c);
    auto z = bias != nullptr ? hn::LoadU(d, bias + c) : hn::Zero(d);
    z = hn::MulAdd(w3, now, hn::MulAdd(w2, s2, hn::MulAdd(w1, s1, hn::MulAdd(w0, s0, z))));
    hn::StoreU(shape.silu ? hn::Mul(z, Sigmoid(d, z)) : z, d, y + c);
    hn::StoreInterleaved3(s1, s2, now, d, state + 3 * c);
  }
  return c;
}

void Step(const ShortConvShape& shape, const float* x, const float* weight, const float* bias, float* state, float* y) {
  const int64_t w = shape.width;
  const hn::CappedTag<float, 1> d;
  for (int64_t c = w == 4 ? StepWidth4(shape, x, weight, bias, state, y) : 0; c < shape.channels; ++c) {
    float* s = state + c * (w - 1);
    float z = bias != nullptr ? bias[c] : 0;
    for (int64_t j = 0; j < w - 1; ++j) z += weight[c * w + j] * s[j];
    z += weight[c * w + w - 1] * x[c];
    y[c] = shape.silu ? z * hn::GetLane(Sigmoid(d, hn::Set(d, z))) : z;
    if (w == 1) continue;
    std::memmove(s, s + 1, sizeof(float) * static_cast<size_t>(w - 2));
    s[w - 2] = x[c];
  }
}

void ForwardF32(const ShortConvShape& shape, const ShortConvSequence<float>& seq, int64_t begin, int64_t end,
                const float* weight, const float* bias, float* y) {
  Forward(shape, seq, begin, end, weight, bias, y);
}
void ForwardF64(const ShortConvShape& shape, const ShortConvSequence<double>& seq, int64_t begin, int64_t end,
                const double* weight, const double* bias, double* y) {
  Forward(shape, seq, begin, end, weight, bias, y);
}
void BackwardF32(const ShortConvShape& shape, const ShortConvSequence<float>& seq, int64_t begin, int64_t end,
                 const float* weight, const float* bias, const ShortConvGradients<float>& grad) {
  Backward(shape, seq, begin, end, weight, bias, grad);
}
void BackwardF64(const ShortConvShape& shape, const ShortConvSequence<double>& seq, int64_t begin, int64_t end,
                 const double* weight, const double* bias, const ShortConvGradients<double>& grad) {
  Backward(shape, seq, begin, end, weight, bias, grad);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace oryx::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace oryx::ops {
HWY_EXPORT(ForwardF32);
HWY_EXPORT(ForwardF64);
HWY_EXPORT(BackwardF32);
HWY_EXPORT(BackwardF64);
HWY_EXPORT(Step);

template <>
void short_conv_forward(const ShortConvShape& shape, const ShortConvSequence<float>& seq, int64_t begin, int64_t end,
                        const float* weight, const float* bias, float* y) {
  HWY_DYNAMIC_DISPATCH(ForwardF32)(shape, seq, begin, end, weight, bias, y);
}
template <>
void short_conv_forward(const ShortConvShape& shape, const ShortConvSequence<double>& seq, int64_t begin, int64_t end,
                        const double* weight, const double* bias, double* y) {
  HWY_DYNAMIC_DISPATCH(ForwardF64)(shape, seq, begin, end, weight, bias, y);
}
template <>
void short_conv_backward(const ShortConvShape& shape, const ShortConvSequence<float>& seq, int64_t begin, int64_t end,
                         const float* weight, const float* bias, const ShortConvGradients<float>& grad) {
  HWY_DYNAMIC_DISPATCH(BackwardF32)(shape, seq, begin, end, weight, bias, grad);
}
template <>
void short_conv_backward(const ShortConvShape& shape, const ShortConvSequence<double>& seq, int64_t begin, int64_t end,
                         const double* weight, const double* bias, const ShortConvGradients<double>& grad) {
  HWY_DYNAMIC_DISPATCH(BackwardF64)(shape, seq, begin, end, weight, bias, grad);
}
void short_conv_step_kernel(const ShortConvShape& shape, const float* x, const float* weight, const float* bias,
                            float* state, float* y) {
  HWY_DYNAMIC_DISPATCH(Step)(shape, x, weight, bias, state, y);
}
}  // namespace oryx::ops
#endif
