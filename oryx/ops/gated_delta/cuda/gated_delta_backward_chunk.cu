// What of the backward pass needs no walk (see gated_delta_cuda.h): dQ, dK, dg and dbeta of one chunk and output head at a time, from S0, dS1 and
// dV. It is bound by memory, so a block stays on its multiprocessor and a warp copies the inputs of the next chunk in while four warpgroups
// work on this one; results take the place of operands that are spent (see Layout). Each warpgroup makes 32 columns of U; then the first two
// have dQ and half of dK's terms, the other two the rest of dK, each for 64 columns.
//
// With raw q and k and r = 1 / norm, the products are those of r dQ and r dK: the row and column factors r go into E and F once. Then
// dq = r dQ - q r^2 (q.r dQ), the gradient through the normalisation, needs no more than the dot products that dg takes too.
#include "gated_delta_tile.cuh"
#include "oryx/ops/cuda/dependent_launch.cuh"

namespace oryx::gated_delta_cuda {
namespace {

struct Layout {
  static constexpr int kThreads = 640;  // a warp of the last 128 copies; registers are traded
  static constexpr int kWarps = 16;
  // One of two sets: the inputs of a chunk by token.
  static constexpr int kK = 0;           // then dk
  static constexpr int kQ = 2 * kPanel;  // then dq
  static constexpr int kV = 4 * kPanel;  // then V - exp(G) K S0^T, then U, then half of r dK
  static constexpr int kO = 6 * kPanel;  // dO, then E in the first half, sums in the second
  static constexpr int kW = 8 * kPanel;  // dV, then F in the first half
  static constexpr int kSet = 10 * kPanel;
  static constexpr int kS0 = 2 * kSet;
  static constexpr int kS1 = kS0 + kStateBytes;    // dS1
  static constexpr int kRows = kS1 + kStateBytes;  // of each set: G log2(e), 1 / |k|: 64 floats each
  static constexpr int kNorms = kRows + 1024;      // 1 / |q|
  static constexpr int kWhole = kNorms + 256;      // <S0, dS1>: a float for each warp
  static constexpr int kItem = kWhole + 64;        // of each set: first token, tokens, output head, state head, record; token -1: no more
  static constexpr int kBarriers = kItem + 64;
  static constexpr int kBytes = kBarriers + 80;
  // Sums over half the columns, [two halves][64] floats each.
  static constexpr int kSumQ = kO + kPanel, kSumE = kSumQ + 512, kSumEnd = kSumE + 512, kSumK = kSumEnd + 512;  // kSumK: four
};
static_assert(Layout::kBytes <= 227 * 1024);

struct Arguments {
  const uint8_t* wanted;
  const char* record;
  const char* states;
  const char* d_states;
  const int32_t* order;  // [records] chunks
  uint32_t* done;        // [records, Hs] row blocks of dV and dS1 that are written, then the next item to be taken
  int row_blocks, records;
  __nv_bfloat16* d_q;  // [B, T, Ho, 128]
  __nv_bfloat16* d_k;  // [B, T, Ho, 128]
  float* d_g;          // [B, T, Ho]
  float* d_beta;       // [B, T, Hs]
};

// Which chunk and heads work item `index` is.
struct Item {
  int chunk, ho, hs, record;
  __device__ Item(const Shape& s, const int32_t* order, int index)
      : chunk(order[index / s.Ho]), ho(index % s.Ho), hs(ho / (s.Ho / s.Hs)), record(chunk * s.Hs + hs) {}
};

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}

// dg of a chunk by one warp, two tokens a lane.
__device__ __forceinline__ void store_decay_gradient(uint32_t at, uint32_t at_G, uint32_t at_whole, float first, int token, int count, int ho, int Ho,
                                                     float* d_g, int lane) {
  const auto sum = [&](int which) {
    const float2 x0 = load_shared2(at + which + 8 * lane), x1 = load_shared2(at + which + 256 + 8 * lane);
    return make_float2(x0.x + x1.x, x0.y + x1.y);
  };
  const float2 q = sum(Layout::kSumQ), e = sum(Layout::kSumE), end = sum(Layout::kSumEnd), k0 = sum(Layout::kSumK), k1 = sum(Layout::kSumK + 512);
  const float own0 = q.x + 2.f * e.x - (k0.x + k1.x), own1 = q.y + 2.f * e.y - (k0.y + k1.y);
  float after = own0 + own1, ends = end.x + end.y;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_down_sync(~0u, after, d);
    if (lane + d < 32) after += other;
    ends += __shfl_xor_sync(~0u, ends, d);
  }
  float whole = lane < Layout::kWarps ? load_shared(at_whole + 4 * lane) : 0.f;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) whole += __shfl_xor_sync(~0u, whole, d);
  const float last = first * power2(load_shared(at_G + 4 * 63)) * whole + ends;
  const float2 G = load_shared2(at_G + 8 * lane);
  const float before = lane == 0 ? 0.f : load_shared(at_G + 8 * lane - 4);
  constexpr float kLeast = -99.9f * kLog2e;  // what is decayed to nothing has no gradient, not that of the rounding of sums
  float* const to = d_g + static_cast<size_t>(token + 2 * lane) * Ho + ho;
  if (2 * lane < count) to[0] = G.x - before < kLeast ? 0.f : after + last;
  if (2 * lane + 1 < count) to[Ho] = G.y - G.x < kLeast ? 0.f : after - own0 + last;
}

__global__ void __launch_bounds__(Layout::kThreads, 1)
    backward_chunk_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap o_map,
                          const __grid_constant__ CUtensorMap w_map, const Shape s, const Arguments a) {
  using L = Layout;
  extern __shared__ __align__(1024) char raw_shared[];
  const uint32_t base = smem_address(raw_shared);  // aligned to 1024: nothing else is in shared memory
  if ((base & 1023) != 0) __trap();
  const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
  const int total = (s.cu_seqlens == nullptr ? s.N * s.chunks : s.chunk_offsets[s.N]) * s.Ho;
  // Barriers: the sets' K and V there, their dO, dV and Q there, the sets free; S0 there, free; dS1 there, free.
  const uint32_t full_a = base + L::kBarriers, full_b = full_a + 16, empty = full_b + 16, full_s0 = empty + 16, empty_s0 = full_s0 + 8,
                 full_s1 = empty_s0 + 8, empty_s1 = full_s1 + 8;
  if (thread == 0) {
    for (int i = 0; i < 4; ++i) barrier_init(full_a + 8 * i, 1);
    for (int i = 0; i < 2; ++i) barrier_init(empty + 8 * i, L::kWarps * kWarpArrivals);
    barrier_init(full_s0, 1);
    barrier_init(empty_s0, L::kWarps * kWarpArrivals);
    barrier_init(full_s1, 1);
    barrier_init(empty_s1, L::kWarps * kWarpArrivals);
    barrier_init_fence();
  }
  if (s.D < kD) {  // what is not in memory
    for (int i = thread; i < 2 * kStateBytes / 16; i += L::kThreads) store_unit(base + L::kS0 + 16 * i, make_uint4(0, 0, 0, 0));
    fence_async_proxy();
  }
  __syncthreads();

  if (warp >= L::kWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp > L::kWarps || lane != 0) return;
    uint32_t* const counter = a.done + static_cast<size_t>(a.records) * s.Hs;
    int next = atomicAdd(counter, 1);
    for (int i = 0;; ++i) {
      const int index = next;
      if (i >= 2) barrier_wait(empty + 8 * (i % 2), (i / 2 - 1) & 1);
      if (index >= total) {
        store_word(base + L::kItem + 32 * (i % 2), ~0u);
        barrier_arrive(full_a + 8 * (i % 2));
        break;
      }
      next = atomicAdd(counter, 1);
      const Item item(s, a.order, index);
      const auto [token, count] = place(s, item.chunk);
      const int set = i % 2, hk = item.hs / (s.Hs / s.Hk), hv = item.hs / (s.Hs / s.Hv), hq = item.ho / (s.Ho / s.Hq);
      const uint32_t at = base + set * L::kSet, a_bar = full_a + 8 * set, b_bar = full_b + 8 * set;
      const uint32_t at_item = base + L::kItem + 32 * set;
      store_word(at_item, token);
      store_word(at_item + 4, count);
      store_word(at_item + 8, item.ho);
      store_word(at_item + 12, item.hs);
      store_word(at_item + 16, item.record);
      barrier_expect(a_bar, 4 * kPanel + 512);
      for (int p = 0; p < 2; ++p) tensor_load(at + L::kK + p * kPanel, &k_map, a_bar, 0, hk, token, p, kEvictFirst);
      for (int p = 0; p < 2; ++p) tensor_load(at + L::kV + p * kPanel, &v_map, a_bar, 0, hv, token, p, kEvictFirst);
      bulk_load(base + L::kRows + 512 * set, a.record + static_cast<size_t>(item.record) * kRecordBytes + kRecordRows + 512, 512, a_bar, kEvictFirst);
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.record + static_cast<size_t>(item.record) * kRecordBytes), "r"(kRecordRows)
                   : "memory");  // T
      barrier_expect(b_bar, 6 * kPanel);
      for (int p = 0; p < 2; ++p) tensor_load(at + L::kQ + p * kPanel, &q_map, b_bar, 0, hq, token, p, kEvictFirst);
      for (int p = 0; p < 2; ++p) tensor_load(at + L::kO + p * kPanel, &o_map, b_bar, 0, item.ho, token, p, kEvictFirst);
      while (load_acquire(a.done + item.record) < a.row_blocks) __nanosleep(100);
      asm volatile("fence.proxy.async;" ::: "memory");
      for (int p = 0; p < 2; ++p) tensor_load(at + L::kW + p * kPanel, &w_map, b_bar, 0, item.hs, token, p, kEvictFirst);
      if (i >= 1) barrier_wait(empty_s0, (i - 1) & 1);
      barrier_expect(full_s0, state_bytes(s.D));
      bulk_load(base + L::kS0, a.states + static_cast<size_t>(item.record) * state_bytes(s.D), state_bytes(s.D), full_s0, kEvictFirst);
      if (i >= 1) barrier_wait(empty_s1, (i - 1) & 1);
      barrier_expect(full_s1, state_bytes(s.D));
      bulk_load(base + L::kS1, a.d_states + static_cast<size_t>(item.record) * state_bytes(s.D), state_bytes(s.D), full_s1, kEvictFirst);
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
  const int part = warp / 4, side = part / 2, half = part % 2;
  const int t0 = 16 * (warp % 4) + lane / 4;  // this thread's rows (tokens): this one and 8 further on
  const int column = 2 * (lane % 4);          // and its columns: this one and the next of every eight
  const uint32_t my_rows = tile_rows(warp, lane);
  uint32_t tb[16];  // T
  const auto load_T = [&](int64_t record) {
    const char* const from = a.record + record * kRecordBytes + 4 * lane;
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * (warp % 4) + i % 2, at = 2 * kk + i / 2;  // the tile
        tb[4 * kk + i] = at <= row ? *reinterpret_cast<const uint32_t*>(from + record_tile(row, at)) : 0;
      }
  };
  const uint32_t low_s0 = descriptor_low(base + L::kS0), low_s1 = descriptor_low(base + L::kS1);

  for (int i = 0;; ++i) {
    const int set = i % 2;
    const uint32_t at = base + set * L::kSet, at_G = base + L::kRows + 512 * set, at_rk = at_G + 256, at_rq = base + L::kNorms;
    const uint32_t at_item = base + L::kItem + 32 * set;
    barrier_wait(full_a + 8 * set, i / 2 & 1);
    const int token = load_word(at_item);
    if (token < 0) break;
    const int count = load_word(at_item + 4), ho = load_word(at_item + 8), hs = load_word(at_item + 12);
    const float first = ho == hs * (s.Ho / s.Hs) ? 1.f : 0.f;  // what the state head has but once is this item's
    const bool unwanted = a.wanted != nullptr && thread / 8 < count && a.wanted[token + thread / 8] == 0;
    float G[2], rk[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) G[h] = load_shared(at_G + 4 * (t0 + 8 * h)), rk[h] = load_shared(at_rk + 4 * (t0 + 8 * h));
    if (count < kC) {
      barrier_wait(full_b + 8 * set, i / 2 & 1);
      clear_rows(at, 10, count, thread, 512);
      fence_async_proxy();
      named_barrier(1, 512);
      // racecheck now and then misses this barrier for one warp or two (docs/benchmarks/2026-11-26-cuda-checks.md): it is given a second one.
      if constexpr (kForSanitizer) named_barrier(7, 512);
    }
    load_T(load_word(at_item + 16));
    barrier_wait(full_s0, i & 1);

    const uint32_t low = descriptor_low(at);  // of this set; + bytes / 16
    float x[16];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 8; ++kk)
      wgmma_64x32_ss(x, tile_nk(low + L::kK / 16, kk, kPanel), tile_nk(low_s0 + part * (32 * 128 / 16), kk, kStatePanel), kk > 0);
    wgmma_commit();
    barrier_wait(full_b + 8 * set, i / 2 & 1);
    {
      // 1 / |q|, eight threads a row; and rows of dO that are not wanted become zero.
      const int t = thread / 8, eighth = thread % 8;
      const uint32_t unit = at + eighth / 4 * kPanel + t * 128 + eighth % 4 * 32;
      float sum = 0.f;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint4 u = load_unit(unit + L::kQ + 16 * m);
        sum = dot(u.x, u.x, dot(u.y, u.y, dot(u.z, u.z, dot(u.w, u.w, sum))));
        if (unwanted) store_unit(unit + L::kO + 16 * m, make_uint4(0, 0, 0, 0));
      }
#pragma unroll
      for (int d = 1; d < 8; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (eighth == 0) store_float(at_rq + 4 * t, rsqrtf(sum + s.l2_eps));
    }
    wgmma_wait<0>();
    keep(x);

    // X = V - exp(G) K S0^T in V's place, then U = T X in X's.
    const uint32_t at_x = (at + L::kV + part / 2 * kPanel + my_rows) ^ (part % 2 << 6);
    {
      const float e[2] = {power2(G[0]) * rk[0], power2(G[1]) * rk[1]};
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t v[4];
        load_tile(v, at_x, j);
#pragma unroll
        for (int m = 0; m < 4; ++m) v[m] = pack(hopper::low(v[m]) - e[m % 2] * x[4 * j + 2 * m], high(v[m]) - e[m % 2] * x[4 * j + 2 * m + 1]);
        store_tile(at_x, j, v[0], v[1], v[2], v[3]);
      }
    }
    fence_async_proxy();
    named_barrier(2 + part, 128);
    keep(tb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x32_rs_kn(x, tb + 4 * kk, tile_kn(low + (L::kV + part / 2 * kPanel + part % 2 * 64) / 16, kk), kk > 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(x);
    keep(tb);
    named_barrier(2 + part, 128);
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      store_tile(at_x, j, pack(x[4 * j], x[4 * j + 1]), pack(x[4 * j + 2], x[4 * j + 3]), pack(x[4 * j + 4], x[4 * j + 5]),
                 pack(x[4 * j + 6], x[4 * j + 7]));
    fence_async_proxy();
    named_barrier(1, 512);

    // The first side: E from dO U^T, and r dQ begins as scale exp(G) r dO S0. The second: F and dbeta from dV U^T, and r e as -exp(G) r dV S0.
    const uint32_t low_e = low + (side == 0 ? L::kO : L::kW) / 16;
    float y[32];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 8; ++kk) wgmma_64x32_ss(x, tile_nk(low_e, kk, kPanel), tile_nk(low + (L::kV + half * 32 * 128) / 16, kk, kPanel), kk > 0);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < 8; ++kk) wgmma_ss<0, 1>(y, tile_nk(low_e, kk, kPanel), tile_kn(low_s0 + half * (kStatePanel / 16), kk), kk > 0);
    wgmma_commit();
    float r[2], scaled[2];  // of its rows: 1 / |q| or 1 / |k|; the factor of E or F
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      r[h] = side == 0 ? load_shared(at_rq + 4 * (t0 + 8 * h)) : rk[h];
      scaled[h] = side == 0 ? s.scale * r[h] : -first * r[h];
    }
    barrier_wait(full_s1, i & 1);
    // <S0, dS1>: eight rows a warp, the diagonal of S0 dS1^T.
    float square[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int kk = 0; kk < 8; kk += 2) {
      uint32_t s0[4], s1[4];
      const uint32_t from = base + L::kS0 + kk / 4 * kStatePanel + warp * 1024 + lane % 8 * 128 + ((kk % 4 * 2 + lane / 8) ^ lane % 8) * 16;
      load_matrix(s0, from);
      load_matrix(s1, from + (L::kS1 - L::kS0));
      const uint32_t a0[4] = {s0[0], 0, s0[1], 0}, a1[4] = {s0[2], 0, s0[3], 0};
      mma_bf16(square, a0, s1[0], s1[1]);
      mma_bf16(square, a1, s1[2], s1[3]);
    }
    float whole = lane / 8 == lane % 4 ? square[lane / 4 % 2] : 0.f;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) whole += __shfl_xor_sync(~0u, whole, d);
    wgmma_wait<1>();
    keep(x);
    uint32_t eb[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = 32 * half + 8 * j + column;
      const float2 g = load_shared2(at_G + 4 * c), q = load_shared2(at_rk + 4 * c);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int last = t0 + 8 * h - side;  // the last column that counts
        eb[2 * j + h] = pack(c <= last ? scaled[h] * q.x * power2(G[h] - g.x) * x[4 * j + 2 * h] : 0.f,
                             c + 1 <= last ? scaled[h] * q.y * power2(G[h] - g.y) * x[4 * j + 2 * h + 1] : 0.f);
      }
    }
    if (side == 1 && warp % 4 / 2 == half && lane / 8 == lane % 4 && first != 0.f) {
      // The diagonal of dV U^T over that of T, squared.
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float d0 = warp % 2 == 0 ? x[6 * h] : x[6 * h + 8], d1 = warp % 2 == 0 ? x[6 * h + 1] : x[6 * h + 9];
        const uint32_t b0 = warp % 2 == 0 ? tb[3 * h] : tb[4 + 3 * h], b1 = warp % 2 == 0 ? tb[8 + 3 * h] : tb[12 + 3 * h], b = half == 0 ? b0 : b1;
        const float inverse = __frcp_rn(lane / 4 % 2 == 0 ? hopper::low(b) : high(b));
        if (t0 + 8 * h < count) a.d_beta[static_cast<size_t>(token + t0 + 8 * h) * s.Hs + hs] = (lane / 4 % 2 == 0 ? d0 : d1) * inverse * inverse;
      }
    }
    wgmma_wait<0>();
    keep(y);
    if (kForSanitizer || lane == 0) {
      barrier_arrive(empty_s0);
      if (side == 1) barrier_arrive(empty_s1);
    }
    named_barrier(1, 512);  // dO and dV are spent
    if (lane == 0) store_float(base + L::kWhole + 4 * warp, whole);
    const uint32_t at_e = (at + (side == 0 ? L::kO : L::kW) + my_rows) ^ (half << 6);
    store_tile(at_e, 0, eb[0], eb[1], eb[2], eb[3]);
    store_tile(at_e, 2, eb[4], eb[5], eb[6], eb[7]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float f = scaled[h] * power2(G[h]);
#pragma unroll
      for (int j = 0; j < 8; ++j) y[4 * j + 2 * h] *= f, y[4 * j + 2 * h + 1] *= f;
    }
    fence_async_proxy();
    named_barrier(1, 512);

    // r dQ += E K, r e += F K; r dK's other terms are shared out. On the way, the sums over columns that dg and the normalisation take.
    const uint32_t my_q = at + L::kQ + half * kPanel + my_rows, my_k = at + L::kK + half * kPanel + my_rows,
                   my_u = at + L::kV + half * kPanel + my_rows;
    const uint32_t low_q = low + (L::kQ + half * kPanel) / 16, low_k = low + (L::kK + half * kPanel) / 16;
    keep(y);
    if (side == 0) {
      float z[32];  // exp(G_C - G) r U dS1 + E^T Q
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma_ss<0, 1>(y, tile_nk(low_e, kk, kPanel), tile_kn(low_k, kk), 1);
      wgmma_commit();
#pragma unroll
      for (int kk = 0; kk < 8; ++kk)
        wgmma_ss<0, 1>(z, tile_nk(low + L::kV / 16, kk, kPanel), tile_kn(low_s1 + half * (kStatePanel / 16), kk), kk > 0);
      wgmma_commit();
      wgmma_wait<1>();
      keep(y);
      row_dots(y, my_q, t0, at + L::kSumQ + 256 * half, lane);
      wgmma_wait<0>();
      keep(z);
      barrier_arrive_warp(empty_s1, lane);
      const float G_end = load_shared(at_G + 4 * 63);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float f = t0 + 8 * h < count ? first * power2(G_end - G[h]) * rk[h] : 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) z[4 * j + 2 * h] *= f, z[4 * j + 2 * h + 1] *= f;
      }
      row_dots(z, my_k, t0, at + L::kSumEnd + 256 * half, lane);
      keep(z);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma_ss<1, 1>(z, tile_kn(low_e, kk), tile_kn(low_q, kk), 1);
      wgmma_commit();
      wgmma_wait<0>();
      keep(z);
      row_dots(z, my_k, t0, at + L::kSumK + 256 * half, lane);
      named_barrier(6, 256);  // U is spent
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        store_tile(my_u, j, pack(z[4 * j], z[4 * j + 1]), pack(z[4 * j + 2], z[4 * j + 3]), pack(z[4 * j + 4], z[4 * j + 5]),
                   pack(z[4 * j + 6], z[4 * j + 7]));
    } else {
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma_ss<0, 1>(y, tile_nk(low_e, kk, kPanel), tile_kn(low_k, kk), 1);
      wgmma_commit();
      wgmma_wait<0>();
      keep(y);
      row_dots(y, my_k, t0, at + L::kSumE + 256 * half, lane);
      keep(y);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma_ss<1, 1>(y, tile_kn(low_e, kk), tile_kn(low_k, kk), 1);
      wgmma_commit();
      wgmma_wait<0>();
      keep(y);
      row_dots(y, my_k, t0, at + L::kSumK + 512 + 256 * half, lane);
    }
    named_barrier(1, 512);  // Q, K and the sums are whole
    const uint32_t my = side == 0 ? my_q : my_k, sums = at + (side == 0 ? L::kSumQ : L::kSumK) + 4 * t0;
    float f[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      f[h] = load_shared(sums + 32 * h) + load_shared(sums + 256 + 32 * h);
      if (side == 1) f[h] += load_shared(sums + 512 + 32 * h) + load_shared(sums + 768 + 32 * h);
      f[h] *= r[h] * r[h];
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t u[4], w[4] = {0, 0, 0, 0};
      load_tile(u, my, j);
      if (side == 1) load_tile(w, my_u, j);
#pragma unroll
      for (int m = 0; m < 4; ++m)
        u[m] = pack(fmaf(-hopper::low(u[m]), f[m % 2], y[4 * j + 2 * m]) + hopper::low(w[m]),
                    fmaf(-high(u[m]), f[m % 2], y[4 * j + 2 * m + 1]) + high(w[m]));
      store_tile(my, j, u[0], u[1], u[2], u[3]);
    }
    named_barrier(2 + part, 128);
    {
      const int t = thread % 128 / 8, unit = thread % 8;
      const uint32_t from = at + (side == 0 ? L::kQ : L::kK) + half * kPanel + t * 128 + ((unit ^ (t & 7)) << 4);
      char* to = reinterpret_cast<char*>((side == 0 ? a.d_q : a.d_k) + (static_cast<size_t>(token + t) * s.Ho + ho) * s.D + half * 64 + unit * 8);
      const int stride = 32 * s.Ho * s.D;  // bytes of 16 tokens
      if (half * 64 < s.D) {
#pragma unroll
        for (int m = 0; m < 4; ++m)
          if (t + 16 * m < count) store_global(to + static_cast<size_t>(m) * stride, load_unit(from + 2048 * m), kEvictFirst);
      }
    }
    if (warp == 0) store_decay_gradient(at, at_G, base + L::kWhole, first, token, count, ho, s.Ho, a.d_g, lane);
    fence_async_proxy();
    __syncwarp();
    barrier_arrive_warp(empty + 8 * set, lane);
  }
  ops::cuda::wait_for_previous();  // this kernel ends after the walk
}

}  // namespace

cudaError_t launch_backward_chunk(const OryxGatedDelta& p, const OryxGatedDeltaGradients& d, const Shape& s, int records, const CUtensorMap* maps,
                                  const char* record, const char* states, const char* d_states, const int32_t* order, uint32_t* done, int row_blocks,
                                  void* d_q, void* d_k, float* d_g, cudaStream_t stream) {
  if (records == 0) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(backward_chunk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kBytes);
  if (status != cudaSuccess) return status;
  static int processors = 0;
  if (processors == 0) {
    int device = 0;
    cudaError_t found = cudaGetDevice(&device);
    if (found == cudaSuccess) found = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (found != cudaSuccess) return found;
  }
  const int blocks = records * s.Ho < processors ? records * s.Ho : processors;
  const Arguments a{
      p.wanted, record,  states, d_states, order, done, row_blocks, records, static_cast<__nv_bfloat16*>(d_q), static_cast<__nv_bfloat16*>(d_k),
      d_g,      d.d_beta};
  return static_cast<cudaError_t>(ops::cuda::launch_after(backward_chunk_kernel, dim3(blocks), Layout::kThreads, Layout::kBytes, stream, maps[0], maps[1],
                                                          maps[2], maps[3], maps[4], s, a));
}

}  // namespace oryx::gated_delta_cuda
