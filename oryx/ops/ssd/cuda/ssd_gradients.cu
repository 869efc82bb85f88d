// The gradients of a chunk, all chunks at once (see ssd_cuda.h). A block has one chunk and a run of output heads that share a key head and a query
// head; it goes through the heads, 64 value columns at a time. One warpgroup has the tokens as rows t (queries): dQ and the sum of W over the
// heads; one has them as rows j (keys): dK and dV. Of the third one warp copies the inputs in, one computes the scalars, one the product of S0 and
// dS, and one puts the shares of the decay's gradient together.
//
// The decay's gradient at token m sums every weight whose segment contains m: with M = P dP below the diagonal,
//   sum_{t >= m} (row sum of M + d gamma)_t - sum_{j >= m} (column sum of M)_j + sum_{j < m} d tail_j + d end.
// Row and column sums add the same numbers, so that what cancels does so to float32's digits of M.
#include "oryx/ops/ssd/cuda/ssd_backward.cuh"

namespace oryx::ssd_cuda {
namespace {

constexpr int kStages = 3;
// Sums of a head, in floats: row sums, column sums of four warps, d tail, v.du; then the sum of dS S0 and four shares of dD.
constexpr int kRow = 0, kColumn = 64, kDTail = 320, kVdu = 384, kEnd = 448, kSkip = 452, kSumBytes = 2048;

template <int kK>
struct Layout {
  static constexpr int kPanels = kK / 64;
  static constexpr int kDo = 0;  // of a stage
  static constexpr int kValues = kPanel;
  static constexpr int kS = 2 * kPanel;
  static constexpr int kDs = kS + kPanels * kPanel;
  static constexpr int kScalars = kDs + kPanels * kPanel;
  static constexpr int kStage = kScalars + kScalarBytes;
  static constexpr int kQueries = kStages * kStage;
  static constexpr int kKeys = kQueries + kPanels * kPanel;
  static constexpr int kW = kKeys + kPanels * kPanel;
  static constexpr int kOut = kW + kPanel;  // a panel for each of two warpgroups
  static constexpr int kSums = kOut + 2 * kPanel;
  static constexpr int kBarriers = kSums + 2 * kSumBytes;
  static constexpr int kBytes = kBarriers + 16 * kStages + 64 + 1024;  // and what aligning the start to 1024 may take
};

struct Barriers {
  uint32_t full, empty, sums_full, sums_free, pair, w, aside;
  __device__ __forceinline__ explicit Barriers(uint32_t at)
      : full(at), empty(at + 8 * kStages), sums_full(empty + 8 * kStages), sums_free(sums_full + 16), pair(sums_free + 16), w(pair + 8), aside(w + 8) {}
};

// The work of a block: heads [first, first + heads), each in V / 64 items.
struct Block {
  int record, token, count;  // the chunk: its number, first token, tokens
  int unit, first, heads;
};

// 16 bytes of a fragment: 16 columns of the warp's 16 rows of a panel.
__device__ __forceinline__ void fragment(uint32_t (&r)[4], uint32_t panel, int kk, int warp, int lane) {
  const int row = 16 * warp + lane % 16;
  load_matrix(r, panel + row * 128 + (((2 * kk + lane / 16) ^ (row & 7)) << 4));
}

// acc += y, sum += y.f with y = factor x (64 columns) and f the same rows and columns of `panel`.
__device__ __forceinline__ void add_and_dot(float* acc, const float (&x)[32], const float (&factor)[2], float (&sum)[2], uint32_t panel, int warp, int lane) {
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
__device__ __forceinline__ void write_rows(const float* acc, __nv_bfloat16* out, float* part, size_t stride, uint32_t staging, int count, int warp, int lane) {
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
            *reinterpret_cast<float2*>(part + t * stride + 64 * p + 8 * n + 2 * (lane % 4)) = make_float2(acc[32 * p + 4 * n + 2 * h], acc[32 * p + 4 * n + 2 * h + 1]);
        }
    }
  }
}

template <int kK>
__device__ __forceinline__ void query_rows(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base, const Barriers& bar, int warp, int lane) {
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
    const uint32_t at = base + stage * L::kStage, scalars = at + L::kScalars, sums = base + L::kSums + head % 2 * kSumBytes;
    if (vb == 0 && head >= 2) barrier_wait(bar.sums_free + 8 * (head % 2), (head / 2 - 1) & 1);
    barrier_wait(bar.full + 8 * stage, (i / kStages) & 1);
    float dp[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64_shared(dp, descriptor(at + L::kDo + 32 * kk, 16, 1024), descriptor(at + L::kValues + 32 * kk, 16, 1024), kk > 0);
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
      wgmma_64x64_shared_kn(x0, descriptor(at + L::kDo + 32 * kk, 16, 1024), descriptor(at + L::kS + 2048 * kk, kPanel, 1024), kk > 0);
    wgmma_commit();
    // Column sums over the eight rows of lanes: each exchange halves what a lane has left, 2 lane and 2 lane + 1 in the end.
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
        wgmma_64x64_shared_kn(x1, descriptor(at + L::kDo + 32 * kk, 16, 1024), descriptor(at + L::kS + kPanel + 2048 * kk, kPanel, 1024), kk > 0);
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
    store_matrix(base + L::kW + r * 128 + (((2 * kk + lane / 16) ^ (r & 7)) << 4), wb[4 * kk], wb[4 * kk + 1], wb[4 * kk + 2], wb[4 * kk + 3]);
  __syncwarp();
  if (lane == 0) barrier_arrive(bar.w);
  keep(wb);
  float(&acc)[kK / 2] = dq;
  keep(acc);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    if constexpr (kK == 128) wgmma_64x128_kn(acc, wb + 4 * kk, descriptor(base + L::kKeys + 2048 * kk, kPanel, 1024), 1);
    else wgmma_64x64_kn(acc, wb + 4 * kk, descriptor(base + L::kKeys + 2048 * kk, kPanel, 1024), 1);
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(acc);
  keep(wb);
  const int heads = a.dq_part == nullptr ? s.Hq : s.Ho / b.heads, head = a.dq_part == nullptr ? b.first / (s.Ho / s.Hq) : b.unit;
  const size_t stride = static_cast<size_t>(heads) * kK, from = b.token * stride + static_cast<size_t>(head) * kK;
  write_rows<kK>(dq, a.d_q + from, a.dq_part == nullptr ? nullptr : a.dq_part + from, stride, base + L::kOut + warp * 2048, b.count, warp, lane);
}

template <int kK>
__device__ __forceinline__ void key_rows(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base, const Barriers& bar, int warp, int lane) {
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
    const uint32_t at = base + stage * L::kStage, scalars = at + L::kScalars, sums = base + L::kSums + head % 2 * kSumBytes;
    const float D = a.D[hs];
    if (vb == 0 && head >= 2) barrier_wait(bar.sums_free + 8 * (head % 2), (head / 2 - 1) & 1);
    barrier_wait(bar.full + 8 * stage, (i / kStages) & 1);
    float du[32], x0[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kK / 16; ++kk)
      wgmma_64x64_shared(du, descriptor(base + L::kKeys + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), descriptor(at + L::kDs + kk / 4 * kPanel + kk % 4 * 32, 16, 1024),
                         kk > 0);
    wgmma_commit();
    const uint32_t row = 4 * (16 * warp + lane / 4), column = 8 * (lane % 4);
    const float G[2] = {load_shared(scalars + kG + row), load_shared(scalars + kG + row + 32)};
    const float dt[2] = {load_shared(scalars + kDt + row), load_shared(scalars + kDt + row + 32)}, end = load_shared(scalars + kG + 252);
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
        pb[2 * n + h] = pack(j <= t ? power2(g.x - G[h]) * kq[4 * n + 2 * h] : 0.f, j <= t + 1 ? power2(g.y - G[h]) * kq[4 * n + 2 * h + 1] : 0.f);
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
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64_kn(du, pb + 4 * kk, descriptor(at + L::kDo + 2048 * kk, kPanel, 1024), 1);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
      wgmma_64x64_shared_kn(x0, descriptor(at + L::kValues + 32 * kk, 16, 1024), descriptor(at + L::kDs + 2048 * kk, kPanel, 1024), kk > 0);
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
      const size_t stride = static_cast<size_t>(heads) * s.V, from = b.token * stride + static_cast<size_t>(head_v) * s.V + 64 * vb;
      write_rows<64>(du, a.d_v + from, a.dv_part == nullptr ? nullptr : a.dv_part + from, stride, staging, b.count, warp, lane);
    }
    wgmma_wait<0>();
    keep(x0);
    add_and_dot(dk, x0, step, tails, base + L::kKeys, warp, lane);
    if constexpr (kK == 128) {
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
        wgmma_64x64_shared_kn(x0, descriptor(at + L::kValues + 32 * kk, 16, 1024), descriptor(at + L::kDs + kPanel + 2048 * kk, kPanel, 1024), kk > 0);
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
    if constexpr (kK == 128) wgmma_64x128_kn(acc, wb + 4 * kk, descriptor(base + L::kQueries + 2048 * kk, kPanel, 1024), 1);
    else wgmma_64x64_kn(acc, wb + 4 * kk, descriptor(base + L::kQueries + 2048 * kk, kPanel, 1024), 1);
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(acc);
  keep(wb);
  const int heads = a.dk_part == nullptr ? s.Hk : s.Ho / b.heads, head = a.dk_part == nullptr ? b.first / readers / (s.Hs / s.Hk) : b.unit;
  const size_t stride = static_cast<size_t>(heads) * kK, from = b.token * stride + static_cast<size_t>(head) * kK;
  write_rows<kK>(dk, a.d_k + from, a.dk_part == nullptr ? nullptr : a.dk_part + from, stride, staging, b.count, warp, lane);
}

// One warp: q and k of the chunk, then each item's dO, v, S0 and dS.
template <int kK>
__device__ __forceinline__ void copy_in(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base, const Barriers& bar, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map, const CUtensorMap* d_map, int lane) {
  using L = Layout<kK>;
  const int blocks = s.V / 64, readers = s.Ho / s.Hs;
  const uint64_t all = first_rows(b.count), wanted = wanted_rows(a.wanted, b.token, b.count, lane);
  const bool whole = wanted == ~0ull;  // else rows are cleared: what is not of the sequence, or not wanted, counts for nothing
  uint32_t phase = 0;
  const uint32_t pair = whole ? bar.pair : bar.aside;
  if (lane == 0) {
    barrier_expect(pair, 2 * L::kPanels * kPanel);
    for (int p = 0; p < L::kPanels; ++p) {
      tensor_load(base + L::kQueries + p * kPanel, q_map, pair, 0, b.first / (s.Ho / s.Hq), b.token, p);
      tensor_load(base + L::kKeys + p * kPanel, k_map, pair, 0, b.first / readers / (s.Hs / s.Hk), b.token, p);
    }
  }
  if (!whole) {
    barrier_wait(bar.aside, phase), phase ^= 1;
    clear_rows(base + L::kQueries, L::kPanels, wanted, lane);
    clear_rows(base + L::kKeys, L::kPanels, all, lane);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) barrier_arrive(bar.pair);
  }
  for (int i = 0; i < b.heads * blocks; ++i) {
    const int stage = i % kStages, ho = b.first + i / blocks, hs = ho / readers, vb = i % blocks;
    const uint32_t at = base + stage * L::kStage, done = whole ? bar.full + 8 * stage : bar.aside;
    if (i >= kStages) barrier_wait(bar.empty + 8 * stage, (i / kStages - 1) & 1);
    if (lane == 0) {
      const size_t record = (static_cast<size_t>(b.record) * s.Hs + hs) * blocks + vb;
      barrier_expect(done, L::kScalars - (wanted == 0 ? kPanel : 0));
      if (wanted != 0) tensor_load(at + L::kDo, d_map, done, 0, ho, b.token, vb);
      tensor_load(at + L::kValues, v_map, done, 0, hs / (s.Hs / s.Hv), b.token, vb);
      bulk_load(at + L::kS, a.states[0] + record * 64 * kK, L::kPanels * kPanel, done);
      bulk_load(at + L::kDs, a.states[1] + record * 64 * kK, L::kPanels * kPanel, done);
    }
    if (!whole) {
      barrier_wait(bar.aside, phase), phase ^= 1;
      clear_rows(at + L::kDo, 1, wanted, lane);
      clear_rows(at + L::kValues, 1, all, lane);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) barrier_arrive(bar.full + 8 * stage);
    }
  }
}

// One warp: exp(G_C) times the sum of S0 dS, a head at a time.
template <int kK>
__device__ __forceinline__ void state_products(const Shape& s, const Block& b, uint32_t base, const Barriers& bar, int lane) {
  using L = Layout<kK>;
  const int blocks = s.V / 64, readers = s.Ho / s.Hs;
  float sum[2] = {0.f, 0.f};
  for (int i = 0; i < b.heads * blocks; ++i) {
    const int stage = i % kStages, head = i / blocks;
    const uint32_t at = base + stage * L::kStage;
    barrier_wait(bar.full + 8 * stage, (i / kStages) & 1);
#pragma unroll 2
    for (int m = 0; m < L::kPanels * kPanel / 512; ++m) {
      uint32_t x[4], y[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at + L::kS + 512 * m + 16 * lane) : "memory");
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3]) : "r"(at + L::kDs + 512 * m + 16 * lane) : "memory");
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[0] += low(x[c]) * low(y[c]);
        sum[1] += high(x[c]) * high(y[c]);
      }
    }
    const float gamma = load_shared(at + L::kScalars + kGamma + 252);
    __syncwarp();
    if (lane == 0) barrier_arrive(bar.empty + 8 * stage);
    if (i % blocks == blocks - 1) {
      float x = sum[0] + sum[1];
#pragma unroll
      for (int d = 16; d >= 1; d /= 2) x += __shfl_xor_sync(~0u, x, d);
      if (head >= 2) barrier_wait(bar.sums_free + 8 * (head % 2), (head / 2 - 1) & 1);
      if (lane == 0) {
        store_shared(base + L::kSums + head % 2 * kSumBytes + 4 * kEnd, (b.first + head) % readers == 0 ? gamma * x : 0.f);
        barrier_arrive(bar.sums_full + 8 * (head % 2));
      }
      sum[0] = sum[1] = 0.f;
    }
  }
}

// One warp: the gradient of dt_raw of a head at a time, and the chunk's share of those of dt_bias, A_log and D.
template <int kK>
__device__ __forceinline__ void step_gradients(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base, const Barriers& bar, int lane) {
  using L = Layout<kK>;
  const int readers = s.Ho / s.Hs;
  for (int head = 0; head < b.heads; ++head) {
    const int ho = b.first + head, hs = ho / readers;
    const float2 raw = load_steps(a.dt_raw, s.Hs, hs, b.token, b.count, lane);
    const float bias = a.dt_bias[hs], rate = log2_rate(a.A_log[hs]), A = rate / kLog2e;
    const uint32_t sums = base + L::kSums + head % 2 * kSumBytes;
    barrier_wait(bar.sums_full + 8 * (head % 2), (head / 2) & 1);
    float2 x = load_shared2(sums + 4 * kRow + 8 * lane);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 c = load_shared2(sums + 4 * (kColumn + 64 * w) + 8 * lane);
      x.x -= c.x;
      x.y -= c.y;
    }
    const float2 tail = load_shared2(sums + 4 * kDTail + 8 * lane), vdu = load_shared2(sums + 4 * kVdu + 8 * lane);
    const float end = load_shared(sums + 4 * kEnd);
    float skip = lane < 4 ? load_shared(sums + 4 * (kSkip + lane)) : 0.f;
    __syncwarp();
    if (lane == 0) barrier_arrive(bar.sums_free + 8 * (head % 2));
    float after = x.x + x.y, before = tail.x + tail.y;  // sums from this lane on, and up to it
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float u = __shfl_down_sync(~0u, after, d), v = __shfl_up_sync(~0u, before, d);
      if (lane + d < 32) after += u;
      if (lane >= d) before += v;
    }
    before = __shfl_up_sync(~0u, before, 1);
    if (lane == 0) before = 0.f;
    float later = __shfl_down_sync(~0u, after, 1);
    if (lane == 31) later = 0.f;
    float dx[2], sum_x = 0.f, sum_a = 0.f;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float z = (e == 0 ? raw.x : raw.y) + bias, dt = softplus(z);
      float da = e == 0 ? x.x + x.y + later + before + end : x.y + later + before + tail.x + end;
      if (dt * rate < -150.f) da = 0.f;  // such a decay is 0, and so is its derivative
      dx[e] = ((e == 0 ? vdu.x : vdu.y) + A * da) / (1.f + __expf(-z));
      if (2 * lane + e < b.count) {
        a.d_step[static_cast<size_t>(b.token + 2 * lane + e) * s.Ho + ho] = dx[e];
        sum_x += dx[e];
        sum_a += dt * da;
      }
    }
#pragma unroll
    for (int d = 16; d >= 1; d /= 2) {
      sum_x += __shfl_xor_sync(~0u, sum_x, d);
      sum_a += __shfl_xor_sync(~0u, sum_a, d);
      skip += __shfl_xor_sync(~0u, skip, d);
    }
    if (lane < 3) a.head_part[(static_cast<size_t>(lane) * s.Ho + ho) * a.records + b.record] = lane == 0 ? sum_x : lane == 1 ? A * sum_a : skip;
  }
}

template <int kK>
__global__ void __launch_bounds__(384, 1)
    gradient_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                    const __grid_constant__ CUtensorMap d_map, const Shape s, const GradientArguments a) {
  using L = Layout<kK>;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const Barriers bar(base + L::kBarriers);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;

  Block b;
  const int units = s.Ho / a.heads;
  b.unit = blockIdx.x % units, b.record = blockIdx.x / units, b.first = b.unit * a.heads, b.heads = a.heads;
  if (s.cu_seqlens == nullptr) {
    const int chunks = (s.T + kC - 1) / kC, n = b.record / chunks, c = b.record % chunks;
    b.token = n * s.T + c * kC;
    b.count = min(kC, s.T - c * kC);
  } else {
    if (b.record >= a.chunk_offsets[s.N]) return;
    int lo = 0, hi = s.N;  // the last sequence whose first chunk is at or before this one
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (a.chunk_offsets[mid] <= b.record ? lo : hi) = mid;
    }
    const Sequence seq = sequence(s, lo);
    const int c = b.record - a.chunk_offsets[lo];
    b.token = seq.begin + c * kC;
    b.count = min(kC, seq.length - c * kC);
  }

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(bar.full + 8 * i, 2);
      barrier_init(bar.empty + 8 * i, 9);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(bar.sums_full + 8 * i, 9);
      barrier_init(bar.sums_free + 8 * i, 1);
    }
    barrier_init(bar.pair, 1);
    barrier_init(bar.w, 4);
    barrier_init(bar.aside, 1);
    barrier_init_fence();
  }
  __syncthreads();

  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (warp == 0) {
      copy_in<kK>(s, a, b, base, bar, &q_map, &k_map, &v_map, &d_map, lane);
    } else if (warp == 1) {
      const int blocks = s.V / 64, readers = s.Ho / s.Hs;
      loaded_ahead(
          b.heads * blocks,
          [&](int i) {
            const int hs = (b.first + i / blocks) / readers;
            const float2 raw = load_steps(a.dt_raw, s.Hs, hs, b.token, b.count, lane);
            return make_float4(raw.x, raw.y, a.dt_bias[hs], a.A_log[hs]);
          },
          [&](int i, float4 x) {
            const int stage = i % kStages;
            if (i >= kStages) barrier_wait(bar.empty + 8 * stage, (i / kStages - 1) & 1);
            chunk_scalars(base + stage * L::kStage + L::kScalars, make_float2(x.x, x.y), x.z, log2_rate(x.w), b.count, lane);
            __syncwarp();
            if (lane == 0) barrier_arrive(bar.full + 8 * stage);
          });
    } else if (warp == 2) {
      state_products<kK>(s, b, base, bar, lane);
    } else {
      step_gradients<kK>(s, a, b, base, bar, lane);
    }
  } else if (group == 0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    query_rows<kK>(s, a, b, base, bar, warp, lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    key_rows<kK>(s, a, b, base, bar, warp, lane);
  }
}

template <int kK>
cudaError_t launch(const Shape& s, const GradientArguments& a, const CUtensorMap* maps, cudaStream_t stream) {
  auto* kernel = gradient_kernel<kK>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<kK>::kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<a.records*(s.Ho / a.heads), 384, Layout<kK>::kBytes, stream>>>(maps[2], maps[0], maps[1], maps[3], s, a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gradients(const Shape& s, const GradientArguments& a, const CUtensorMap* maps, cudaStream_t stream) {
  return s.K == 128 ? launch<128>(s, a, maps, stream) : launch<64>(s, a, maps, stream);
}

}  // namespace oryx::ssd_cuda
