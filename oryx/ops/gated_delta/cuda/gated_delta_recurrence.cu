// The walk over the chunks of a sequence (see gated_delta_cuda.h), everything transposed: a warpgroup keeps 64 rows of S (float32) in
// registers, so that S, V - exp(G) K S^T and U are left operands straight from registers and no product waits for shared memory written
// by another. One more warp copies the inputs in, kStages chunks ahead.
#include "gated_delta_walk.cuh"
#include "oryx/ops/cuda/dependent_launch.cuh"

namespace oryx::gated_delta_cuda {
namespace {

template <int kRows, bool kSave>
struct Layout {
  static constexpr int kStages = kRows == 128 && kSave ? 2 : 3;
  static constexpr int kWarps = kRows / 16;  // that compute S and O
  // A warpgroup computes P; registers are traded, so the copying warp has three idle ones beside it.
  static constexpr int kThreads = 32 * kWarps + 256;
  static constexpr int kCopyWarp = kWarps + 4;
  static constexpr int kK = 0;
  static constexpr int kQ = 2 * kPanel;
  static constexpr int kV = kQ + 2 * kPanel;
  static constexpr int kRecord = kV + kRows / 64 * kPanel;
  static constexpr int kLoaded = kRecord + kRecordBytes;  // bytes copied in
  static constexpr int kP = kRecord + kSharedRecord;      // P, then scale exp(G) / |q|
  static constexpr int kStage = kP + kPanel + 1024;
  static constexpr int kOut = kStages * kStage;  // 64 tokens of 16 rows for each warp
  static constexpr int kState = kOut + kWarps * kC * 32;  // 4 KiB for each warp
  static constexpr int kBarriers = kState + (kSave ? kWarps * 4096 : 0);
  static constexpr int kBytes = kBarriers + 24 * kStages + 1024;  // and what aligning the start to 1024 may take
};

struct Arguments {
  const float* initial;  // [N, Hs, 128, 128] or null
  const float* own;      // [N, Hs, segments, 128, 128]: the state behind each segment
  const char* record;
  char* states;
  __nv_bfloat16* o;
  float* final_state;
  const uint8_t* wanted;
};

template <int kRows, bool kSave>
__global__ void __launch_bounds__(Layout<kRows, kSave>::kThreads, 1)
    recurrence_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                      const __grid_constant__ CUtensorMap o_map, const Shape s, const Arguments a) {
  using L = Layout<kRows, kSave>;
  constexpr int kStages = L::kStages;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t full = base + L::kBarriers, empty = full + 8 * kStages, ready = empty + 8 * kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // What this block walks: heads, rows and chunks.
  const int blocks = s.D == 64 ? 1 : kD / kRows, segment = blockIdx.y;
  const int rb = blockIdx.x % blocks, ho = blockIdx.x / blocks % s.Ho, n = blockIdx.x / blocks / s.Ho, hs = ho / (s.Ho / s.Hs);
  const Sequence seq = sequence(s, n);
  const int chunks = (seq.length + kC - 1) / kC;
  const int c0 = static_cast<int>(static_cast<int64_t>(chunks) * segment / s.segments);
  const int c1 = static_cast<int>(static_cast<int64_t>(chunks) * (segment + 1) / s.segments);

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, L::kWarps * kWarpArrivals);
      barrier_init(ready + 8 * i, 4 * kWarpArrivals);
    }
    barrier_init_fence();
  }
  for (int i = 0; i < kStages; ++i) clear_T(base + i * L::kStage + L::kRecord, threadIdx.x, L::kThreads);
  __syncthreads();
  ops::cuda::wait_for_previous();

  if (warp >= L::kCopyWarp) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == L::kCopyWarp && lane == 0) {
      const int hk = hs / (s.Hs / s.Hk), hv = hs / (s.Hs / s.Hv), hq = ho / (s.Ho / s.Hq);
      for (int c = c0; c < c1; ++c) {
        const int i = c - c0, stage = i % kStages;
        const uint32_t at = base + stage * L::kStage, bar = full + 8 * stage;
        if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) & 1);
        barrier_expect(bar, L::kLoaded);
        const int token = seq.begin + c * kC;
        tensor_load(at + L::kK, &k_map, bar, 0, hk, token, 0);
        tensor_load(at + L::kK + kPanel, &k_map, bar, 0, hk, token, 1);
        load_record(at + L::kRecord, a.record + (static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs) * kRecordBytes, bar, kEvictNormal);
        tensor_load(at + L::kQ, &q_map, bar, 0, hq, token, 0);
        tensor_load(at + L::kQ + kPanel, &q_map, bar, 0, hq, token, 1);
        for (int p = 0; p < kRows / 64; ++p) tensor_load(at + L::kV + p * kPanel, &v_map, bar, 0, hv, token, rb * (kRows / 64) + p);
      }
    }
    return;
  }
  if (warp >= L::kWarps) {
    if constexpr (kRows == 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 152;");
    for (int i = 0; i < c1 - c0; ++i) {
      const int stage = i % kStages;
      barrier_wait(full + 8 * stage, (i / kStages) & 1);
      queries<L::kQ, L::kK, L::kRecord + kSharedRows, L::kP>(base + stage * L::kStage, s.scale, s.l2_eps, warp - L::kWarps, lane);
      fence_async_proxy();
      __syncwarp();
      barrier_arrive_warp(ready + 8 * stage, lane);
    }
    return;
  }
  if constexpr (kRows == 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
  else asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int panel = warp / 4;                         // 64 rows of this warpgroup
  const int row = rb * kRows + 16 * warp + lane / 4;  // this thread's rows of S: this one and 8 further on
  const int column = 2 * (lane % 4);                  // and its columns: this one and the next of every eight
  const size_t state = (static_cast<size_t>(n) * s.Hs + hs) * s.D * s.D;
  const size_t segments = (static_cast<size_t>(n) * s.Hs + hs) * s.segments;

  float S[64];
  {
    const float* from = nullptr;
    const int width = segment == 0 ? s.D : kD;  // of what a segment starts from
    if (segment == 0) from = a.initial == nullptr ? nullptr : a.initial + state;
    else from = a.own + (segments + segment - 1) * kD * kD;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = row + 8 * h, c = 8 * j + column;
        float2 x = make_float2(0.f, 0.f);
        if (from != nullptr && c < width && r < width) x = *reinterpret_cast<const float2*>(from + r * width + c);
        S[4 * j + 2 * h] = x.x;
        S[4 * j + 2 * h + 1] = x.y;
      }
  }

  uint32_t sb[32];  // S in bfloat16
#pragma unroll
  for (int j = 0; j < 32; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
  constexpr bool kAtOnce = kRows == 128;  // else while the next chunk's first products run, for which there are no registers then
  uint32_t ob[16];                        // O of the chunk
  const uint32_t staging = base + L::kOut + warp * kC * 32;
  const auto write_out = [&](int token, int count) {
    if (!kForSanitizer && count == kC && a.wanted == nullptr) {  // a whole chunk: the copy engine reads it out beside the walk
      if (lane == 0) bulk_wait_read();
      stage_out(ob, staging, lane);
      fence_async_proxy();
      __syncwarp();
      const int v = rb * kRows + 16 * warp;
      if (lane == 0) {
        tensor_store(&o_map, staging, v % 64, ho, token, v / 64);
        bulk_commit();
      }
    } else {
      if (lane == 0) bulk_wait_read();
      store_out(ob, staging, a.o, a.wanted, token, count, static_cast<size_t>(s.Ho) * s.D, ho * s.D + rb * kRows + 16 * warp, lane, kEvictNormal);
    }
  };
  for (int c = c0; c < c1; ++c) {
    const int i = c - c0, stage = i % kStages;
    const uint32_t at = base + stage * L::kStage, rows = at + L::kRecord + kSharedRows + 4 * column;
    const int token = seq.begin + c * kC, count = min(kC, seq.length - c * kC);
    barrier_wait(full + 8 * stage, (i / kStages) & 1);
    if (count < kC) {
      clear_rows(at + L::kK, 2, count, threadIdx.x, 32 * L::kWarps);
      clear_rows(at + L::kV, kRows / 64, count, threadIdx.x, 32 * L::kWarps);
      fence_async_proxy();
      named_barrier(1, 32 * L::kWarps);
    }

    float x[32], o[32];
    keep(sb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 8; ++kk) wgmma_64x64(x, sb + 4 * kk, descriptor(at + L::kK + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < 8; ++kk) wgmma_64x64(o, sb + 4 * kk, descriptor(at + L::kQ + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
    wgmma_commit();
    const auto save = [&] {
      if constexpr (kSave) {
        if (ho % (s.Ho / s.Hs) == 0)
          store_state(sb, base + L::kState + warp * 4096,
                      a.states + (static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs) * state_bytes(s.D) + (rb * kRows + 16 * warp) * 128, s.D, lane,
                      kEvictNormal);
      }
    };
    if (kAtOnce) save();
    else if (i > 0) write_out(token - kC, kC);
    wgmma_wait<kAtOnce ? 0 : 1>();
    keep(x);
    if constexpr (kAtOnce) {
      keep(o);
      keep(sb);
    }

    // X^T = V^T - exp(G) S K^T, then U^T = X^T T^T.
    uint32_t xb[16];
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t v[4];
      const int t = 16 * kk + lane / 16 * 8 + lane % 8, unit = 2 * (warp % 4) + lane / 8 % 2;
      load_matrix_transposed(v, at + L::kV + panel * kPanel + t * 128 + ((unit ^ (t & 7)) << 4));
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float2 e = load_shared2(rows + 4 * (16 * kk + 4 * j));
#pragma unroll
        for (int h = 0; h < 2; ++h)
          xb[4 * kk + j + h] = pack(low(v[j + h]) - e.x * x[8 * kk + 2 * (j + h)], high(v[j + h]) - e.y * x[8 * kk + 2 * (j + h) + 1]);
      }
    }
    float u[32];
    if constexpr (!kAtOnce) {
      wgmma_wait<0>();
      keep(o);
      keep(sb);
    }
    keep(xb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64(u, xb + 4 * kk, descriptor_T_transposed(at + L::kRecord, kk), kk > 0);
    wgmma_commit();
    if (!kAtOnce) save();
    const float decay = power2(load_shared(at + L::kRecord + kSharedRows + 4 * 191));
#pragma unroll
    for (int j = 0; j < 64; ++j) S[j] *= decay;
    barrier_wait(ready + 8 * stage, (i / kStages) & 1);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 w = load_shared2(at + L::kP + kPanel + 4 * (column + 8 * (j / 2)));
      o[2 * j] *= w.x;
      o[2 * j + 1] *= w.y;
    }
    keep(o);
    keep(S);
    wgmma_wait<0>();
    keep(u);
    keep(xb);

    // S = exp(G_C) S + U^T diag(exp(G_C - G)) K,  O^T = scale exp(G) S Q^T + U^T P^T
    uint32_t us[16], ub[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 w = load_shared2(rows + 4 * (64 + 8 * (j / 2)));
      us[j] = pack(u[2 * j] * w.x, u[2 * j + 1] * w.y);
      ub[j] = pack(u[2 * j], u[2 * j + 1]);
    }
    keep(us);
    keep(ub);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x128_kn(S, us + 4 * kk, descriptor(at + L::kK + kk * 2048, kPanel, 1024), 1);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64(o, ub + 4 * kk, descriptor(at + L::kP + kk * 32, 16, 1024), 1);
    wgmma_commit();
    wgmma_wait<1>();
    keep(S);
    keep(us);
#pragma unroll
    for (int j = 0; j < 32; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
    wgmma_wait<0>();
    keep(o);
    keep(ub);
#pragma unroll
    for (int j = 0; j < 16; ++j) ob[j] = pack(o[2 * j], o[2 * j + 1]);
    barrier_arrive_warp(empty + 8 * stage, lane);
    if (kAtOnce) write_out(token, count);
  }
  if (!kAtOnce && c1 > c0) write_out(seq.begin + (c1 - 1) * kC, min(kC, seq.length - (c1 - 1) * kC));
  if (a.final_state != nullptr && segment == s.segments - 1 && ho % (s.Ho / s.Hs) == 0) {
    float* const to = a.final_state + state;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (8 * j < s.D)
          *reinterpret_cast<float2*>(to + (row + 8 * h) * s.D + 8 * j + column) = make_float2(S[4 * j + 2 * h], S[4 * j + 2 * h + 1]);
  }
  if (lane == 0) bulk_wait();
}

template <int kRows, bool kSave>
cudaError_t launch(const Shape& s, const CUtensorMap* maps, const Arguments& a, cudaStream_t stream) {
  using L = Layout<kRows, kSave>;
  auto* kernel = recurrence_kernel<kRows, kSave>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(s.N * s.Ho * (s.D == 64 ? 1 : kD / kRows), s.segments);
  if constexpr (kSave && kRows == 64) {  // launched early it was slower by a quarter
    kernel<<<grid, L::kThreads, L::kBytes, stream>>>(maps[0], maps[1], maps[2], maps[3], s, a);
    return cudaGetLastError();
  } else {
    return static_cast<cudaError_t>(ops::cuda::launch_after(kernel, grid, L::kThreads, L::kBytes, stream, maps[0], maps[1], maps[2], maps[3], s, a));
  }
}

}  // namespace

cudaError_t launch_recurrence(const OryxGatedDelta& p, const Shape& s, int rows, const CUtensorMap* maps, const char* record, const float* own,
                              char* states, cudaStream_t stream) {
  const Arguments a{p.initial_state, own, record, states, static_cast<__nv_bfloat16*>(p.o), p.final_state, p.wanted};
  if (states != nullptr) return rows == 64 ? launch<64, true>(s, maps, a, stream) : launch<128, true>(s, maps, a, stream);
  return rows == 64 ? launch<64, false>(s, maps, a, stream) : launch<128, false>(s, maps, a, stream);
}

}  // namespace oryx::gated_delta_cuda
