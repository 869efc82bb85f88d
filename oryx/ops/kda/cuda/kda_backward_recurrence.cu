// The walk back over the chunks of a sequence (see kda_cuda.h): dS in registers, 64 rows a warpgroup, everything transposed as in kda_recurrence.cu. Output heads
// that share a state head come one after another within a chunk.
#include "kda_walk.cuh"

namespace oryx::kda_cuda {
namespace {

template <int D, int kRows>
struct Layout {
  static constexpr int kPanels = D / 64;
  static constexpr int kStages = D == 64 ? 3 : 2;
  static constexpr int kWarps = kRows / 16;
  static constexpr int kThreads = 32 * kWarps + (kRows == 128 ? 128 : 32);
  static constexpr int kStart = 0, kQ = kPanels * kPanel, kEnd = 2 * kPanels * kPanel, kO = 3 * kPanels * kPanel;
  static constexpr int kT = kO + kRows / 64 * kPanel, kP = kT + kSharedTriangle, kLast = kP + kSharedTriangle;
  static constexpr int kStage = kLast + 1024;
  static constexpr int kLoaded = kO + kRows / 64 * kPanel + 2 * kTriangle + 4 * D;  // bytes copied in
  static constexpr int kOut = kStages * kStage;           // 64 tokens of 16 rows for each warp
  static constexpr int kState = kOut + kWarps * kC * 32;  // 16 rows of dS1 for each warp
  static constexpr int kBarriers = kState + kWarps * 32 * D;
  static constexpr int kBytes = kBarriers + 16 * kStages + 1024;
};

struct Arguments {
  const float* final;  // gradient of the final state [N, Hs, D, D] or null
  Records from;
  char* d_states;
  __nv_bfloat16* w;
  float* initial;  // gradient of the initial state, or null
  const uint8_t* wanted;
};

template <int D, int kRows, bool kGrouped>
__global__ void __launch_bounds__(Layout<D, kRows>::kThreads, 1)
    backward_recurrence_kernel(const __grid_constant__ CUtensorMap o_map, const Shape s, const Arguments a) {
  using L = Layout<D, kRows>;
  constexpr int kStages = L::kStages, kSteps = D / 16;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t full = base + L::kBarriers, empty = full + 8 * kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kBlocks = D / kRows;
  const int rb = blockIdx.x % kBlocks, hs = blockIdx.x / kBlocks % s.Hs, n = blockIdx.x / kBlocks / s.Hs, groups = s.Ho / s.Hs;
  const Sequence seq = sequence(s, n);
  const int chunks = (seq.length + kC - 1) / kC;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, L::kWarps * kWarpArrivals);
    }
    barrier_init_fence();
  }
  for (int i = 0; i < kStages; ++i) {
    clear_triangle(base + i * L::kStage + L::kT, threadIdx.x, L::kThreads);
    clear_triangle(base + i * L::kStage + L::kP, threadIdx.x, L::kThreads);
  }
  __syncthreads();

  if (warp >= L::kWarps) {
    if constexpr (kRows == 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp > L::kWarps || lane != 0) return;
    int i = 0;
    for (int c = chunks - 1; c >= 0; --c)
      for (int g = 0; g < groups; ++g, ++i) {
        const int stage = i % kStages, ho = hs * groups + g;
        const uint32_t at = base + stage * L::kStage, bar = full + 8 * stage;
        if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) & 1);
        barrier_expect(bar, L::kLoaded);
        const size_t by_state = static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs, by_output = static_cast<size_t>(seq.first_chunk + c) * s.Ho + ho;
        const char* const keys = a.from.keys + by_state * keys_bytes(D);
        for (int p = 0; p < kRows / 64; ++p) tensor_load(at + L::kO + p * kPanel, &o_map, bar, 0, ho, seq.begin + c * kC, rb * (kRows / 64) + p);
        bulk_load(at + L::kEnd, keys + keys_end(D), image_bytes(D), bar);
        load_triangle(at + L::kP, a.from.P + by_output * kTriangle, bar);
        bulk_load(at + L::kQ, a.from.queries + by_output * image_bytes(D), image_bytes(D), bar);
        load_triangle(at + L::kT, a.from.T + by_state * kTriangle, bar);
        bulk_load(at + L::kStart, keys + keys_start(D), image_bytes(D), bar);
        bulk_load(at + L::kLast, keys, 4 * D, bar);
      }
    return;
  }

  if constexpr (kRows == 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int panel = warp / 4;                         // 64 rows of this warpgroup
  const int row = rb * kRows + 16 * warp + lane / 4;  // this thread's rows of dS: this one and 8 further on
  const int column = 2 * (lane % 4);                  // and its columns: this one and the next of every eight
  const size_t state = (static_cast<size_t>(n) * s.Hs + hs) * D * D;
  float S[D / 2];
  load_state(S, a.final == nullptr ? nullptr : a.final + state, row, column);
  uint32_t sb[D / 4];  // dS in bfloat16
#pragma unroll
  for (int j = 0; j < D / 4; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
  int i = 0;
  for (int c = chunks - 1; c >= 0; --c) {
    const int token = seq.begin + c * kC, count = min(kC, seq.length - c * kC);
    float x[32];
    int stage = i % kStages;
    uint32_t at = base + stage * L::kStage;
    uint32_t ob[16];  // dO^T
    const auto load_upstream = [&] {
      barrier_wait(full + 8 * stage, (i / kStages) & 1);
      ++i;
      if (count < kC || a.wanted != nullptr) {  // rows of dO that count as zero
        for (int m = threadIdx.x; m < kC * 8 * (kRows / 64); m += 32 * L::kWarps) {
          const int t = m / 8 % kC;
          if (t >= count || (a.wanted != nullptr && a.wanted[token + t] == 0))
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at + L::kO + m / 8 / kC * kPanel + t * 128 + m % 8 * 16), "r"(0) : "memory");
        }
        named_barrier(1, 32 * L::kWarps);
      }
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) {
        uint32_t v[4];
        const int t = 16 * kk + lane / 16 * 8 + lane % 8, unit = 2 * (warp % 4) + lane / 8 % 2;
        load_matrix_transposed(v, at + L::kO + panel * kPanel + t * 128 + ((unit ^ (t & 7)) << 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) ob[4 * kk + j] = v[j];
      }
    };

    // dU^T = dS1 (e K)^T + dO^T P,  dS = dS1 diag(c_C) + dO^T (scale c Q)
    load_upstream();
    keep(ob);
    keep(sb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) wgmma_64x64(x, sb + 4 * kk, descriptor_nk(at + L::kEnd, kk, kPanel), kk > 0);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64_kn(x, ob + 4 * kk, descriptor_T(at + L::kP, kk), 1);
    wgmma_commit();
    store_state_rows<D>(sb, base + L::kState + warp * 32 * D,
                        a.d_states + (static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs) * state_bytes(D) + (rb * kRows + 16 * warp) * 128, lane);
    decay_columns(S, at + L::kLast, column);
    keep(S);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma<true>(S, ob + 4 * kk, descriptor(at + L::kQ + kk * 2048, kPanel, 1024), 1);
    wgmma_commit();
    if constexpr (kGrouped) {
      for (int g = 1; g < groups; ++g) {  // the state head's other output heads
        wgmma_wait<0>();
        keep(x);
        keep(S);
        keep(ob);
        barrier_arrive_warp(empty + 8 * stage, lane);
        stage = i % kStages, at = base + stage * L::kStage;
        load_upstream();
        keep(ob);
        keep(x);
        keep(S);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) wgmma_64x64_kn(x, ob + 4 * kk, descriptor_T(at + L::kP, kk), 1);
        wgmma_commit();
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) wgmma<true>(S, ob + 4 * kk, descriptor(at + L::kQ + kk * 2048, kPanel, 1024), 1);
        wgmma_commit();
      }
      wgmma_wait<0>();
      keep(S);
    } else {
      wgmma_wait<1>();
    }
    keep(x);
    keep(sb);

    // W^T = dU^T T
    uint32_t ub[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) ub[j] = pack(x[2 * j], x[2 * j + 1]);
    keep(ub);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64_kn(x, ub + 4 * kk, descriptor_T(at + L::kT, kk), kk > 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(x);
    keep(ub);
    keep(S);

    // dS -= W^T (c K)
    uint32_t ws[16], wb[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      ws[j] = pack(-x[2 * j], -x[2 * j + 1]);
      wb[j] = pack(x[2 * j], x[2 * j + 1]);
    }
    keep(ws);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma<true>(S, ws + 4 * kk, descriptor(at + L::kStart + kk * 2048, kPanel, 1024), 1);
    wgmma_commit();
    store_out(wb, base + L::kOut + warp * kC * 32, a.w, nullptr, token, count, static_cast<size_t>(s.Hs) * D, hs * D + rb * kRows + 16 * warp, lane, kEvictNormal);
    wgmma_wait<0>();
    keep(S);
    keep(ws);
#pragma unroll
    for (int j = 0; j < D / 4; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
    barrier_arrive_warp(empty + 8 * stage, lane);
  }
  if (a.initial != nullptr) write_state(S, a.initial + state, row, column);
  if (lane == 0) bulk_wait();
}

template <int D, int kRows, bool kGrouped>
cudaError_t launch(const Shape& s, const CUtensorMap& o_map, const Arguments& a, cudaStream_t stream) {
  using L = Layout<D, kRows>;
  static_assert(L::kBytes <= 227 * 1024);
  auto* kernel = backward_recurrence_kernel<D, kRows, kGrouped>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<s.N * s.Hs * (D / kRows), L::kThreads, L::kBytes, stream>>>(o_map, s, a);
  return cudaGetLastError();
}

template <bool kGrouped>
cudaError_t launch(const Shape& s, int rows, const CUtensorMap& o_map, const Arguments& a, cudaStream_t stream) {
  if (s.D == 64) return launch<64, 64, kGrouped>(s, o_map, a, stream);
  return rows == 64 ? launch<128, 64, kGrouped>(s, o_map, a, stream) : launch<128, 128, kGrouped>(s, o_map, a, stream);
}

}  // namespace

cudaError_t launch_backward_recurrence(const OryxKda& p, const OryxKdaGradients& d, const Shape& s, int rows, const CUtensorMap& o_map, const Records& from,
                                       char* d_states, void* w, cudaStream_t stream) {
  const Arguments a{d.d_final_state, from, d_states, static_cast<__nv_bfloat16*>(w), d.d_initial_state, p.wanted};
  return s.Ho == s.Hs ? launch<false>(s, rows, o_map, a, stream) : launch<true>(s, rows, o_map, a, stream);
}

}  // namespace oryx::kda_cuda
