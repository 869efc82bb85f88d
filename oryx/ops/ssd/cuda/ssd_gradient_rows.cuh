// The two warpgroups of the gradients' kernel that compute (see ssd_gradients.cu): tokens as rows t, and tokens as rows
// j.
#pragma once

#include "oryx/ops/ssd/cuda/ssd_gradients.cuh"

namespace oryx::ssd_cuda {
namespace {

// 16 bytes of a fragment: 16 columns of the warp's 16 rows of a panel.
__device__ __forceinline__ void fragment(uint32_t (&r)[4], uint32_t panel, int kk, int warp, int lane) {
  const int row = 16 * warp + lane % 16;
  load_matrix(r, panel + row * 128 + (((2 * kk + lane / 16) ^ (row & 7)) << 4));
}

// acc += factor x (64 columns), sum += weight x.f with f the same rows and columns of `panel`.
__device__ __forceinline__ void add_and_dot(float* acc, const float (&x)[32], const float (&factor)[2],
                                            const float (&weight)[2], float (&sum)[2], uint32_t panel, int warp,
                                            int lane) {
  float dot[2] = {0.f, 0.f};
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    uint32_t r[4];
    fragment(r, panel, kk, warp, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 8 * kk + 2 * i;
      acc[at] = fmaf(factor[i % 2], x[at], acc[at]);
      acc[at + 1] = fmaf(factor[i % 2], x[at + 1], acc[at + 1]);
      dot[i % 2] = fmaf(x[at], low(r[i]), fmaf(x[at + 1], high(r[i]), dot[i % 2]));
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = fmaf(weight[h], dot[h], sum[h]);
}

// Sums over the four lanes of a row.
__device__ __forceinline__ void sum_rows(float (&x)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    x[h] += __shfl_xor_sync(~0u, x[h], 1);
    x[h] += __shfl_xor_sync(~0u, x[h], 2);
  }
}

// 64 rows of kK columns, in bfloat16 or as float32 shares.
template <int kK>
__device__ __forceinline__ void write_rows(const float* acc, __nv_bfloat16* out, float* part, size_t stride,
                                           uint32_t staging, int count, int warp, int lane) {
#pragma unroll
  for (int p = 0; p < kK / 64; ++p) {
    if (part == nullptr) {
      uint32_t ob[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) ob[i] = pack(acc[32 * p + 2 * i], acc[32 * p + 2 * i + 1]);
      store_out(ob, staging, out + 64 * p, stride, ~0ull, count, warp, lane);
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int t = 16 * warp + lane / 4 + 8 * h;
          if (t < count)
            *reinterpret_cast<float2*>(part + t * stride + 64 * p + 8 * n + 2 * (lane % 4)) =
                make_float2(acc[32 * p + 4 * n + 2 * h], acc[32 * p + 4 * n + 2 * h + 1]);
        }
    }
  }
}

// d = the product of two tiles of 64 tokens, a b^T.
template <int kK>
__device__ __forceinline__ void start_product(float (&d)[32], uint32_t a, uint32_t b) {
  const uint32_t low_a = descriptor_low(a), low_b = descriptor_low(b);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kK / 16; ++kk) wgmma_64x64_shared(d, panel_nk(low_a, kk), panel_nk(low_b, kk), kk > 0);
  wgmma_commit();
}

// acc += w times the 64 rows of a tile: what is left of dQ and dK.
template <int kK>
__device__ __forceinline__ void add_product(float (&acc)[kK / 2], uint32_t (&w)[16], uint32_t tile) {
  keep(w);
  keep(acc);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    if constexpr (kK == 128)
      wgmma_64x128_kn(acc, w + 4 * kk, descriptor(tile + 2048 * kk, kPanel, 1024), 1);
    else
      wgmma_64x64_kn(acc, w + 4 * kk, descriptor(tile + 2048 * kk, kPanel, 1024), 1);
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(acc);
  keep(w);
}

// A block's dQ or dK: of `head`, one of `heads`, or, where there is `part`, its share.
template <int kK>
__device__ __forceinline__ void write_keys(const float* acc, const Block& b, __nv_bfloat16* out, float* part, int heads,
                                           int head, uint32_t staging, int warp, int lane) {
  const size_t stride = static_cast<size_t>(heads) * kK, from = b.token * stride + static_cast<size_t>(head) * kK;
  write_rows<kK>(acc, out + from, part == nullptr ? nullptr : part + from, stride, staging, b.count, warp, lane);
}

template <int kK>
__device__ __forceinline__ void query_rows(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base,
                                           const Barriers& bar, int warp, int lane) {
  using L = Layout<kK>;
  const int blocks = s.V / 64;
  float qk[32], w[32], dq[kK / 2];
  barrier_wait(bar.pair, 0);
  start_product<kK>(qk, base + L::kQueries, base + L::kKeys);
#pragma unroll
  for (int i = 0; i < 32; ++i) w[i] = 0.f;
#pragma unroll
  for (int i = 0; i < kK / 2; ++i) dq[i] = 0.f;
  wgmma_wait<0>();
  keep(qk);

  const uint32_t low_base = descriptor_low(base);
  float rows[2] = {0.f, 0.f}, skip = 0.f;
  for (int i = 0, vb = 0, head = 0; head < b.heads; ++i) {
    const int stage = i % kStages;
    const uint32_t at = base + stage * L::kStage, low_at = low_base + stage * (L::kStage / 16),
                   scalars = at + L::kScalars, sums = base + L::kSums + head % 2 * kSumBytes;
    if (vb == 0 && head >= 2) barrier_wait(bar.sums_free + 8 * (head % 2), (head / 2 - 1) & 1);
    barrier_wait(bar.full + 8 * stage, (i / kStages) & 1);
    float dp[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
      wgmma_64x64_shared(dp, panel_nk(low_at + L::kDo / 16, kk), panel_nk(low_at + L::kValues / 16, kk), kk > 0);
    wgmma_commit();
    const uint32_t row = 4 * (16 * warp + lane / 4), column = 8 * (lane % 4);
    const float G[2] = {load_shared(scalars + kG + row), load_shared(scalars + kG + row + 32)};
    const float gamma[2] = {power2(G[0]), power2(G[1])};
    float columns[16];
    wgmma_wait<0>();
    keep(dp);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 g = load_shared2(scalars + kG + 32 * n + column), dt = load_shared2(scalars + kDt + 32 * n + column);
      columns[2 * n] = columns[2 * n + 1] = 0.f;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int t = 16 * warp + lane / 4 + 8 * h, j = 8 * n + 2 * (lane % 4) + e, m = 4 * n + 2 * h + e;
          const float weight = j <= t ? power2(G[h] - (e == 0 ? g.x : g.y)) * dp[m] : 0.f, share = weight * qk[m];
          w[m] = fmaf(weight, e == 0 ? dt.x : dt.y, w[m]);
          rows[h] = fmaf(share, e == 0 ? dt.x : dt.y, rows[h]);
          columns[2 * n + e] += share;
        }
      if (n / 2 == warp && lane / 8 == lane % 4)  // the diagonal
        skip += lane / 4 % 2 == 0 ? dp[4 * n + 2 * (n % 2)] : dp[4 * n + 2 * (n % 2) + 1];
    }
    float x0[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
      wgmma_64x64_shared_kn(x0, panel_nk(low_at + L::kDo / 16, kk), panel_kn(low_at + L::kS / 16, kk), kk > 0);
    wgmma_commit();
    // Column sums over the eight rows of lanes: each exchange halves what a lane has left, 2 lane and 2 lane + 1 in the
    // end.
#pragma unroll
    for (int d = 16, left = 8; d >= 4; d /= 2, left /= 2) {
      const bool upper = (lane & d) != 0;
#pragma unroll
      for (int m = 0; m < 8; ++m)
        if (m < left) {
          const float give = upper ? columns[m] : columns[m + left], mine = upper ? columns[m + left] : columns[m];
          columns[m] = mine + __shfl_xor_sync(~0u, give, d);
        }
    }
    {
      const uint32_t to = sums + 4 * (kColumn + 64 * warp + 2 * lane);
      const float2 before = vb == 0 ? make_float2(0.f, 0.f) : load_shared2(to);
      store_shared2(to, before.x + columns[0], before.y + columns[1]);
    }
    wgmma_wait<0>();
    keep(x0);
    add_and_dot(dq, x0, gamma, gamma, rows, base + L::kQueries, warp, lane);
    if constexpr (kK == 128) {
      keep(x0);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
        wgmma_64x64_shared_kn(x0, panel_nk(low_at + L::kDo / 16, kk), panel_kn(low_at + (L::kS + kPanel) / 16, kk),
                              kk > 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep(x0);
      add_and_dot(dq + 32, x0, gamma, gamma, rows, base + L::kQueries + kPanel, warp, lane);
    }
    barrier_arrive_warp(bar.empty + 8 * stage, lane);
    if (++vb == blocks) {
      vb = 0, ++head;
      sum_rows(rows);
      if (lane % 4 == 0) {
        store_shared(sums + 4 * kRow + row, rows[0]);
        store_shared(sums + 4 * kRow + row + 32, rows[1]);
      }
#pragma unroll
      for (int d = 16; d >= 1; d /= 2) skip += __shfl_xor_sync(~0u, skip, d);
      if (lane == 0) store_shared(sums + 4 * (kSkip + warp), skip);
      __syncwarp();
      barrier_arrive_warp(bar.sums_full + 8 * ((head - 1) % 2), lane);
      rows[0] = rows[1] = skip = 0.f;
    }
  }

  // dQ += W K; W in bfloat16 is left for the other warpgroup.
  uint32_t wb[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) wb[i] = pack(w[2 * i], w[2 * i + 1]);
  const int r = 16 * warp + lane % 16;
#pragma unroll
  for (int kk = 0; kk < 4; ++kk)
    store_matrix(base + L::kW + r * 128 + (((2 * kk + lane / 16) ^ (r & 7)) << 4), wb[4 * kk], wb[4 * kk + 1],
                 wb[4 * kk + 2], wb[4 * kk + 3]);
  __syncwarp();
  barrier_arrive_warp(bar.w, lane);
  add_product<kK>(dq, wb, base + L::kKeys);
  const bool whole = a.dq_part == nullptr;
  write_keys<kK>(dq, b, a.d_q, a.dq_part, whole ? s.Hq : s.Ho / b.heads, whole ? b.first / (s.Ho / s.Hq) : b.unit,
                 base + L::kOut + warp * 2048, warp, lane);
}

template <int kK>
__device__ __forceinline__ void key_rows(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base,
                                         const Barriers& bar, int warp, int lane) {
  using L = Layout<kK>;
  const int blocks = s.V / 64, readers = s.Ho / s.Hs;
  const uint32_t staging = base + L::kOut + kPanel + warp * 2048;
  float kq[32], dk[kK / 2];
  barrier_wait(bar.pair, 0);
  start_product<kK>(kq, base + L::kKeys, base + L::kQueries);
#pragma unroll
  for (int i = 0; i < kK / 2; ++i) dk[i] = 0.f;
  wgmma_wait<0>();
  keep(kq);

  const uint32_t low_base = descriptor_low(base);
  float tails[2] = {0.f, 0.f};
  // dV, or its shares: [B T, Ho, V] either way, since they are shares unless Hv = Ho.
  const size_t from_v = (static_cast<size_t>(b.token) * s.Ho + b.first) * s.V;
  for (int i = 0, vb = 0, head = 0; head < b.heads; ++i) {
    const int stage = i % kStages;
    const uint32_t at = base + stage * L::kStage, low_at = low_base + stage * (L::kStage / 16),
                   scalars = at + L::kScalars, sums = base + L::kSums + head % 2 * kSumBytes;
    if (vb == 0 && head >= 2) barrier_wait(bar.sums_free + 8 * (head % 2), (head / 2 - 1) & 1);
    barrier_wait(bar.full + 8 * stage, (i / kStages) & 1);
    float du[32], x0[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kK / 16; ++kk)
      wgmma_64x64_shared(du, panel_nk(low_base + L::kKeys / 16, kk), panel_nk(low_at + L::kDs / 16, kk), kk > 0);
    wgmma_commit();
    const uint32_t row = 4 * (16 * warp + lane / 4), column = 8 * (lane % 4);
    const float G[2] = {load_shared(scalars + kG + row), load_shared(scalars + kG + row + 32)};
    const float dt[2] = {load_shared(scalars + kDt + row), load_shared(scalars + kDt + row + 32)},
                end = load_shared(scalars + kG + 252);
    // The state's own terms count once, with its first reader.
    const float once = load_shared(scalars + kSkipRate + 4),
                tail[2] = {once * power2(end - G[0]), once * power2(end - G[1])};
    const float step[2] = {tail[0] * dt[0], tail[1] * dt[1]};
    uint32_t pb[16];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 g = load_shared2(scalars + kG + 32 * n + column);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = 16 * warp + lane / 4 + 8 * h, t = 8 * n + 2 * (lane % 4);
        pb[2 * n + h] = pack(j <= t ? power2(g.x - G[h]) * kq[4 * n + 2 * h] : 0.f,
                             j <= t + 1 ? power2(g.y - G[h]) * kq[4 * n + 2 * h + 1] : 0.f);
      }
    }
    wgmma_wait<0>();
    keep(du);
#pragma unroll
    for (int m = 0; m < 32; ++m) du[m] *= tail[m / 2 % 2];
    keep(du);
    keep(pb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64_kn(du, pb + 4 * kk, panel_kn(low_at + L::kDo / 16, kk), 1);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
      wgmma_64x64_shared_kn(x0, panel_nk(low_at + L::kValues / 16, kk), panel_kn(low_at + L::kDs / 16, kk), kk > 0);
    wgmma_commit();
    wgmma_wait<1>();
    keep(du);
    keep(pb);
    const float D = load_shared(scalars + kSkipRate);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t d[4];
      fragment(d, at + L::kDo, kk, warp, lane);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float &y0 = du[8 * kk + 2 * m], &y1 = du[8 * kk + 2 * m + 1];
        y0 = dt[m % 2] * y0 + D * low(d[m]);
        y1 = dt[m % 2] * y1 + D * high(d[m]);
      }
    }
    // Made anew for every item: addresses that are kept from one to the next push others out of registers.
    uint32_t stride = s.Ho * s.V;
    size_t from = from_v + 64 * i;
    asm volatile("" : "+r"(stride), "+l"(from));
    write_rows<64>(du, a.d_v + from, a.dv_part == nullptr ? nullptr : a.dv_part + from, stride, staging, b.count, warp,
                   lane);
    wgmma_wait<0>();
    keep(x0);
    add_and_dot(dk, x0, step, tail, tails, base + L::kKeys, warp, lane);
    if constexpr (kK == 128) {
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
        wgmma_64x64_shared_kn(x0, panel_nk(low_at + L::kValues / 16, kk), panel_kn(low_at + (L::kDs + kPanel) / 16, kk),
                              kk > 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep(x0);
      add_and_dot(dk + 32, x0, step, tail, tails, base + L::kKeys + kPanel, warp, lane);
    }
    barrier_arrive_warp(bar.empty + 8 * stage, lane);
    if (++vb == blocks) {
      vb = 0, ++head;
      sum_rows(tails);
      if (lane % 4 == 0) {
        store_shared(sums + 4 * kDTail + row, tails[0]);
        store_shared(sums + 4 * kDTail + row + 32, tails[1]);
      }
      __syncwarp();
      barrier_arrive_warp(bar.sums_full + 8 * ((head - 1) % 2), lane);
      tails[0] = tails[1] = 0.f;
    }
  }

  // dK += W^T Q
  barrier_wait(bar.w, 0);
  uint32_t wb[16];
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    const int t = 16 * kk + lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
    uint32_t r[4];
    load_matrix_transposed(r, base + L::kW + t * 128 + ((unit ^ (t & 7)) << 4));
#pragma unroll
    for (int m = 0; m < 4; ++m) wb[4 * kk + m] = r[m];
  }
  add_product<kK>(dk, wb, base + L::kQueries);
  const bool whole = a.dk_part == nullptr;
  write_keys<kK>(dk, b, a.d_k, a.dk_part, whole ? s.Hk : s.Ho / b.heads,
                 whole ? b.first / readers / (s.Hs / s.Hk) : b.unit, staging, warp, lane);
}

}  // namespace
}  // namespace oryx::ssd_cuda
