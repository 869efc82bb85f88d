// Of the forward pass: which scores are seen, and the step of a softmax over blocks of 128 keys, in the accumulators of 64 rows (four a row and eight columns).
#pragma once

#include "oryx/ops/span_attention/cuda/span_attention_products.cuh"

namespace oryx::span_attention_cuda {

// Keys outside of [first, last], counted from the thread's first column, are not seen.
__device__ __forceinline__ void hide(float (&s)[64], const int (&first)[2], const int (&last)[2]) {
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * j + i % 2;
      if (key > last[i / 2] || key < first[i / 2]) s[4 * j + i] = -INFINITY;
    }
}

// Keys that are not seen by the queries at positions t; seen: from when until when, of the keys from the thread's first column.
__device__ __forceinline__ void hide_between(float (&s)[64], const int4* seen, const int (&t)[2]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int4 x = __ldg(seen + 4 * j);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (t[h] < x.x || t[h] >= x.y) s[4 * j + 2 * h] = -INFINITY;
      if (t[h] < x.z || t[h] >= x.w) s[4 * j + 2 * h + 1] = -INFINITY;
    }
  }
}

// s becomes exp2(c (s - m)); m and the thread's share l of the denominators move on; returns what O is to be multiplied with.
__device__ __forceinline__ void softmax(float (&s)[64], float (&m)[2], float (&l)[2], float (&factor)[2], float c) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = m[h];
#pragma unroll
    for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float shift = top == -INFINITY ? 0.f : top * c;
    factor[h] = exp2_fast(m[h] * c - shift);
    m[h] = top;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[4 * j + 2 * h + i];
        x = exp2_fast(fmaf(x, c, -shift));
        sum += x;
      }
    l[h] = l[h] * factor[h] + sum;
  }
}

}  // namespace oryx::span_attention_cuda
