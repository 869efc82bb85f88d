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

// A lane's N channels in bfloat16 to shared memory.
template <int N>
__device__ __forceinline__ void put_rounded(uint32_t to, const float (&x)[N]) {
  if constexpr (N == 4) asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(pack(x[0], x[1])), "r"(pack(x[2], x[3])) : "memory");
  else asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pack(x[0], x[1])) : "memory");
}

// Raw keys and queries, zero behind the sequence's end, and decays exp(g), one there. b, the block of eight tokens, is the same in all lanes and should be known to be so
// (__shfl_sync): branches on it are then cheap.
template <int D>
struct TokenBlock {
  static constexpr int N = D / 32;
  using O = Operands<D>;
  uint32_t k[8][N / 2], q[8][N / 2];
  float a[8][N];

  __device__ __forceinline__ void fetch(const Shape& s, const Work& w, const __nv_bfloat16* keys, const __nv_bfloat16* queries, const float* g, int b, int lane) {
    const int count = w.at.count - 8 * b;  // of this block
    const size_t token = w.at.token + (count > 0 ? 8 * b : 0);
    const __nv_bfloat16* const from_k = keys + (token * s.Hk + w.hk) * D + N * lane;
    const __nv_bfloat16* const from_q = queries + (token * s.Hq + w.hq) * D + N * lane;
    const float* const from_g = g + (token * s.Hs + w.hs) * D + N * lane;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i < count ? i : 0;
      load_words(k[i], from_k + row * (s.Hk * D));
      load_words(q[i], from_q + row * (s.Hq * D));
      load_floats(a[i], from_g + row * (s.Hs * D));
    }
  }
  // What fetch has brought, as described: apart from it, so that other copies can be started in between.
  __device__ __forceinline__ void finish(const Work& w, int b) {
    const int count = w.at.count - 8 * b;
    if (count < 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool valid = i < count;
#pragma unroll
        for (int n = 0; n < N / 2; ++n) k[i][n] = valid ? k[i][n] : 0u, q[i][n] = valid ? q[i][n] : 0u;
#pragma unroll
        for (int n = 0; n < N; ++n) a[i][n] = valid ? a[i][n] : 0.f;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int n = 0; n < N; ++n) a[i][n] = power2(a[i][n] * kLog2e);
  }
  __device__ __forceinline__ void load(const Shape& s, const Work& w, const __nv_bfloat16* keys, const __nv_bfloat16* queries, const float* g, int b, int lane) {
    fetch(s, w, keys, queries, g, b, lane);
    finish(w, b);
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

  // Normalised from here on, queries times scale, in bfloat16. Behind norms_and_decay and __syncwarp.
  __device__ __forceinline__ void normalise(const float* rk, const float* rq, int b) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float fk = rk[8 * b + i], fq = rq[8 * b + i];
#pragma unroll
      for (int n = 0; n < N / 2; ++n) k[i][n] = pack(fk * low(k[i][n]), fk * high(k[i][n])), q[i][n] = pack(fq * low(q[i][n]), fq * high(q[i][n]));
    }
  }

  static __device__ __forceinline__ void times(float (&to)[N], const uint32_t (&x)[N / 2], const float (&f)[N]) {
    unpack(to, x);
#pragma unroll
    for (int n = 0; n < N; ++n) to[n] *= f[n];
  }

  // The keys, and behind a cut the queries, of one level (see Operands); operands: their address in shared memory.
  template <int kLevel>
  __device__ __forceinline__ void level(uint32_t operands, const float (&between)[N], int b, int lane) const {
    const uint32_t at = lane * (D / 16), to = operands + 8 * b * O::kRow;
    float f[N];
#pragma unroll
    for (int n = 0; n < N; ++n) f[n] = between[n];
    if (O::behind(kLevel, b)) {
      const uint32_t other = (O::query_row(kLevel, b) - 8 * b) * O::kRow;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t from = to + (at ^ i << 4);
        float x[N];
#pragma unroll
        for (int n = 0; n < N; ++n) f[n] *= a[i][n];
        times(x, k[i], f);
        put_rounded(from + O::keys(kLevel) + i * O::kRow, x);
        times(x, q[i], f);
        put_rounded(from + other + O::queries(kLevel) + i * O::kRow, x);
      }
    } else {
#pragma unroll
      for (int i = 7; i >= 0; --i) {
        float x[N];
        times(x, k[i], f);
        put_rounded(to + (at ^ i << 4) + O::keys(kLevel) + i * O::kRow, x);
#pragma unroll
        for (int n = 0; n < N; ++n) f[n] *= a[i][n];
      }
    }
  }
  __device__ __forceinline__ void levels(uint32_t operands, const BlockDecays<N>& blocks, int b, int lane) const {
    float one[N];
#pragma unroll
    for (int n = 0; n < N; ++n) one[n] = 1.f;
    level<0>(operands, one, b, lane);
    level<1>(operands, blocks.quarter, b, lane);
    level<2>(operands, blocks.middle, b, lane);
  }

  // Decayed from the chunk's start (the query, and with the keys if `keys`) and to its end: to the records.
  __device__ __forceinline__ void records(char* record, char* query, bool keys, const BlockDecays<N>& blocks, int b, int lane) const {
    const int at = lane * (D / 16) % 128, block = lane * (D / 16) / 128 * kPanel + 8 * b * 128;
    char *const to_query = query + block, *const to_keys = record + keys_start(D) + block;
    float f[N];
#pragma unroll
    for (int n = 0; n < N; ++n) f[n] = blocks.before[n];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int from = (at ^ i << 4) + i * 128;
      float x[N];
#pragma unroll
      for (int n = 0; n < N; ++n) f[n] *= a[i][n];
      times(x, q[i], f);
      store_rounded(to_query + from, x);
      if (keys) {
        times(x, k[i], f);
        store_rounded(to_keys + from, x);
      }
    }
    if (!keys) return;
    if (b == 7) store_floats(reinterpret_cast<float*>(record) + N * lane, f);
#pragma unroll
    for (int n = 0; n < N; ++n) f[n] = blocks.after[n];
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      float x[N];
      times(x, k[i], f);
      store_rounded(to_keys + image_bytes(D) + (at ^ i << 4) + i * 128, x);
#pragma unroll
      for (int n = 0; n < N; ++n) f[n] *= a[i][n];
    }
  }
};

}  // namespace oryx::kda_cuda
