// CPU kernels of the short convolution on plain pointers. T is float or double. Channels are contiguous everywhere.
//
// A sequence is seen as w - 1 history rows (times -(w - 1) .. -1) followed by its tokens (times 0 .. length - 1).
// History and its gradients are [w - 1, C], oldest first. Filters come transposed: [w, C].
#pragma once

#include <cstdint>

namespace oryx::ops {

inline constexpr int64_t kShortConvMaxWidth = 32;

struct ShortConvShape {
  int64_t channels, width;
  bool silu;
};

template <typename T>
struct ShortConvSequence {
  const T* x;        // token 0
  int64_t x_stride;  // between tokens
  int64_t length;
  const T* history;  // [w - 1, C]
};

// y [length, C] of the whole sequence; the piece's tokens are written.
template <typename T>
void short_conv_forward(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end,
                        const T* weight, const T* bias, T* y);

template <typename T>
struct ShortConvGradients {
  const T* d_y;  // [length, C], token 0
  int64_t d_y_stride;
  const T* d_final_state;  // [w - 1, C] or null
  T* d_x;                  // [length, C]
  T* d_history;  // [w - 1, C]; written by the piece that begins at 0 (an empty one for a sequence of length 0)
  T* d_filter;   // [w + 1, C], added to: rows 0 .. w - 1 the filter, row w the bias
  T* scratch;    // short_conv_scratch(shape, end - begin)
};

inline constexpr int64_t kShortConvBackwardBlock = 128;  // channels
inline int64_t short_conv_scratch(const ShortConvShape& s, int64_t tokens) {
  return (tokens + s.width - 1) * kShortConvBackwardBlock;
}

// Gradients that tokens begin <= t < end own: of x at those tokens, and these outputs' share of the filter's gradient.
template <typename T>
void short_conv_backward(const ShortConvShape& shape, const ShortConvSequence<T>& seq, int64_t begin, int64_t end,
                         const T* weight, const T* bias, const ShortConvGradients<T>& grad);

// One token of one sequence: x [C], weight [C, w], state [C, w - 1] (updated), y [C]; float32.
void short_conv_step_kernel(const ShortConvShape& shape, const float* x, const float* weight, const float* bias,
                            float* state, float* y);

}  // namespace oryx::ops
