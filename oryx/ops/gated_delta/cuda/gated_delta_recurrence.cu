// The walk over the chunks of a sequence (see gated_delta_cuda.h), everything transposed: a warpgroup keeps 64 rows of S (float32) in
// registers, so that S, V - exp(G) K S^T and U are left operands straight from registers and no product waits for shared memory written
// by another. One more warp copies the inputs in, kStages chunks ahead.
#include "gated_delta_walk.cuh"

namespace oryx::gated_delta_cuda {
namespace {

template <int kRows, bool kOutput, bool kSave>
struct Layout {
  static constexpr int kStages = kRows == 128 && kSave ? 2 : 3;
  static constexpr int kWarps = kRows / 16;  // that compute S and O
  // With outputs a warpgroup computes P; registers are then traded, so the copying warp has three idle ones beside it.
  static constexpr int kThreads = 32 * kWarps + (kOutput ? 256 : 32);
  static constexpr int kCopyWarp = kWarps + (kOutput ? 4 : 0);
  static constexpr int kK = 0;
  static constexpr int kQ = 2 * kPanel;
  static constexpr int kV = kQ + (kOutput ? 2 * kPanel : 0);
  static constexpr int kRecord = kV + kRows / 64 * kPanel;
  static constexpr int kLoaded = kRecord + kRecordBytes;  // what is copied in; what follows is computed here
  static constexpr int kP = kLoaded;                      // P, then scale exp(G) / |q|
  static constexpr int kStage = kP + (kOutput ? kPanel + 1024 : 0);
  static constexpr int kOut = kStages * kStage;                           // 64 tokens of 16 rows for each warp
  static constexpr int kState = kOut + (kOutput ? kWarps * kC * 32 : 0);  // 4 KiB for each warp
  static constexpr int kBarriers = kState + (kSave ? kWarps * 4096 : 0);
  static constexpr int kBytes = kBarriers + 24 * kStages + 1024;  // and what aligning the start to 1024 may take
};

struct Arguments {
  const float* initial;  // [N, Hs, 128, 128] or null
  float* own;            // [N, Hs, segments, 128, 128]
  float* map;
  float* map_transposed;  // or null
  const char* record;
  char* states;
  __nv_bfloat16* o;
  float* final_state;
  const uint8_t* wanted;
};

template <int kRows, bool kOutput, bool kSave>
__global__ void __launch_bounds__(Layout<kRows, kOutput, kSave>::kThreads, kRows == 64 && !kOutput ? 2 : 1)
    recurrence_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                      const Shape s, const Arguments a) {
  using L = Layout<kRows, kOutput, kSave>;
  constexpr int kStages = L::kStages;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t full = base + L::kBarriers, empty = full + 8 * kStages, ready = empty + 8 * kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // What this block walks: heads, rows and chunks.
  const int heads = kOutput ? s.Ho : s.Hs, blocks = s.D == 64 ? 1 : kD / kRows;
  const int rb = blockIdx.x % blocks, head = blockIdx.x / blocks % heads, n = blockIdx.x / blocks / heads;
  const int ho = kOutput ? head : head * (s.Ho / s.Hs), hs = kOutput ? head / (s.Ho / s.Hs) : head;
  const bool is_map = !kOutput && blockIdx.y >= s.segments - 1;
  const int segment = is_map ? blockIdx.y - (s.segments - 1) + 1 : blockIdx.y;
  const Sequence seq = sequence(s, n);
  const int chunks = (seq.length + kC - 1) / kC;
  const int c0 = static_cast<int>(static_cast<int64_t>(chunks) * segment / s.segments);
  const int c1 = static_cast<int>(static_cast<int64_t>(chunks) * (segment + 1) / s.segments);

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, L::kWarps);
      barrier_init(ready + 8 * i, 4);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp >= L::kCopyWarp) {
    if constexpr (kOutput) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == L::kCopyWarp && lane == 0) {
      const int hk = hs / (s.Hs / s.Hk), hv = hs / (s.Hs / s.Hv), hq = ho / (s.Ho / s.Hq);
      for (int c = c0; c < c1; ++c) {
        const int i = c - c0, stage = i % kStages;
        const uint32_t at = base + stage * L::kStage, bar = full + 8 * stage;
        if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) & 1);
        barrier_expect(bar, L::kLoaded - (is_map ? kRows / 64 * kPanel : 0));
        const int token = seq.begin + c * kC;
        tensor_load(at + L::kK, &k_map, bar, 0, hk, token, 0);
        tensor_load(at + L::kK + kPanel, &k_map, bar, 0, hk, token, 1);
        bulk_load(at + L::kRecord, a.record + (static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs) * kRecordBytes, kRecordBytes, bar);
        if constexpr (kOutput) {
          tensor_load(at + L::kQ, &q_map, bar, 0, hq, token, 0);
          tensor_load(at + L::kQ + kPanel, &q_map, bar, 0, hq, token, 1);
        }
        if (!is_map)
          for (int p = 0; p < kRows / 64; ++p) tensor_load(at + L::kV + p * kPanel, &v_map, bar, 0, hv, token, rb * (kRows / 64) + p);
      }
    }
    return;
  }
  if constexpr (kOutput) {
    if (warp >= L::kWarps) {
      if constexpr (kRows == 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
      else asm volatile("setmaxnreg.dec.sync.aligned.u32 152;");
      for (int i = 0; i < c1 - c0; ++i) {
        const int stage = i % kStages;
        barrier_wait(full + 8 * stage, (i / kStages) & 1);
        queries<L::kQ, L::kK, L::kRecord + kRecordRows, L::kP>(base + stage * L::kStage, s.scale, s.l2_eps, warp - L::kWarps, lane);
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(ready + 8 * stage);
      }
      return;
    }
    if constexpr (kRows == 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  }
  const int panel = warp / 4;                         // 64 rows of this warpgroup
  const int row = rb * kRows + 16 * warp + lane / 4;  // this thread's rows of S: this one and 8 further on
  const int column = 2 * (lane % 4);                  // and its columns: this one and the next of every eight
  const size_t state = (static_cast<size_t>(n) * s.Hs + hs) * s.D * s.D;
  const size_t segments = (static_cast<size_t>(n) * s.Hs + hs) * s.segments;

  float S[64];
  {
    const float* from = nullptr;
    const int width = segment == 0 ? s.D : kD;  // of what a segment starts from
    if (!is_map) {
      if (segment == 0) from = a.initial == nullptr ? nullptr : a.initial + state;
      else if (kOutput) from = a.own + (segments + segment - 1) * kD * kD;
    }
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = row + 8 * h, c = 8 * j + column;
        float2 x = make_float2(is_map && r == c ? 1.f : 0.f, is_map && r == c + 1 ? 1.f : 0.f);
        if (from != nullptr && c < width && r < width) x = *reinterpret_cast<const float2*>(from + r * width + c);
        S[4 * j + 2 * h] = x.x;
        S[4 * j + 2 * h + 1] = x.y;
      }
  }

  uint32_t sb[32];  // S in bfloat16
#pragma unroll
  for (int j = 0; j < 32; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
  uint32_t ob[16];  // O of the chunk before
  const uint32_t staging = base + L::kOut + warp * kC * 32;
  for (int c = c0; c < c1; ++c) {
    const int i = c - c0, stage = i % kStages;
    const uint32_t at = base + stage * L::kStage, rows = at + L::kRecord + kRecordRows + 4 * column;
    const int token = seq.begin + c * kC, count = min(kC, seq.length - c * kC);
    barrier_wait(full + 8 * stage, (i / kStages) & 1);
    if (count < kC) {
      clear_rows(at + L::kK, 2, count, threadIdx.x, 32 * L::kWarps);
      if (!is_map) clear_rows(at + L::kV, kRows / 64, count, threadIdx.x, 32 * L::kWarps);
      fence_async_proxy();
      named_barrier(1, 32 * L::kWarps);
    }

    float x[32], o[32];
    keep(sb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 8; ++kk) wgmma_64x64(x, sb + 4 * kk, descriptor(at + L::kK + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
    wgmma_commit();
    if constexpr (kOutput) {
#pragma unroll
      for (int kk = 0; kk < 8; ++kk) wgmma_64x64(o, sb + 4 * kk, descriptor(at + L::kQ + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
      wgmma_commit();
      store_out(ob, staging, a.o, a.wanted, token - kC, i > 0 ? kC : 0, static_cast<size_t>(s.Ho) * s.D, ho * s.D + rb * kRows + 16 * warp, lane,
                kEvictNormal);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    keep(x);

    // X^T = V^T - exp(G) S K^T, then U^T = X^T T^T.
    uint32_t xb[16];
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t v[4] = {0, 0, 0, 0};
      if (!is_map) {
        const int t = 16 * kk + lane / 16 * 8 + lane % 8, unit = 2 * (warp % 4) + lane / 8 % 2;
        load_matrix_transposed(v, at + L::kV + panel * kPanel + t * 128 + ((unit ^ (t & 7)) << 4));
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float2 e = load_shared2(rows + 4 * (16 * kk + 4 * j));
#pragma unroll
        for (int h = 0; h < 2; ++h)
          xb[4 * kk + j + h] = pack(low(v[j + h]) - e.x * x[8 * kk + 2 * (j + h)], high(v[j + h]) - e.y * x[8 * kk + 2 * (j + h) + 1]);
      }
    }
    float u[32];
    if constexpr (kOutput) {
      wgmma_wait<0>();
      keep(o);
      keep(sb);
    }
    keep(xb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64(u, xb + 4 * kk, descriptor(at + L::kRecord + kRecordT + kk * 32, 16, 1024), kk > 0);
    wgmma_commit();
    if constexpr (kSave) {
      if (ho % (s.Ho / s.Hs) == 0)
        store_state(sb, base + L::kState + warp * 4096,
                    a.states + (static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs) * state_bytes(s.D) + (rb * kRows + 16 * warp) * 128, s.D, lane,
                    kEvictNormal);
    }
    const float decay = power2(load_shared(at + L::kRecord + kRecordRows + 4 * 191));
#pragma unroll
    for (int j = 0; j < 64; ++j) S[j] *= decay;
    if constexpr (kOutput) {
      barrier_wait(ready + 8 * stage, (i / kStages) & 1);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 w = load_shared2(at + L::kP + kPanel + 4 * (column + 8 * (j / 2)));
        o[2 * j] *= w.x;
        o[2 * j + 1] *= w.y;
      }
      keep(o);
    }
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
      if constexpr (kOutput) ub[j] = pack(u[2 * j], u[2 * j + 1]);
    }
    keep(us);
    if constexpr (kOutput) keep(ub);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x128_kn(S, us + 4 * kk, descriptor(at + L::kK + kk * 2048, kPanel, 1024), 1);
    wgmma_commit();
    if constexpr (kOutput) {
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma_64x64(o, ub + 4 * kk, descriptor(at + L::kP + kk * 32, 16, 1024), 1);
      wgmma_commit();
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    keep(S);
    keep(us);
#pragma unroll
    for (int j = 0; j < 32; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
    if constexpr (kOutput) {
      wgmma_wait<0>();
      keep(o);
      keep(ub);
#pragma unroll
      for (int j = 0; j < 16; ++j) ob[j] = pack(o[2 * j], o[2 * j + 1]);
    }
    if (lane == 0) barrier_arrive(empty + 8 * stage);
  }
  if constexpr (kOutput) {
    if (c1 > c0)
      store_out(ob, staging, a.o, a.wanted, seq.begin + (c1 - 1) * kC, min(kC, seq.length - (c1 - 1) * kC), static_cast<size_t>(s.Ho) * s.D,
                ho * s.D + rb * kRows + 16 * warp, lane, kEvictNormal);
  }

  float* to = nullptr;
  if (!kOutput) to = (is_map ? a.map : a.own) + (segments + segment) * kD * kD;
  else if (a.final_state != nullptr && segment == s.segments - 1 && ho % (s.Ho / s.Hs) == 0) to = a.final_state + state;
  const int width = kOutput ? s.D : kD;
  if (to != nullptr) {
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (8 * j < width)
          *reinterpret_cast<float2*>(to + (row + 8 * h) * width + 8 * j + column) = make_float2(S[4 * j + 2 * h], S[4 * j + 2 * h + 1]);
  }
  if (is_map && a.map_transposed != nullptr) {
    to = a.map_transposed + (segments + segment) * kD * kD;
#pragma unroll
    for (int j = 0; j < 64; ++j) to[(8 * (j / 4) + column + j % 2) * kD + row + j % 4 / 2 * 8] = S[j];
  }
  if constexpr (kSave) {
    if (lane == 0) bulk_wait();
  }
}

// own[i] += own[i - 1] map[i], i = 1 .. segments - 2: every segment's last state; or in reverse, own[i] += own[i + 1] map[i]. A block has 16
// rows of one head, a thread 4 x 4. The maps, 64 KiB each, are copied in one ahead.
constexpr int kCombineRows = 16;
constexpr int kMapBytes = kD * kD * 4;
constexpr int kCombineBytes = 2 * kMapBytes + kD * kCombineRows * 4 + 16;
__global__ void __launch_bounds__(kD) combine_kernel(int segments, bool reverse, float* __restrict__ own, const float* __restrict__ map) {
  extern __shared__ __align__(128) char raw_shared[];
  float* const maps = reinterpret_cast<float*>(raw_shared);
  float* const before = maps + 2 * kD * kD;  // [128][16]
  const uint32_t bar = smem_address(before + kD * kCombineRows), at_map = smem_address(maps);
  const int k = threadIdx.x % 32 * 4, r0 = threadIdx.x / 32 * 4;
  const size_t first = static_cast<size_t>(blockIdx.x) * segments * kD * kD, rows = (static_cast<size_t>(blockIdx.y) * kCombineRows + r0) * kD + k;
  const auto segment = [&](int i) { return static_cast<size_t>(reverse ? segments - 1 - i : i) * kD * kD; };  // the i-th in the order of work
  const auto fetch = [&](int i) {
    barrier_expect(bar + 8 * (i & 1), kMapBytes);
    bulk_load(at_map + (i & 1) * kMapBytes, map + first + segment(i), kMapBytes, bar + 8 * (i & 1));
  };
  if (threadIdx.x == 0) {
    barrier_init(bar, 1);
    barrier_init(bar + 8, 1);
    barrier_init_fence();
    fetch(1);
    if (segments > 3) fetch(2);
  }
  const auto keep_before = [&](const float4(&x)[4]) {  // transposed: [column][row]
    *reinterpret_cast<float4*>(&before[(k + 0) * kCombineRows + r0]) = make_float4(x[0].x, x[1].x, x[2].x, x[3].x);
    *reinterpret_cast<float4*>(&before[(k + 1) * kCombineRows + r0]) = make_float4(x[0].y, x[1].y, x[2].y, x[3].y);
    *reinterpret_cast<float4*>(&before[(k + 2) * kCombineRows + r0]) = make_float4(x[0].z, x[1].z, x[2].z, x[3].z);
    *reinterpret_cast<float4*>(&before[(k + 3) * kCombineRows + r0]) = make_float4(x[0].w, x[1].w, x[2].w, x[3].w);
  };
  float4 sum[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) sum[r] = *reinterpret_cast<const float4*>(own + first + segment(0) + rows + r * kD);
  keep_before(sum);
  __syncthreads();
  for (int i = 1; i < segments - 1; ++i) {
    const float* m = maps + (i & 1) * kD * kD;
    float* at = own + first + segment(i) + rows;
#pragma unroll
    for (int r = 0; r < 4; ++r) sum[r] = *reinterpret_cast<const float4*>(at + r * kD);
    barrier_wait(bar + 8 * (i & 1), (i - 1) / 2 & 1);
#pragma unroll 8
    for (int j = 0; j < kD; ++j) {
      const float4 x = *reinterpret_cast<const float4*>(m + j * kD + k), b = *reinterpret_cast<const float4*>(&before[j * kCombineRows + r0]);
      const float bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        sum[r].x += bs[r] * x.x;
        sum[r].y += bs[r] * x.y;
        sum[r].z += bs[r] * x.z;
        sum[r].w += bs[r] * x.w;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0 && i + 2 < segments - 1) fetch(i + 2);
#pragma unroll
    for (int r = 0; r < 4; ++r) *reinterpret_cast<float4*>(at + r * kD) = sum[r];
    keep_before(sum);
    __syncthreads();
  }
}

template <int kRows, bool kOutput, bool kSave>
cudaError_t launch(const Shape& s, const CUtensorMap* maps, const Arguments& a, cudaStream_t stream) {
  using L = Layout<kRows, kOutput, kSave>;
  auto* kernel = recurrence_kernel<kRows, kOutput, kSave>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (status != cudaSuccess) return status;
  const int heads = kOutput ? s.Ho : s.Hs;
  kernel<<<dim3(s.N * heads * (s.D == 64 ? 1 : kD / kRows), kOutput ? s.segments : 2 * s.segments - 3), L::kThreads, L::kBytes, stream>>>(
      maps[0], maps[1], maps[2], s, a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_recurrence(const OryxGatedDelta& p, const Shape& s, int mode, int rows, const CUtensorMap* maps, const char* record, float* own,
                              float* map, float* map_transposed, char* states, cudaStream_t stream) {
  const Arguments a{p.initial_state, own, map, map_transposed, record, states, static_cast<__nv_bfloat16*>(p.o), p.final_state, p.wanted};
  if (mode == 1) return rows == 64 ? launch<64, false, false>(s, maps, a, stream) : launch<128, false, false>(s, maps, a, stream);
  if (states != nullptr) return rows == 64 ? launch<64, true, true>(s, maps, a, stream) : launch<128, true, true>(s, maps, a, stream);
  return rows == 64 ? launch<64, true, false>(s, maps, a, stream) : launch<128, true, false>(s, maps, a, stream);
}

cudaError_t launch_combine(const Shape& s, bool reverse, float* own, const float* map, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(combine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kCombineBytes);
  if (status != cudaSuccess) return status;
  combine_kernel<<<dim3(s.N * s.Hs, kD / kCombineRows), kD, kCombineBytes, stream>>>(s.segments, reverse, own, map);
  return cudaGetLastError();
}

}  // namespace oryx::gated_delta_cuda
