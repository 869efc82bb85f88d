// Eight tokens of a chunk in the registers of a warp, D / 32 channels a lane: what `prepare` and `backward_chunk` make of q, k and g.
#pragma once

#include "kda_cuda_internal.cuh"

namespace oryx::kda_cuda {

// Which heads and tokens a block of threads works on; count 0: none. Grids are [Ho, chunks, sequences], packed [Ho, chunks, 1 or more].
struct Work {
  int chunk, ho, hs, hk, hq;
  bool first;  // of the output heads of a state head
  Place at;

  __device__ __forceinline__ explicit Work(const Shape& s) {
    ho = blockIdx.x, hs = ho / (s.Ho / s.Hs), hk = hs / (s.Hs / s.Hk), hq = ho / (s.Ho / s.Hq);
    first = ho % (s.Ho / s.Hs) == 0;
    if (s.cu_seqlens != nullptr) {
      chunk = blockIdx.z * gridDim.y + blockIdx.y;
      at = place(s, chunk);
    } else {
      chunk = blockIdx.z * s.chunks + blockIdx.y;
      at = {static_cast<int>(blockIdx.z) * s.T + static_cast<int>(blockIdx.y) * kC, min(kC, s.T - static_cast<int>(blockIdx.y) * kC)};
    }
  }
};
inline dim3 work_grid(const Shape& s, int records) {
  const int columns = records < 32768 ? records : 32768;
  return s.cu_seqlens != nullptr ? dim3(s.Ho, columns, (records + columns - 1) / columns) : dim3(s.Ho, s.chunks, s.N);
}

// Raw keys and queries, zero behind the sequence's end, and decays exp(g), one there.
template <int D>
struct TokenBlock {
  static constexpr int N = D / 32;
  uint32_t k[8][N / 2], q[8][N / 2];
  float a[8][N];

  __device__ __forceinline__ void load(const Shape& s, const Work& w, const __nv_bfloat16* keys, const __nv_bfloat16* queries, const float* g, int b, int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const size_t token = w.at.token + min(8 * b + i, w.at.count - 1);
      load_words(k[i], keys + (token * s.Hk + w.hk) * D + N * lane);
      load_words(q[i], queries + (token * s.Hq + w.hq) * D + N * lane);
      load_floats(a[i], g + (token * s.Hs + w.hs) * D + N * lane);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool valid = 8 * b + i < w.at.count;
#pragma unroll
      for (int n = 0; n < N / 2; ++n) k[i][n] = valid ? k[i][n] : 0u, q[i][n] = valid ? q[i][n] : 0u;
#pragma unroll
      for (int n = 0; n < N; ++n) a[i][n] = valid ? power2(a[i][n] * kLog2e) : 1.f;
    }
  }

  // 1 / |k| and scale / |q| of the tokens (64 floats each), decays over the block of eight ([8][D] floats).
  __device__ __forceinline__ void norms_and_decay(const Shape& s, float* rk, float* rq, float* decay, int b, int lane) const {
    float squares[16], all[N];
#pragma unroll
    for (int n = 0; n < N; ++n) all[n] = 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float x[N], y[N];
      unpack(x, k[i]);
      unpack(y, q[i]);
      squares[i] = squares[8 + i] = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        squares[i] = fmaf(x[n], x[n], squares[i]);
        squares[8 + i] = fmaf(y[n], y[n], squares[8 + i]);
        all[n] *= a[i][n];
      }
    }
    store_floats(decay + b * D + N * lane, all);
    const float norm = rsqrtf(warp_sums(squares, lane) + s.l2_eps);
    if (lane % 2 == 0) {
      if (lane < 16) rk[8 * b + lane / 2] = norm;
      else rq[8 * b + lane / 2 - 8] = norm * s.scale;
    }
  }

  // What each token is at each level of cuts (see Operands) and, kRecords, towards the chunk's start and end: to the records, of keys if `first`.
  template <bool kRecords>
  __device__ __forceinline__ void decayed(char* operands, const float* rk, const float* rq, const float* decay, char* record, char* query, bool first, int b,
                                          int lane) const {
    using O = Operands<D>;
    const BlockDecays<N> blocks(decay + N * lane, D, b);
    float F[N];
#pragma unroll
    for (int n = 0; n < N; ++n) F[n] = 1.f;
    const auto scaled = [&](char* to, const float (&x)[N], const float (&f)[N]) {
      float z[N];
#pragma unroll
      for (int n = 0; n < N; ++n) z[n] = x[n] * f[n];
      store_rounded(to, z);
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // behind the cuts: decayed from there on
      const int t = 8 * b + i;
      float x[N], y[N];
      unpack(x, k[i]);
      unpack(y, q[i]);
#pragma unroll
      for (int n = 0; n < N; ++n) F[n] *= a[i][n], x[n] *= F[n] * rk[t], y[n] *= F[n] * rq[t];
      if (O::behind(0, b)) {
        store_rounded(operands + O::keys(0) + row_place<D>(t, lane), x);
        store_rounded(operands + O::queries(0) + row_place<D>(O::query_row(0, b) + i, lane), y);
      }
      if (O::behind(1, b)) {
        scaled(operands + O::keys(1) + row_place<D>(t, lane), x, blocks.quarter);
        scaled(operands + O::queries(1) + row_place<D>(O::query_row(1, b) + i, lane), y, blocks.quarter);
      }
      if (O::behind(2, b)) {
        scaled(operands + O::keys(2) + row_place<D>(t, lane), x, blocks.middle);
        scaled(operands + O::queries(2) + row_place<D>(O::query_row(2, b) + i, lane), y, blocks.middle);
      }
      if constexpr (kRecords) {
        scaled(query + kTriangle + image_place<D>(t, lane), y, blocks.before);
        if (first) scaled(record + record_start(D) + image_place<D>(t, lane), x, blocks.before);
      }
    }
    if (kRecords && first && b == 7) {
#pragma unroll
      for (int n = 0; n < N; ++n) F[n] *= blocks.before[n];
      store_floats(reinterpret_cast<float*>(record + record_last()) + N * lane, F);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) F[n] = 1.f;
#pragma unroll
    for (int i = 7; i >= 0; --i) {  // before them: decayed up to there
      const int t = 8 * b + i;
      float x[N];
      unpack(x, k[i]);
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] *= F[n] * rk[t], F[n] *= a[i][n];
      if (!O::behind(0, b)) store_rounded(operands + O::keys(0) + row_place<D>(t, lane), x);
      if (!O::behind(1, b)) scaled(operands + O::keys(1) + row_place<D>(t, lane), x, blocks.quarter);
      if (!O::behind(2, b)) scaled(operands + O::keys(2) + row_place<D>(t, lane), x, blocks.middle);
      if constexpr (kRecords) {
        if (first) scaled(record + record_end(D) + image_place<D>(t, lane), x, blocks.after);
      }
    }
  }
};

}  // namespace oryx::kda_cuda
