// The gradients of a chunk, all chunks at once (see ssd_cuda.h). A block has one chunk and a run of output heads that
// share a key head and a query head; it goes through the heads, 64 value columns at a time. One warpgroup has the
// tokens as rows t (queries): dQ and the sum of W over the heads; one has them as rows j (keys): dK and dV. Of the
// third one warp copies the inputs in, one computes the scalars, one the product of S0 and dS, and one puts the shares
// of the decay's gradient together.
//
// The decay's gradient at token m sums every weight whose segment contains m: with M = P dP up to the diagonal,
//   sum_{t >= m} (row sum of M + d gamma)_t - sum_{j >= m} (column sum of M)_j + sum_{j < m} d tail_j + d end.
// The diagonal, which both have, cancels. Row and column sums add the same numbers, so that what cancels does so to
// float32's digits of M.
#include "oryx/ops/ssd/cuda/ssd_gradient_rows.cuh"

namespace oryx::ssd_cuda {
namespace {

// One warp: q and k of the chunk, then each item's dO, v, S0 and dS.
template <int kK>
__device__ __forceinline__ void copy_in(const Shape& s, const GradientArguments& a, const Block& b, uint32_t base,
                                        const Barriers& bar, const CUtensorMap* q_map, const CUtensorMap* k_map,
                                        const CUtensorMap* v_map, const CUtensorMap* d_map, int lane) {
  using L = Layout<kK>;
  const int blocks = s.V / 64, readers = s.Ho / s.Hs;
  const uint64_t all = first_rows(b.count), wanted = wanted_rows(a.wanted, b.token, b.count, lane);
  const bool whole =
      wanted == ~0ull;  // else rows are cleared: what is not of the sequence, or not wanted, counts for nothing
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
    barrier_arrive_warp(bar.pair, lane);
  } else {
    barrier_arrive_others(bar.pair, lane);
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
      barrier_arrive_warp(bar.full + 8 * stage, lane);
    } else {
      barrier_arrive_others(bar.full + 8 * stage, lane);
    }
  }
}

// One warp: exp(G_C) times the sum of S0 dS, a head at a time.
template <int kK>
__device__ __forceinline__ void state_products(const Shape& s, const Block& b, uint32_t base, const Barriers& bar,
                                               int lane) {
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
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(at + L::kS + 512 * m + 16 * lane)
                   : "memory");
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                   : "r"(at + L::kDs + 512 * m + 16 * lane)
                   : "memory");
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[0] += low(x[c]) * low(y[c]);
        sum[1] += high(x[c]) * high(y[c]);
      }
    }
    const float gamma = load_shared(at + L::kScalars + kGamma + 252);
    __syncwarp();
    barrier_arrive_warp(bar.empty + 8 * stage, lane);
    if (i % blocks == blocks - 1) {
      float x = sum[0] + sum[1];
#pragma unroll
      for (int d = 16; d >= 1; d /= 2) x += __shfl_xor_sync(~0u, x, d);
      if (head >= 2) barrier_wait(bar.sums_free + 8 * (head % 2), (head / 2 - 1) & 1);
      if (lane == 0) {
        store_shared(base + L::kSums + head % 2 * kSumBytes + 4 * kEnd,
                     (b.first + head) % readers == 0 ? gamma * x : 0.f);
        barrier_arrive(bar.sums_full + 8 * (head % 2));
      }
      sum[0] = sum[1] = 0.f;
    }
  }
}

// One warp: the gradient of dt_raw of a head at a time, and the chunk's share of those of dt_bias, A_log and D.
template <int kK>
__device__ __forceinline__ void step_gradients(const Shape& s, const GradientArguments& a, const Block& b,
                                               uint32_t base, const Barriers& bar, int lane) {
  using L = Layout<kK>;
  const int readers = s.Ho / s.Hs;
  for (int head = 0; head < b.heads; ++head) {
    const int ho = b.first + head, hs = ho / readers;
    const float2 raw = load_steps(a.dt_raw, s.Hs, hs, b.token, b.count, lane);
    const float bias = a.dt_bias[hs], rate = log2_rate(a.A_log[hs]), A = rate / kLog2e;
    const uint32_t sums = base + L::kSums + head % 2 * kSumBytes;
    barrier_wait(bar.sums_full + 8 * (head % 2), (head / 2) & 1);
    // What was summed over t without dt_j is the gradient of dt_j; with it, that of decays.
    const float dts[2] = {softplus(raw.x + bias), softplus(raw.y + bias)};
    float2 x = load_shared2(sums + 4 * kRow + 8 * lane), tail = load_shared2(sums + 4 * kDTail + 8 * lane), vdu = tail;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 c = load_shared2(sums + 4 * (kColumn + 64 * w) + 8 * lane);
      x.x = fmaf(-dts[0], c.x, x.x), vdu.x += c.x;
      x.y = fmaf(-dts[1], c.y, x.y), vdu.y += c.y;
    }
    tail.x *= dts[0], tail.y *= dts[1];
    const float end = load_shared(sums + 4 * kEnd);
    float skip = lane < 4 ? load_shared(sums + 4 * (kSkip + lane)) : 0.f;
    __syncwarp();
    barrier_arrive_warp(bar.sums_free + 8 * (head % 2), lane);
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
      const float z = (e == 0 ? raw.x : raw.y) + bias, dt = dts[e];
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
    if (lane < 3)
      a.head_part[(static_cast<size_t>(lane) * s.Ho + ho) * a.records + b.record] = lane == 0   ? sum_x
                                                                                    : lane == 1 ? A * sum_a
                                                                                                : skip;
  }
}

template <int kK>
__global__ void __launch_bounds__(384, 1)
    gradient_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap d_map, const Shape s,
                    const GradientArguments a) {
  using L = Layout<kK>;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const Barriers bar(base + L::kBarriers);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;

  Block b;
  const int units = s.Ho / a.heads;
  b.unit = blockIdx.x % units, b.record = blockIdx.x / units, b.first = b.unit * a.heads, b.heads = a.heads;
  if (s.cu_seqlens == nullptr) {
    // From both ends of the sequences: there the walks have been last, and what they wrote is in the L2 cache.
    const int chunks = (s.T + kC - 1) / kC, n = b.record % s.N, i = b.record / s.N,
              c = i % 2 == 0 ? i / 2 : chunks - 1 - i / 2;
    b.record = n * chunks + c;
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
      barrier_init(bar.full + 8 * i, 2 * kWarpArrivals);
      barrier_init(bar.empty + 8 * i, 9 * kWarpArrivals);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(bar.sums_full + 8 * i, 8 * kWarpArrivals + 1);
      barrier_init(bar.sums_free + 8 * i, kWarpArrivals);
    }
    barrier_init(bar.pair, kWarpArrivals);
    barrier_init(bar.w, 4 * kWarpArrivals);
    barrier_init(bar.aside, 1);
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_previous();
  launch_dependents();

  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (warp == 0) {
      copy_in<kK>(s, a, b, base, bar, &q_map, &k_map, &v_map, &d_map, lane);
    } else if (warp == 1) {
      const int blocks = s.V / 64, readers = s.Ho / s.Hs;
      // What one item needs is loaded when the one before is made: nobody waits for it, and code that is short leaves
      // the instruction cache to the two warpgroups that compute.
      float2 raw;
      float bias, A_log, D;
      const auto load = [&](int i) {
        const int hs = (b.first + i / blocks) / readers;
        raw = load_steps(a.dt_raw, s.Hs, hs, b.token, b.count, lane);
        bias = a.dt_bias[hs], A_log = a.A_log[hs], D = a.D[hs];
      };
      load(0);
#pragma unroll 1
      for (int i = 0; i < b.heads * blocks; ++i) {
        const int stage = i % kStages;
        const uint32_t to = base + stage * L::kStage + L::kScalars;
        if (i >= kStages) barrier_wait(bar.empty + 8 * stage, (i / kStages - 1) & 1);
        chunk_scalars(to, raw, bias, log2_rate(A_log), b.count, lane);
        if (lane == 0) store_shared2(to + kSkipRate, D, (b.first + i / blocks) % readers == 0 ? 1.f : 0.f);
        __syncwarp();
        barrier_arrive_warp(bar.full + 8 * stage, lane);
        if (i + 1 < b.heads * blocks) load(i + 1);
      }
    } else if (warp == 2) {
      state_products<kK>(s, b, base, bar, lane);
    } else {
      step_gradients<kK>(s, a, b, base, bar, lane);
    }
  } else if (group == 0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    query_rows<kK>(s, a, b, base, bar, warp, lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    key_rows<kK>(s, a, b, base, bar, warp, lane);
  }
}

template <int kK>
cudaError_t launch(const Shape& s, const GradientArguments& a, const CUtensorMap* maps, cudaStream_t stream) {
  auto* kernel = gradient_kernel<kK>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<kK>::kBytes);
  if (status != cudaSuccess) return status;
  const int blocks = a.records * (s.Ho / a.heads);
  return static_cast<cudaError_t>(
      launch_after(kernel, dim3(blocks), 384, Layout<kK>::kBytes, stream, maps[2], maps[0], maps[1], maps[3], s, a));
}

}  // namespace

cudaError_t launch_gradients(const Shape& s, const GradientArguments& a, const CUtensorMap* maps, cudaStream_t stream) {
  return s.K == 128 ? launch<128>(s, a, maps, stream) : launch<64>(s, a, maps, stream);
}

}  // namespace oryx::ssd_cuda
