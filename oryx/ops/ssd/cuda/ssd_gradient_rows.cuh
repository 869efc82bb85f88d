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

// acc += y, sum += y.f with y = factor x (64 columns) and f the same rows and columns of `panel`.
__device__ __forceinline__ void add_and_dot(float* acc, const float (&x)[32], const float (&factor)[2], float (&sum)[2],
                                            uint32_t panel, int warp, int lane) {
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    uint32_t r[4];
    fragment(r, panel, kk, warp, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 8 * kk + 2 * i;
      const float y0 = factor[i % 2] * x[at], y1 = factor[i % 2] * x[at + 1];
      acc[at] += y0;
      acc[at + 1] += y1;
      sum[i % 2] += y0 * low(r[i]) + y1 * high(r[i]);
    }
  }
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

template <int kK>
__device__ __forceinline__ void query_rows(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base,
                                           const Barriers& bar, int warp, int lane) {
  using L = Layout<kK>;
  const int blocks = s.V / 64;
  float qk[32], w[32], dq[kK / 2];
  barrier_wait(bar.pair, 0);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kK / 16; ++kk)
    wgmma_64x64_shared(qk, descriptor(base + L::kQueries + kk / 4 * kPanel + kk % 4 * 32, 16, 1024),
                       descriptor(base + L::kKeys + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
  wgmma_commit();
#pragma unroll
  for (int i = 0; i < 32; ++i) w[i] = 0.f;
#pragma unroll
  for (int i = 0; i < kK / 2; ++i) dq[i] = 0.f;
  wgmma_wait<0>();
  keep(qk);

  float rows[2] = {0.f, 0.f}, skip = 0.f;
  for (int i = 0, vb = 0, head = 0; head < b.heads; ++i) {
    const int stage = i % kStages;
    const uint32_t at = base + stage * L::kStage, scalars = at + L::kScalars,
                   sums = base + L::kSums + head % 2 * kSumBytes;
    if (vb == 0 && head >= 2) barrier_wait(bar.sums_free + 8 * (head % 2), (head / 2 - 1) & 1);
    barrier_wait(bar.full + 8 * stage, (i / kStages) & 1);
    float dp[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
      wgmma_64x64_shared(dp, descriptor(at + L::kDo + 32 * kk, 16, 1024),
                         descriptor(at + L::kValues + 32 * kk, 16, 1024), kk > 0);
    wgmma_commit();
    const uint32_t row = 4 * (16 * warp + lane / 4), column = 8 * (lane % 4);
    const float G[2] = {load_shared(scalars + kG + row), load_shared(scalars + kG + row + 32)};
    const float gamma[2] = {power2(G[0]), power2(G[1])};
    float columns[16];
    wgmma_wait<0>();
    keep(dp);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 g = load_shared2(scalars + kG + 32 * n + column), d = load_shared2(scalars + kDt + 32 * n + column);
      columns[2 * n] = columns[2 * n + 1] = 0.f;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int t = 16 * warp + lane / 4 + 8 * h, j = 8 * n + 2 * (lane % 4) + e, m = 4 * n + 2 * h + e;
          const float weight = j <= t ? power2(G[h] - (e == 0 ? g.x : g.y)) * (e == 0 ? d.x : d.y) * dp[m] : 0.f;
          w[m] += weight;
          const float share = j < t ? weight * qk[m] : 0.f;
          rows[h] += share;
          columns[2 * n + e] += share;
          if (j == t) skip += dp[m];
        }
    }
    float x0[32], x1[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
      wgmma_64x64_shared_kn(x0, descriptor(at + L::kDo + 32 * kk, 16, 1024),
                            descriptor(at + L::kS + 2048 * kk, kPanel, 1024), kk > 0);
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
    if constexpr (kK == 128) {
      wgmma_wait<0>();
      keep(x0);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
        wgmma_64x64_shared_kn(x1, descriptor(at + L::kDo + 32 * kk, 16, 1024),
                              descriptor(at + L::kS + kPanel + 2048 * kk, kPanel, 1024), kk > 0);
      wgmma_commit();
      add_and_dot(dq, x0, gamma, rows, base + L::kQueries, warp, lane);
      wgmma_wait<0>();
      keep(x1);
      if (lane == 0) barrier_arrive(bar.empty + 8 * stage);
      add_and_dot(dq + 32, x1, gamma, rows, base + L::kQueries + kPanel, warp, lane);
    } else {
      wgmma_wait<0>();
      keep(x0);
      if (lane == 0) barrier_arrive(bar.empty + 8 * stage);
      add_and_dot(dq, x0, gamma, rows, base + L::kQueries, warp, lane);
    }
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
      if (lane == 0) barrier_arrive(bar.sums_full + 8 * ((head - 1) % 2));
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
  if (lane == 0) barrier_arrive(bar.w);
  keep(wb);
  float(&acc)[kK / 2] = dq;
  keep(acc);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    if constexpr (kK == 128)
      wgmma_64x128_kn(acc, wb + 4 * kk, descriptor(base + L::kKeys + 2048 * kk, kPanel, 1024), 1);
    else
      wgmma_64x64_kn(acc, wb + 4 * kk, descriptor(base + L::kKeys + 2048 * kk, kPanel, 1024), 1);
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(acc);
  keep(wb);
  const int heads = a.dq_part == nullptr ? s.Hq : s.Ho / b.heads,
            head = a.dq_part == nullptr ? b.first / (s.Ho / s.Hq) : b.unit;
  const size_t stride = static_cast<size_t>(heads) * kK, from = b.token * stride + static_cast<size_t>(head) * kK;
  write_rows<kK>(dq, a.d_q + from, a.dq_part == nullptr ? nullptr : a.dq_part + from, stride,
                 base + L::kOut + warp * 2048, b.count, warp, lane);
}

template <int kK>
__device__ __forceinline__ void key_rows(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base,
                                         const Barriers& bar, int warp, int lane) {
  using L = Layout<kK>;
  const int blocks = s.V / 64, readers = s.Ho / s.Hs;
  const uint32_t staging = base + L::kOut + kPanel + warp * 2048;
  float kq[32], dk[kK / 2];
  barrier_wait(bar.pair, 0);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kK / 16; ++kk)
    wgmma_64x64_shared(kq, descriptor(base + L::kKeys + kk / 4 * kPanel + kk % 4 * 32, 16, 1024),
                       descriptor(base + L::kQueries + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
  wgmma_commit();
#pragma unroll
  for (int i = 0; i < kK / 2; ++i) dk[i] = 0.f;
  wgmma_wait<0>();
  keep(kq);

  float tails[2] = {0.f, 0.f}, vdu[2] = {0.f, 0.f};
  for (int i = 0, vb = 0, head = 0; head < b.heads; ++i) {
    const int stage = i % kStages, ho = b.first + head, hs = ho / readers;
    const uint32_t at = base + stage * L::kStage, scalars = at + L::kScalars,
                   sums = base + L::kSums + head % 2 * kSumBytes;
    const float D = a.D[hs];
    if (vb == 0 && head >= 2) barrier_wait(bar.sums_free + 8 * (head % 2), (head / 2 - 1) & 1);
    barrier_wait(bar.full + 8 * stage, (i / kStages) & 1);
    float du[32], x0[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kK / 16; ++kk)
      wgmma_64x64_shared(du, descriptor(base + L::kKeys + kk / 4 * kPanel + kk % 4 * 32, 16, 1024),
                         descriptor(at + L::kDs + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
    wgmma_commit();
    const uint32_t row = 4 * (16 * warp + lane / 4), column = 8 * (lane % 4);
    const float G[2] = {load_shared(scalars + kG + row), load_shared(scalars + kG + row + 32)};
    const float dt[2] = {load_shared(scalars + kDt + row), load_shared(scalars + kDt + row + 32)},
                end = load_shared(scalars + kG + 252);
    // The state's own terms count once, with its first reader.
    const float once = ho % readers == 0 ? 1.f : 0.f, tail[2] = {once * power2(end - G[0]), once * power2(end - G[1])};
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
    for (int kk = 0; kk < 4; ++kk)
      wgmma_64x64_kn(du, pb + 4 * kk, descriptor(at + L::kDo + 2048 * kk, kPanel, 1024), 1);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
      wgmma_64x64_shared_kn(x0, descriptor(at + L::kValues + 32 * kk, 16, 1024),
                            descriptor(at + L::kDs + 2048 * kk, kPanel, 1024), kk > 0);
    wgmma_commit();
    wgmma_wait<1>();
    keep(du);
    keep(pb);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t v[4], d[4];
      fragment(v, at + L::kValues, kk, warp, lane);
      fragment(d, at + L::kDo, kk, warp, lane);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float &y0 = du[8 * kk + 2 * m], &y1 = du[8 * kk + 2 * m + 1];
        vdu[m % 2] += y0 * low(v[m]) + y1 * high(v[m]);
        y0 = dt[m % 2] * y0 + D * low(d[m]);
        y1 = dt[m % 2] * y1 + D * high(d[m]);
      }
    }
    {
      const int heads = a.dv_part == nullptr ? s.Hv : s.Ho, head_v = a.dv_part == nullptr ? hs / (s.Hs / s.Hv) : ho;
      const size_t stride = static_cast<size_t>(heads) * s.V,
                   from = b.token * stride + static_cast<size_t>(head_v) * s.V + 64 * vb;
      write_rows<64>(du, a.d_v + from, a.dv_part == nullptr ? nullptr : a.dv_part + from, stride, staging, b.count,
                     warp, lane);
    }
    wgmma_wait<0>();
    keep(x0);
    add_and_dot(dk, x0, step, tails, base + L::kKeys, warp, lane);
    if constexpr (kK == 128) {
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
        wgmma_64x64_shared_kn(x0, descriptor(at + L::kValues + 32 * kk, 16, 1024),
                              descriptor(at + L::kDs + kPanel + 2048 * kk, kPanel, 1024), kk > 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep(x0);
      add_and_dot(dk + 32, x0, step, tails, base + L::kKeys + kPanel, warp, lane);
    }
    if (lane == 0) barrier_arrive(bar.empty + 8 * stage);
    if (++vb == blocks) {
      vb = 0, ++head;
      sum_rows(tails);
      sum_rows(vdu);
      if (lane % 4 == 0) {
        store_shared(sums + 4 * kDTail + row, tails[0]);
        store_shared(sums + 4 * kDTail + row + 32, tails[1]);
        store_shared(sums + 4 * kVdu + row, vdu[0]);
        store_shared(sums + 4 * kVdu + row + 32, vdu[1]);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(bar.sums_full + 8 * ((head - 1) % 2));
      tails[0] = tails[1] = vdu[0] = vdu[1] = 0.f;
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
  float(&acc)[kK / 2] = dk;
  keep(wb);
  keep(acc);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    if constexpr (kK == 128)
      wgmma_64x128_kn(acc, wb + 4 * kk, descriptor(base + L::kQueries + 2048 * kk, kPanel, 1024), 1);
    else
      wgmma_64x64_kn(acc, wb + 4 * kk, descriptor(base + L::kQueries + 2048 * kk, kPanel, 1024), 1);
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(acc);
  keep(wb);
  const int heads = a.dk_part == nullptr ? s.Hk : s.Ho / b.heads,
            head = a.dk_part == nullptr ? b.first / readers / (s.Hs / s.Hk) : b.unit;
  const size_t stride = static_cast<size_t>(heads) * kK, from = b.token * stride + static_cast<size_t>(head) * kK;
  write_rows<kK>(dk, a.d_k + from, a.dk_part == nullptr ? nullptr : a.dk_part + from, stride, staging, b.count, warp,
                 lane);
}

}  // namespace
}  // namespace oryx::ssd_cuda
