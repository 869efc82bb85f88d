// The walk of the backward pass over the chunks of a sequence, last to first (see gated_delta_cuda.h): a warpgroup keeps 64 rows (of V) of dS,
// float32, in registers, and everything is transposed as in gated_delta_recurrence.cu. A warpgroup beside it makes P and clears the rows of
// dO that count for nothing; one more warp copies the inputs in. Several output heads of one state head are taken one after another.
//
// It waits for its own chain of products more than for memory, so it gets about half of the chip, and backward_chunk runs beside it: the copying
// warp counts in `done` what has been written of a chunk.
#include <algorithm>

#include "gated_delta_walk.cuh"
#include "oryx/ops/cuda/dependent_launch.cuh"

namespace oryx::gated_delta_cuda {
namespace {

template <int kRows, bool kOutput>
struct Layout {
  static constexpr int kStages = kRows == 128 && kOutput ? 2 : 3;
  static constexpr int kWarps = kRows / 16;  // that hold dS
  static constexpr int kThreads = 32 * kWarps + 256;
  static constexpr int kCopyWarp = kWarps + 4;
  static constexpr int kK = 0;
  static constexpr int kQ = 2 * kPanel;
  static constexpr int kO = 4 * kPanel;  // the rows' part of dO
  static constexpr int kRecord = kO + kRows / 64 * kPanel;
  static constexpr int kLoaded = kRecord + kRecordBytes;
  static constexpr int kP = kRecord + kSharedRecord;  // P, then scale exp(G) / |q|
  static constexpr int kStage = kP + kPanel + 1024;
  static constexpr int kOut = kStages * kStage;                           // 64 tokens of 16 columns of dV for each warp
  static constexpr int kState = kOut + (kOutput ? kWarps * kC * 32 : 0);  // 4 KiB for each warp
  static constexpr int kBarriers = kState + (kOutput ? kWarps * 4096 : 0);
  static constexpr int kBytes = kBarriers + 24 * kStages + 1024;
};

struct Arguments {
  const float* d_final;  // [N, Hs, 128, 128] or null
  float* own;            // [N, Hs, segments, 128, 128]: dS at the start of a segment
  const char* record;
  char* d_states;
  __nv_bfloat16* d_v;  // [B, T, Hs, 128]
  float* d_initial;    // or null
  uint32_t* done;      // of each record: row blocks whose dV and dS1 are written
  const uint8_t* wanted;
  int walks;                    // in all
  int pieces, merged, skipped;  // walks of a sequence and head; segments of each; segments before the first
};

// What is walked at once: some rows of a state head, over some segments of a sequence.
struct Walk {
  int n, hs, rb, first, last, c0, c1;  // segments [first, last), chunks [c0, c1)
  Sequence seq;
  __device__ Walk(const Shape& s, const Arguments& a, int index, int blocks) {
    const int pieces = a.pieces;
    rb = index % blocks, hs = index / blocks % s.Hs, n = index / blocks / s.Hs / pieces;
    first = index / blocks / s.Hs % pieces * a.merged + a.skipped, last = min(s.segments, first + a.merged);
    seq = sequence(s, n);
    const int64_t chunks = (seq.length + kC - 1) / kC;
    c0 = static_cast<int>(chunks * first / s.segments), c1 = static_cast<int>(chunks * last / s.segments);
  }
};

// Whether backward_chunk takes up this step of a walk soon (see order_kernel).
__device__ __forceinline__ bool soon(int step) { return step % kSoon == 0; }

// Rows of dO that are not wanted become zero. wanted: of this thread's row.
template <int kPanels>
__device__ __forceinline__ void clear_unwanted(uint32_t at, bool wanted, int thread) {
  if (wanted) return;
#pragma unroll
  for (int i = 0; i < 4 * kPanels; ++i)
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at + i / 4 * kPanel + thread / 2 * 128 + thread % 2 * 64 + i % 4 * 16), "r"(0)
                 : "memory");
}

template <int kRows, bool kOutput, bool kGrouped>
__global__ void __launch_bounds__(Layout<kRows, kOutput>::kThreads, 1)
    backward_recurrence_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                               const __grid_constant__ CUtensorMap o_map, const Shape s, const Arguments a) {
  using L = Layout<kRows, kOutput>;
  constexpr int kStages = L::kStages;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t full = base + L::kBarriers, empty = full + 8 * kStages, ready = empty + 8 * kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int blocks = s.D == 64 ? 1 : kD / kRows, groups = kGrouped ? s.Ho / s.Hs : 1;

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
  if constexpr (kOutput) ops::cuda::launch_dependents();  // backward_chunk runs beside it

  if (warp >= L::kCopyWarp) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == L::kCopyWarp && lane == 0) {
      int before = 0;  // steps of earlier walks
      for (int index = blockIdx.x; index < a.walks; index += gridDim.x) {
        const Walk w(s, a, index, blocks);
        const int steps = (w.c1 - w.c0) * groups, hk = w.hs / (s.Hs / s.Hk);
        const auto record = [&](int i) { return static_cast<size_t>(w.seq.first_chunk + w.c1 - 1 - i / groups) * s.Hs + w.hs; };
        // Once its stage is free, what the walk writes of a step is written.
        const auto finish = [&](int i) { barrier_wait(empty + 8 * ((before + i) % kStages), (before + i) / kStages & 1); };
        const auto count_done = [&](int i) {
          if (i % groups == groups - 1) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.done + record(i)) : "memory");
        };
        for (int i = 0; i < steps; ++i) {
          const int stage = (before + i) % kStages, ho = w.hs * groups + i % groups, hq = ho / (s.Ho / s.Hq);
          const uint32_t at = base + stage * L::kStage, bar = full + 8 * stage;
          if (i >= kStages) finish(i - kStages);
          barrier_expect(bar, L::kLoaded);
          const int token = w.seq.begin + (w.c1 - 1 - i / groups) * kC;
          const uint64_t hint = kOutput && !soon(i / groups) ? kEvictFirst : kEvictNormal;
          tensor_load(at + L::kQ, &q_map, bar, 0, hq, token, 0, hint);
          tensor_load(at + L::kQ + kPanel, &q_map, bar, 0, hq, token, 1, hint);
          tensor_load(at + L::kK, &k_map, bar, 0, hk, token, 0, hint);
          tensor_load(at + L::kK + kPanel, &k_map, bar, 0, hk, token, 1, hint);
          load_record(at + L::kRecord, a.record + record(i) * kRecordBytes, bar, hint);
          for (int p = 0; p < kRows / 64; ++p) tensor_load(at + L::kO + p * kPanel, &o_map, bar, 0, ho, token, w.rb * (kRows / 64) + p, hint);
          if (kOutput && i >= kStages) count_done(i - kStages);
        }
        for (int i = max(0, steps - kStages); i < steps; ++i) {
          finish(i);
          if (kOutput) count_done(i);
        }
        before += steps;
      }
    }
    return;
  }
  if (warp >= L::kWarps) {
    if constexpr (kRows == 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 152;");
    const int thread = threadIdx.x - 32 * L::kWarps;
    int before = 0;
    for (int index = blockIdx.x; index < a.walks; index += gridDim.x) {
      const Walk w(s, a, index, blocks);
      const int steps = (w.c1 - w.c0) * groups;
      const auto wanted = [&](int i) {  // this thread's row of step i
        const int t = (w.c1 - 1 - i / groups) * kC + thread / 2;
        return a.wanted == nullptr || i >= steps || t >= w.seq.length || a.wanted[w.seq.begin + t] != 0;
      };
      bool next = wanted(0);
      for (int i = 0; i < steps; ++i) {
        const int stage = (before + i) % kStages, count = min(kC, w.seq.length - (w.c1 - 1 - i / groups) * kC);
        const uint32_t at = base + stage * L::kStage;
        const bool mine = next;
        next = wanted(i + 1);
        barrier_wait(full + 8 * stage, (before + i) / kStages & 1);
        clear_unwanted<kRows / 64>(at + L::kO, mine, thread);
        if (count < kC) {
          clear_rows(at + L::kK, 4 + kRows / 64, count, thread, 128);  // K, Q and dO
          fence_async_proxy();
          named_barrier(2, 128);
        }
        queries<L::kQ, L::kK, L::kRecord + kSharedRows, L::kP>(at, s.scale, s.l2_eps, warp - L::kWarps, lane);
        fence_async_proxy();
        __syncwarp();
        barrier_arrive_warp(ready + 8 * stage, lane);
      }
      before += steps;
    }
    return;
  }
  if constexpr (kRows == 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
  else asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");

  const int panel = warp / 4;
  const int column = 2 * (lane % 4);  // this thread's columns of dS: this one and the next of every eight
  int i = 0;
  for (int index = blockIdx.x; index < a.walks; index += gridDim.x) {
    const Walk w(s, a, index, blocks);
    const int row = w.rb * kRows + 16 * warp + lane / 4;  // and its rows: this one and 8 further on
    const size_t state = (static_cast<size_t>(w.n) * s.Hs + w.hs) * s.D * s.D;
    const size_t segments = (static_cast<size_t>(w.n) * s.Hs + w.hs) * s.segments;

    float S[64];
    {
      const float* from = nullptr;
      const int width = w.last == s.segments ? s.D : kD;  // of what a segment starts from
      if (w.last == s.segments) from = a.d_final == nullptr ? nullptr : a.d_final + state;
      else if (kOutput) from = a.own + (segments + w.last) * kD * kD;
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float2 x = make_float2(0.f, 0.f);
          if (from != nullptr && 8 * j < width && row + 8 * h < width)
            x = *reinterpret_cast<const float2*>(from + (row + 8 * h) * width + 8 * j + column);
          S[4 * j + 2 * h] = x.x;
          S[4 * j + 2 * h + 1] = x.y;
        }
    }

    uint32_t sb[32];  // dS in bfloat16
#pragma unroll
    for (int j = 0; j < 32; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
    for (int c = w.c1 - 1; c >= w.c0; --c) {
      const int token = w.seq.begin + c * kC, count = min(kC, w.seq.length - c * kC);
      const uint64_t hint = soon(w.c1 - 1 - c) ? kEvictNormal : kEvictFirst;
      uint32_t at, rows;
      int stage;
      float x[32], y[32];
      for (int g = 0;;) {
        stage = i % kStages;
        at = base + stage * L::kStage;
        rows = at + L::kRecord + kSharedRows + 4 * column;
        barrier_wait(ready + 8 * stage, (i / kStages) & 1);
        barrier_wait(full + 8 * stage, (i / kStages) & 1);
        // X = dS1 K^T, Y = dO^T P
        if (!kGrouped || g == 0) {
          wgmma_wait<0>();
          keep(S);
          keep(sb);
          wgmma_fence();
#pragma unroll
          for (int kk = 0; kk < 8; ++kk) wgmma_64x64(x, sb + 4 * kk, descriptor_nk(at + L::kK, kk, kPanel), kk > 0);
        } else {
          keep(y);
          wgmma_fence();
        }
#pragma unroll
        for (int kk = 0; kk < 4; ++kk)
          wgmma_ss<1, 1>(y, descriptor_kn(at + L::kO + panel * kPanel, kk), descriptor_kn(at + L::kP, kk), kGrouped && g > 0 ? 1 : kk > 0);
        wgmma_commit();
        if constexpr (kOutput) {
          if (!kGrouped || g == 0)
            store_state(sb, base + L::kState + warp * 4096,
                        a.d_states + (static_cast<size_t>(w.seq.first_chunk + c) * s.Hs + w.hs) * state_bytes(s.D) + (w.rb * kRows + 16 * warp) * 128,
                        s.D, lane, hint);
        }

        // dS = exp(G_C) dS1 + dO^T diag(scale exp(G)) Q
        uint32_t ob[16];
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
          uint32_t v[4];
          const int t = 16 * kk + lane / 16 * 8 + lane % 8, unit = 2 * (warp % 4) + lane / 8 % 2;
          load_matrix_transposed(v, at + L::kO + panel * kPanel + t * 128 + ((unit ^ (t & 7)) << 4));
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            const float2 e = load_shared2(at + L::kP + kPanel + 4 * (column + 16 * kk + 4 * j));
#pragma unroll
            for (int h = 0; h < 2; ++h) ob[4 * kk + j + h] = pack(low(v[j + h]) * e.x, high(v[j + h]) * e.y);
          }
        }
        if (!kGrouped || g == 0) {
          const float decay = power2(load_shared(at + L::kRecord + kSharedRows + 4 * 191));
#pragma unroll
          for (int j = 0; j < 64; ++j) S[j] *= decay;
        }
        keep(S);
        keep(ob);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) wgmma_64x128_kn(S, ob + 4 * kk, descriptor(at + L::kQ + kk * 2048, kPanel, 1024), 1);
        wgmma_commit();
        ++i;
        if (!kGrouped || ++g == groups) break;
        wgmma_wait<0>();
        keep(S);
        keep(ob);
        keep(x);
        keep(y);
        keep(sb);
        barrier_arrive_warp(empty + 8 * stage, lane);
        __syncwarp();
      }
      wgmma_wait<1>();
      keep(x);
      keep(y);
      keep(sb);

      // dU^T = Y + X diag(exp(G_C - G)), W^T = dU^T T
      uint32_t ub[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 f = load_shared2(rows + 4 * (64 + 8 * (j / 2)));
        ub[j] = pack(y[2 * j] + f.x * x[2 * j], y[2 * j + 1] + f.y * x[2 * j + 1]);
      }
      keep(ub);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma_64x64_kn(x, ub + 4 * kk, descriptor_T(at + L::kRecord, kk), kk > 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep(x);
      keep(ub);
      keep(S);

      // dS -= W^T diag(exp(G)) K
      uint32_t ws[16], wb[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 e = load_shared2(rows + 4 * (8 * (j / 2)));
        ws[j] = pack(-e.x * x[2 * j], -e.y * x[2 * j + 1]);
        if constexpr (kOutput) wb[j] = pack(x[2 * j], x[2 * j + 1]);
      }
      keep(ws);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma_64x128_kn(S, ws + 4 * kk, descriptor(at + L::kK + kk * 2048, kPanel, 1024), 1);
      wgmma_commit();
      if constexpr (kOutput)
        store_out(wb, base + L::kOut + warp * kC * 32, a.d_v, nullptr, token, count, static_cast<size_t>(s.Hs) * s.D,
                  w.hs * s.D + w.rb * kRows + 16 * warp, lane, hint);
      wgmma_wait<0>();
      keep(S);
      keep(ws);
#pragma unroll
      for (int j = 0; j < 32; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
      if constexpr (kOutput) {
        if (lane == 0) bulk_wait();
        __syncwarp();  // what the warp has written of this chunk is in memory once its stage is free
      }
      barrier_arrive_warp(empty + 8 * stage, lane);
    }

    float* to = nullptr;
    if (!kOutput) to = a.own + (segments + w.first) * kD * kD;
    else if (a.d_initial != nullptr && w.first == 0) to = a.d_initial + state;
    const int width = kOutput ? s.D : kD;
    if (to != nullptr) {
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (8 * j < width)
            *reinterpret_cast<float2*>(to + (row + 8 * h) * width + 8 * j + column) = make_float2(S[4 * j + 2 * h], S[4 * j + 2 * h + 1]);
    }
  }
}

template <int kRows, bool kOutput, bool kGrouped>
cudaError_t launch(const Shape& s, int blocks, const CUtensorMap* maps, const Arguments& a, cudaStream_t stream) {
  using L = Layout<kRows, kOutput>;
  auto* kernel = backward_recurrence_kernel<kRows, kOutput, kGrouped>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (status != cudaSuccess) return status;
  return static_cast<cudaError_t>(
      ops::cuda::launch_after(kernel, dim3(std::min(a.walks, blocks)), L::kThreads, L::kBytes, stream, maps[0], maps[1], maps[2], s, a));
}

template <bool kGrouped>
cudaError_t launch(const Shape& s, bool output, int rows, int blocks, const CUtensorMap* maps, const Arguments& a, cudaStream_t stream) {
  if (!output) return launch<128, false, kGrouped>(s, blocks, maps, a, stream);
  return rows == 64 ? launch<64, true, kGrouped>(s, blocks, maps, a, stream) : launch<128, true, kGrouped>(s, blocks, maps, a, stream);
}

}  // namespace

cudaError_t launch_backward_recurrence(const OryxGatedDelta& p, const OryxGatedDeltaGradients& d, const Shape& s, bool output, int rows, int merged,
                                       int blocks, const CUtensorMap* maps, const char* record, float* own, char* d_states, void* d_v, uint32_t* done,
                                       cudaStream_t stream) {
  Arguments a{d.d_final_state, own, record, d_states, static_cast<__nv_bfloat16*>(d_v), d.d_initial_state, done, p.wanted};
  a.pieces = output ? (s.segments + merged - 1) / merged : s.segments - 1;
  a.merged = merged, a.skipped = output ? 0 : 1;
  a.walks = s.N * s.Hs * a.pieces * (s.D == 64 ? 1 : kD / rows);
  return s.Ho == s.Hs ? launch<false>(s, output, rows, blocks, maps, a, stream) : launch<true>(s, output, rows, blocks, maps, a, stream);
}

}  // namespace oryx::gated_delta_cuda
