// What of the backward pass needs no walk (see gated_delta_cuda.h): dQ, dK, dg and dbeta of one chunk and output head a block, from S0, dS1 and
// dV. Two warpgroups, each with 64 of the 128 columns: of V when U is made again, then of K. Two blocks share a multiprocessor, one computing
// while the other waits for its inputs; to fit, results take the place of operands that are spent (see Layout).
//
// With raw q and k and r = 1 / norm, the products are those of r dQ and r dK: the row and column factors r go into E and F once. Then
// dq = r dQ - q r^2 (q.r dQ), the gradient through the normalisation, needs no more than the dot products that dg takes too.
#include "gated_delta_walk.cuh"

namespace oryx::gated_delta_cuda {
namespace {

struct Layout {
  static constexpr int kState = 0;             // S0, then dS1
  static constexpr int kK = kStateBytes;       // then dk
  static constexpr int kQ = kK + 2 * kPanel;   // then dq
  static constexpr int kV = kQ + 2 * kPanel;   // then V - exp(G) K S0^T, then U
  static constexpr int kO = kV + 2 * kPanel;   // dO, then E in the first half, sums in the second
  static constexpr int kW = kO + 2 * kPanel;   // dV, then F in the first half
  static constexpr int kRows = kW + 2 * kPanel;  // G log2(e), 1 / |k|, 1 / |q|: 64 floats each
  static constexpr int kWhole = kRows + 768;     // <S0, dS1>: a float for each warp
  static constexpr int kBarriers = kWhole + 32;
  static constexpr int kBytes = kBarriers + 16;
  // Sums over half the columns, [two halves][64] floats each, in the second half of kO.
  static constexpr int kSumQ = kO + kPanel, kSumE = kSumQ + 512, kSumEnd = kSumE + 512, kSumK = kSumEnd + 512;
};
static_assert(2 * (Layout::kBytes + 1024) <= 228 * 1024);

struct Arguments {
  const float* g;
  const float* beta;
  const uint8_t* wanted;
  const char* record;
  const char* states;
  const char* d_states;
  __nv_bfloat16* d_q;  // [B, T, Ho, 128]
  __nv_bfloat16* d_k;  // [B, T, Ho, 128]
  float* d_g;          // [B, T, Ho]
  float* d_beta;       // [B, T, Hs]
};

__device__ __forceinline__ uint32_t load_word(uint32_t at) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(at) : "memory");
  return r;
}
__device__ __forceinline__ void store_word(uint32_t at, uint32_t x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
__device__ __forceinline__ void store_float(uint32_t at, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory"); }
__device__ __forceinline__ uint4 load_unit(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ void store_unit(uint32_t at, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ float dot(uint32_t a, uint32_t b) { return low(a) * low(b) + high(a) * high(b); }

// Where this thread's pair of columns 8 j + 2 (lane % 4) of row t lies in a panel.
__device__ __forceinline__ uint32_t pair_at(uint32_t panel, int t, int j, int lane) {
  return panel + t * 128 + ((j ^ (t & 7)) << 4) + lane % 4 * 4;
}
// Sums over the columns of a panel of d times the panel, rows t0 and t0 + 8, to `to` (64 floats).
__device__ __forceinline__ void row_dots(const float (&d)[32], uint32_t panel, int t0, uint32_t to, int lane) {
  float sum[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t x = load_word(pair_at(panel, t0 + 8 * h, j, lane));
      sum[h] += d[4 * j + 2 * h] * low(x) + d[4 * j + 2 * h + 1] * high(x);
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    if (lane % 4 == 0) store_float(to + 4 * (t0 + 8 * h), sum[h]);
  }
}

__global__ void __launch_bounds__(256, 2)
    backward_chunk_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap o_map,
                          const __grid_constant__ CUtensorMap w_map, const Shape s, const Arguments a) {
  using L = Layout;
  extern __shared__ __align__(1024) char raw_shared[];
  const uint32_t base = smem_address(raw_shared);  // aligned to 1024: nothing else is in shared memory
  if ((base & 1023) != 0) __trap();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, half = warp / 4;
  const int ho = blockIdx.x % s.Ho, chunk = blockIdx.x / s.Ho, groups = s.Ho / s.Hs, hs = ho / groups;
  const auto [token, count] = place(s, chunk);
  if (count == 0) return;
  const size_t record = static_cast<size_t>(chunk) * s.Hs + hs;
  const char* const rows = a.record + record * kRecordBytes;
  const float first = ho % groups == 0 ? 1.f : 0.f;  // what the state head has but once is this block's
  const uint32_t bar = base + L::kBarriers;

  if (thread == 0) {
    barrier_init(bar, 1);
    barrier_init(bar + 8, 1);
    barrier_init_fence();
    const int hk = hs / (s.Hs / s.Hk), hv = hs / (s.Hs / s.Hv), hq = ho / (s.Ho / s.Hq);
    barrier_expect(bar, kStateBytes + 4 * kPanel);
    bulk_load(base + L::kState, a.states + record * kStateBytes, kStateBytes, bar);
    barrier_expect(bar + 8, 6 * kPanel);
    for (int p = 0; p < 2; ++p) tensor_load(base + L::kK + p * kPanel, &k_map, bar, 0, hk, token, p);
    for (int p = 0; p < 2; ++p) tensor_load(base + L::kV + p * kPanel, &v_map, bar, 0, hv, token, p);
    for (int p = 0; p < 2; ++p) tensor_load(base + L::kO + p * kPanel, &o_map, bar + 8, 0, ho, token, p);
    for (int p = 0; p < 2; ++p) tensor_load(base + L::kW + p * kPanel, &w_map, bar + 8, 0, hs, token, p);
    for (int p = 0; p < 2; ++p) tensor_load(base + L::kQ + p * kPanel, &q_map, bar + 8, 0, hq, token, p);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.d_states + record * kStateBytes), "r"(kStateBytes) : "memory");
  }
  if (thread < 128) store_float(base + L::kRows + 4 * thread, reinterpret_cast<const float*>(rows + kRecordRows)[128 + thread]);

  const int t0 = 16 * (warp % 4) + lane / 4;  // this thread's rows (tokens): this one and 8 further on
  const int column = 2 * (lane % 4);          // and its columns: this one and the next of every eight
  uint32_t tb[16];                            // T
#pragma unroll
  for (int kk = 0; kk < 4; ++kk)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = t0 + i % 2 * 8;
      tb[4 * kk + i] = *reinterpret_cast<const uint32_t*>(rows + kRecordT + t * 128 + (((2 * kk + i / 2) ^ (t & 7)) << 4) + lane % 4 * 4);
    }
  __syncthreads();
  const uint32_t at_G = base + L::kRows, at_rk = at_G + 256, at_rq = at_G + 512;
  float G[2], rk[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) G[h] = load_shared(at_G + 4 * (t0 + 8 * h)), rk[h] = load_shared(at_rk + 4 * (t0 + 8 * h));
  barrier_wait(bar, 0);
  if (count < kC || a.wanted != nullptr) {
    barrier_wait(bar + 8, 0);
    if (count < kC) {
      clear_rows(base + L::kK, 10, count, thread, 256);  // K, Q, V, dO, dV
    }
    if (a.wanted != nullptr) {
      const int t = thread / 4;
      if (t < count && a.wanted[token + t] == 0)
#pragma unroll
        for (int i = 0; i < 4; ++i) store_unit(base + L::kO + thread % 4 / 2 * kPanel + t * 128 + thread % 2 * 64 + i * 16, make_uint4(0, 0, 0, 0));
    }
    fence_async_proxy();
    __syncthreads();
  }

  float x[32];
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 8; ++kk)
    wgmma_ss<0, 0>(x, descriptor_nk(base + L::kK, kk, kPanel), descriptor_nk(base + L::kState + half * 64 * 128, kk, kStatePanel), kk > 0);
  wgmma_commit();
  barrier_wait(bar + 8, 0);
  {
    // 1 / |q|: four threads a row.
    const int t = thread / 4, part = thread % 4;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 u = load_unit(base + L::kQ + part / 2 * kPanel + t * 128 + (part % 2 * 4 + (i + t) % 4) * 16);
      sum += dot(u.x, u.x) + dot(u.y, u.y) + dot(u.z, u.z) + dot(u.w, u.w);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (part == 0) store_float(at_rq + 4 * t, rsqrtf(sum + s.l2_eps));
  }
  wgmma_wait<0>();
  keep(x);

  // X = V - exp(G) K S0^T in V's place, then U = T X in X's.
  const uint32_t mine = base + L::kV + half * kPanel;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float e = power2(G[h]) * rk[h];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t at = pair_at(mine, t0 + 8 * h, j, lane), v = load_word(at);
      store_word(at, pack(low(v) - e * x[4 * j + 2 * h], high(v) - e * x[4 * j + 2 * h + 1]));
    }
  }
  fence_async_proxy();
  named_barrier(1 + half, 128);
  keep(tb);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) wgmma_rs_kn(x, tb + 4 * kk, descriptor_kn(mine, kk), kk > 0);
  wgmma_commit();
  wgmma_wait<0>();
  keep(x);
  keep(tb);
  named_barrier(1 + half, 128);
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) store_word(pair_at(mine, t0 + 8 * h, j, lane), pack(x[4 * j + 2 * h], x[4 * j + 2 * h + 1]));
  fence_async_proxy();
  __syncthreads();

  // The first warpgroup: E from dO U^T. The second: F and dbeta from dV U^T.
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 8; ++kk)
    wgmma_ss<0, 0>(x, descriptor_nk(base + (half == 0 ? L::kO : L::kW), kk, kPanel), descriptor_nk(base + L::kV, kk, kPanel), kk > 0);
  wgmma_commit();
  float rq[2], scaled[2];  // of its rows: 1 / |q|; the factor of E or F
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rq[h] = load_shared(at_rq + 4 * (t0 + 8 * h));
    scaled[h] = half == 0 ? s.scale * rq[h] : -first * rk[h];
  }
  wgmma_wait<0>();
  keep(x);
  uint32_t eb[16];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 g = load_shared2(at_G + 4 * (8 * j + column)), r = load_shared2(at_rk + 4 * (8 * j + column));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = t0 + 8 * h, last = t - half;  // the last column that counts
      const float x0 = x[4 * j + 2 * h], x1 = x[4 * j + 2 * h + 1];
      eb[2 * j + h] = pack(8 * j + column <= last ? scaled[h] * r.x * power2(G[h] - g.x) * x0 : 0.f,
                           8 * j + column + 1 <= last ? scaled[h] * r.y * power2(G[h] - g.y) * x1 : 0.f);
      if (half == 1 && first != 0.f && t / 2 == 4 * j + lane % 4 && t < count) {
        const size_t i = static_cast<size_t>(token + t) * s.Hs + hs;
        float b = a.beta[i];
        if (fabsf(b) < 1e-12f) b = 1e-12f;
        a.d_beta[i] = (t % 2 == 0 ? x0 : x1) / b / b;
      }
    }
  }

  // r dQ = scale exp(G) r dO S0 + E K, r e = F K - exp(G) r dV S0
  float q[32], k[32];
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 8; ++kk)
    wgmma_ss<0, 1>(q, descriptor_nk(base + L::kO, kk, kPanel), descriptor_kn(base + L::kState + half * kStatePanel, kk), kk > 0);
#pragma unroll
  for (int kk = 0; kk < 8; ++kk)
    wgmma_ss<0, 1>(k, descriptor_nk(base + L::kW, kk, kPanel), descriptor_kn(base + L::kState + half * kStatePanel, kk), kk > 0);
  wgmma_commit();
  wgmma_wait<0>();
  keep(q);
  keep(k);
  __syncthreads();  // dO, dV and S0 are spent
  const uint32_t at_e = base + (half == 0 ? L::kO : L::kW);
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) store_word(pair_at(at_e, t0 + 8 * h, j, lane), eb[2 * j + h]);
  {
    float whole = 0.f;
    const char* const from = a.d_states + record * kStateBytes;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      uint4 d[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) d[m] = *reinterpret_cast<const uint4*>(from + (256 * (i + m) + thread) * 16);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t at = base + L::kState + (256 * (i + m) + thread) * 16;
        const uint4 u = load_unit(at);
        whole += dot(u.x, d[m].x) + dot(u.y, d[m].y) + dot(u.z, d[m].z) + dot(u.w, d[m].w);
        store_unit(at, d[m]);
      }
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) whole += __shfl_xor_sync(~0u, whole, d);
    if (lane == 0) store_float(base + L::kWhole + 4 * warp, whole);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float e = power2(G[h]), fq = s.scale * e * rq[h], fk = -first * e * rk[h];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      q[4 * j + 2 * h] *= fq;
      q[4 * j + 2 * h + 1] *= fq;
      k[4 * j + 2 * h] *= fk;
      k[4 * j + 2 * h + 1] *= fk;
    }
  }
  fence_async_proxy();
  __syncthreads();
  keep(q);
  keep(k);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) wgmma_ss<0, 1>(q, descriptor_nk(base + L::kO, kk, kPanel), descriptor_kn(base + L::kK + half * kPanel, kk), 1);
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) wgmma_ss<0, 1>(k, descriptor_nk(base + L::kW, kk, kPanel), descriptor_kn(base + L::kK + half * kPanel, kk), 1);
  wgmma_commit();
  wgmma_wait<0>();
  keep(q);
  keep(k);

  // r w = E^T Q + F^T K + exp(G_C - G) r U dS1 joins r e; the sums over columns that dg and the normalisation take are made on the way.
  const uint32_t my_q = base + L::kQ + half * kPanel, my_k = base + L::kK + half * kPanel;
  row_dots(k, my_k, t0, base + L::kSumE + 256 * half, lane);
  keep(k);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) wgmma_ss<1, 1>(k, descriptor_kn(base + L::kO, kk), descriptor_kn(my_q, kk), 1);
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) wgmma_ss<1, 1>(k, descriptor_kn(base + L::kW, kk), descriptor_kn(my_k, kk), 1);
  wgmma_commit();
  row_dots(q, my_q, t0, base + L::kSumQ + 256 * half, lane);
  __syncthreads();
  uint32_t dq[16];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = t0 + 8 * h;
    const float f = (load_shared(base + L::kSumQ + 4 * t) + load_shared(base + L::kSumQ + 256 + 4 * t)) * rq[h] * rq[h];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t u = load_word(pair_at(my_q, t, j, lane));
      dq[2 * j + h] = pack(q[4 * j + 2 * h] - low(u) * f, q[4 * j + 2 * h + 1] - high(u) * f);
    }
  }
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 8; ++kk)
    wgmma_ss<0, 1>(x, descriptor_nk(base + L::kV, kk, kPanel), descriptor_kn(base + L::kState + half * kStatePanel, kk), kk > 0);
  wgmma_commit();
  wgmma_wait<0>();
  keep(x);
  keep(k);
  const float G_end = load_shared(at_G + 4 * 63);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float f = t0 + 8 * h < count ? first * power2(G_end - G[h]) * rk[h] : 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[4 * j + 2 * h] *= f;
      x[4 * j + 2 * h + 1] *= f;
      k[4 * j + 2 * h] += x[4 * j + 2 * h];
      k[4 * j + 2 * h + 1] += x[4 * j + 2 * h + 1];
    }
  }
  row_dots(x, my_k, t0, base + L::kSumEnd + 256 * half, lane);
  row_dots(k, my_k, t0, base + L::kSumK + 256 * half, lane);
  __syncthreads();  // Q, K and the sums are whole
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = t0 + 8 * h;
    const float f = (load_shared(base + L::kSumK + 4 * t) + load_shared(base + L::kSumK + 256 + 4 * t)) * rk[h] * rk[h];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t at = pair_at(my_k, t, j, lane), u = load_word(at);
      store_word(at, pack(k[4 * j + 2 * h] - low(u) * f, k[4 * j + 2 * h + 1] - high(u) * f));
      store_word(pair_at(my_q, t, j, lane), dq[2 * j + h]);
    }
  }
  named_barrier(1 + half, 128);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int t = 16 * i + thread % 128 / 8, unit = thread % 8;
    if (t < count) {
      const size_t to = (static_cast<size_t>(token + t) * s.Ho + ho) * kD + half * 64 + unit * 8;
      const uint32_t at = t * 128 + ((unit ^ (t & 7)) << 4);
      *reinterpret_cast<uint4*>(a.d_q + to) = load_unit(my_q + at);
      *reinterpret_cast<uint4*>(a.d_k + to) = load_unit(my_k + at);
    }
  }
  if (warp == 0) {
    const auto sum = [&](int which) {  // of this lane's two tokens
      const float2 x0 = load_shared2(base + which + 8 * lane), x1 = load_shared2(base + which + 256 + 8 * lane);
      return make_float2(x0.x + x1.x, x0.y + x1.y);
    };
    const float2 dq_sum = sum(L::kSumQ), e = sum(L::kSumE), end = sum(L::kSumEnd), dk_sum = sum(L::kSumK);
    float after = (dq_sum.x + 2.f * e.x - dk_sum.x) + (dq_sum.y + 2.f * e.y - dk_sum.y), own = after, ends = end.x + end.y;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float other = __shfl_down_sync(~0u, after, d);
      if (lane + d < 32) after += other;
      ends += __shfl_xor_sync(~0u, ends, d);
    }
    float whole = 0.f;
#pragma unroll
    for (int w = 0; w < 8; ++w) whole += load_shared(base + L::kWhole + 4 * w);
    const float last = first * power2(G_end) * whole + ends;
    const float d0 = after + last, d1 = d0 - own + (dq_sum.y + 2.f * e.y - dk_sum.y);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane + i;
      if (t < count) {
        const bool decayed = a.g[static_cast<size_t>(token + t) * s.Hs + hs] <= -100.f;
        a.d_g[static_cast<size_t>(token + t) * s.Ho + ho] = decayed ? 0.f : i == 0 ? d0 : d1;
      }
    }
  }
}

struct Sum {
  __device__ static void add(float (&sum)[8], const uint4& x) {
    const uint32_t u[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[2 * i] += low(u[i]), sum[2 * i + 1] += high(u[i]);
  }
};

// 8 bfloat16 a thread.
__global__ void sum_heads_kernel(const uint4* from, uint4* to, int64_t n, int heads, int count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int64_t unit = i % (kD / 8), head = i / (kD / 8) % heads, row = i / (kD / 8) / heads;
  float sum[8] = {};
  for (int c = 0; c < count; ++c) Sum::add(sum, from[((row * heads + head) * count + c) * (kD / 8) + unit]);
  to[i] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
}
__global__ void sum_heads_kernel(const float* from, float* to, int64_t n, int count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int c = 0; c < count; ++c) sum += from[i * count + c];
  to[i] = sum;
}

}  // namespace

cudaError_t launch_backward_chunk(const OryxGatedDelta& p, const OryxGatedDeltaGradients& d, const Shape& s, int records, const CUtensorMap* maps,
                                  const char* record, const char* states, const char* d_states, void* d_q, void* d_k, float* d_g,
                                  cudaStream_t stream) {
  if (records == 0) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(backward_chunk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kBytes);
  if (status != cudaSuccess) return status;
  const Arguments a{p.g, p.beta, p.wanted, record, states, d_states, static_cast<__nv_bfloat16*>(d_q), static_cast<__nv_bfloat16*>(d_k), d_g, d.d_beta};
  backward_chunk_kernel<<<records * s.Ho, 256, Layout::kBytes, stream>>>(maps[0], maps[1], maps[2], maps[3], maps[4], s, a);
  return cudaGetLastError();
}

cudaError_t launch_sum_heads(const void* from, void* to, int64_t rows, int heads, int count, bool wide, cudaStream_t stream) {
  const int64_t n = rows * heads * (wide ? 1 : kD / 8), blocks = (n + 255) / 256;
  if (blocks == 0) return cudaSuccess;
  if (wide) sum_heads_kernel<<<blocks, 256, 0, stream>>>(static_cast<const float*>(from), static_cast<float*>(to), n, count);
  else sum_heads_kernel<<<blocks, 256, 0, stream>>>(static_cast<const uint4*>(from), static_cast<uint4*>(to), n, heads, count);
  return cudaGetLastError();
}

}  // namespace oryx::gated_delta_cuda
