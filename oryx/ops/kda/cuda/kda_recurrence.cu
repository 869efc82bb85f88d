// The walk over the chunks of a sequence (see kda_cuda.h), everything transposed: a warpgroup keeps 64 rows of S (float32) in registers, so that S,
// V - (c k) S^T and U are left operands straight from registers and no product waits for shared memory written by another. One more warp copies the inputs
// in, kStages chunks ahead. As gated_delta_recurrence.cu.
#include "kda_walk.cuh"

namespace oryx::kda_cuda {
namespace {

template <int D, int kRows, bool kSave>
struct Layout {
  static constexpr int kPanels = D / 64;
  static constexpr int kStages = D == 64 ? 3 : 2;
  static constexpr int kWarps = kRows / 16;
  // The copying warp; beside eight others registers are traded, which whole warpgroups do.
  static constexpr int kThreads = 32 * kWarps + (kRows == 128 ? 128 : 32);
  static constexpr int kStart = 0, kQ = kPanels * kPanel, kEnd = 2 * kPanels * kPanel, kV = 3 * kPanels * kPanel;
  static constexpr int kT = kV + kRows / 64 * kPanel, kP = kT + kSharedTriangle, kLast = kP + kSharedTriangle;
  static constexpr int kStage = kLast + 1024;
  static constexpr int kLoaded = kV + kRows / 64 * kPanel + 2 * kTriangle + 4 * D;  // bytes copied in
  static constexpr int kOut = kStages * kStage;           // 64 tokens of 16 rows for each warp
  static constexpr int kState = kOut + kWarps * kC * 32;  // 16 rows of S for each warp
  static constexpr int kBarriers = kState + (kSave ? kWarps * 32 * D : 0);
  static constexpr int kBytes = kBarriers + 16 * kStages + 1024;  // and what aligning the start to 1024 may take
};

struct Arguments {
  const float* initial;  // [N, Hs, D, D] or null
  Records from;
  char* states;
  __nv_bfloat16 *o, *u;
  float* final_state;
  const uint8_t* wanted;
};

template <int D, int kRows, bool kSave>
__global__ void __launch_bounds__(Layout<D, kRows, kSave>::kThreads, 1) recurrence_kernel(const __grid_constant__ CUtensorMap v_map, const Shape s, const Arguments a) {
  using L = Layout<D, kRows, kSave>;
  constexpr int kStages = L::kStages, kSteps = D / 16;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t full = base + L::kBarriers, empty = full + 8 * kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kBlocks = D / kRows;
  const int rb = blockIdx.x % kBlocks, ho = blockIdx.x / kBlocks % s.Ho, n = blockIdx.x / kBlocks / s.Ho, hs = ho / (s.Ho / s.Hs);
  const bool first = ho % (s.Ho / s.Hs) == 0;
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
    const int hv = hs / (s.Hs / s.Hv);
    for (int c = 0; c < chunks; ++c) {
      const int stage = c % kStages;
      const uint32_t at = base + stage * L::kStage, bar = full + 8 * stage;
      if (c >= kStages) barrier_wait(empty + 8 * stage, (c / kStages - 1) & 1);
      barrier_expect(bar, L::kLoaded);
      const size_t by_state = static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs, by_output = static_cast<size_t>(seq.first_chunk + c) * s.Ho + ho;
      const char* const keys = a.from.keys + by_state * keys_bytes(D);
      bulk_load(at + L::kStart, keys + keys_start(D), image_bytes(D), bar);
      for (int p = 0; p < kRows / 64; ++p) tensor_load(at + L::kV + p * kPanel, &v_map, bar, 0, hv, seq.begin + c * kC, rb * (kRows / 64) + p);
      load_triangle(at + L::kT, a.from.T + by_state * kTriangle, bar);
      bulk_load(at + L::kQ, a.from.queries + by_output * image_bytes(D), image_bytes(D), bar);
      load_triangle(at + L::kP, a.from.P + by_output * kTriangle, bar);
      bulk_load(at + L::kEnd, keys + keys_end(D), image_bytes(D), bar);
      bulk_load(at + L::kLast, keys, 4 * D, bar);
    }
    return;
  }

  if constexpr (kRows == 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int panel = warp / 4;                         // 64 rows of this warpgroup
  const int row = rb * kRows + 16 * warp + lane / 4;  // this thread's rows of S: this one and 8 further on
  const int column = 2 * (lane % 4);                  // and its columns: this one and the next of every eight
  const size_t state = (static_cast<size_t>(n) * s.Hs + hs) * D * D;
  float S[D / 2];
  load_state(S, a.initial == nullptr ? nullptr : a.initial + state, row, column);
  uint32_t sb[D / 4];  // S in bfloat16
#pragma unroll
  for (int j = 0; j < D / 4; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
  uint32_t ob[16];  // O of the chunk before
  const uint32_t staging = base + L::kOut + warp * kC * 32;
  const int out_column = ho * D + rb * kRows + 16 * warp;
  for (int c = 0; c < chunks; ++c) {
    const int stage = c % kStages;
    const uint32_t at = base + stage * L::kStage;
    const int token = seq.begin + c * kC, count = min(kC, seq.length - c * kC);
    barrier_wait(full + 8 * stage, (c / kStages) & 1);
    if (count < kC) {
      clear_rows(at + L::kV, kRows / 64, count, threadIdx.x, 32 * L::kWarps);
      fence_async_proxy();
      named_barrier(1, 32 * L::kWarps);
    }

    float x[32], o[32];
    keep(sb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) wgmma_64x64(x, sb + 4 * kk, descriptor_nk(at + L::kStart, kk, kPanel), kk > 0);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) wgmma_64x64(o, sb + 4 * kk, descriptor_nk(at + L::kQ, kk, kPanel), kk > 0);
    wgmma_commit();
    store_out(ob, staging, a.o, a.wanted, token - kC, c > 0 ? kC : 0, static_cast<size_t>(s.Ho) * D, out_column, lane, kEvictNormal);
    wgmma_wait<1>();
    keep(x);

    // X^T = V^T - S (c K)^T, then U^T = X^T T^T.
    uint32_t xb[16];
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t v[4];
      const int t = 16 * kk + lane / 16 * 8 + lane % 8, unit = 2 * (warp % 4) + lane / 8 % 2;
      load_matrix_transposed(v, at + L::kV + panel * kPanel + t * 128 + ((unit ^ (t & 7)) << 4));
#pragma unroll
      for (int j = 0; j < 4; ++j) xb[4 * kk + j] = pack(low(v[j]) - x[8 * kk + 2 * j], high(v[j]) - x[8 * kk + 2 * j + 1]);
    }
    float u[32];
    wgmma_wait<0>();
    keep(o);
    keep(sb);
    keep(xb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64(u, xb + 4 * kk, descriptor_T_transposed(at + L::kT, kk), kk > 0);
    wgmma_commit();
    if constexpr (kSave) {
      if (first)
        store_state_rows<D>(sb, base + L::kState + warp * 32 * D,
                            a.states + (static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs) * state_bytes(D) + (rb * kRows + 16 * warp) * 128, lane);
    }
    decay_columns(S, at + L::kLast, column);
    keep(S);
    wgmma_wait<0>();
    keep(u);
    keep(xb);

    // S = S diag(c_C) + U^T (e K),  O^T = S0 (scale c Q)^T + U^T P^T
    uint32_t ub[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) ub[j] = pack(u[2 * j], u[2 * j + 1]);
    keep(ub);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma<true>(S, ub + 4 * kk, descriptor(at + L::kEnd + kk * 2048, kPanel, 1024), 1);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64(o, ub + 4 * kk, descriptor_T_transposed(at + L::kP, kk), 1);
    wgmma_commit();
    wgmma_wait<1>();
    keep(S);
#pragma unroll
    for (int j = 0; j < D / 4; ++j) sb[j] = pack(S[2 * j], S[2 * j + 1]);
    wgmma_wait<0>();
    keep(o);
    keep(ub);
    barrier_arrive_warp(empty + 8 * stage, lane);
    if constexpr (kSave) {
      if (first)
        store_out(ub, staging, a.u, nullptr, token, count, static_cast<size_t>(s.Hs) * D, hs * D + rb * kRows + 16 * warp, lane, kEvictNormal);
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) ob[j] = pack(o[2 * j], o[2 * j + 1]);
  }
  if (chunks > 0)
    store_out(ob, staging, a.o, a.wanted, seq.begin + (chunks - 1) * kC, seq.length - (chunks - 1) * kC, static_cast<size_t>(s.Ho) * D, out_column, lane,
              kEvictNormal);
  if (a.final_state != nullptr && first) write_state(S, a.final_state + state, row, column);
  if constexpr (kSave) {
    if (lane == 0) bulk_wait();
  }
}

template <int D, int kRows, bool kSave>
cudaError_t launch(const Shape& s, const CUtensorMap& v_map, const Arguments& a, cudaStream_t stream) {
  using L = Layout<D, kRows, kSave>;
  static_assert(L::kBytes <= 227 * 1024);
  auto* kernel = recurrence_kernel<D, kRows, kSave>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<s.N * s.Ho * (D / kRows), L::kThreads, L::kBytes, stream>>>(v_map, s, a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_recurrence(const OryxKda& p, const Shape& s, int rows, const CUtensorMap& v_map, const Records& from, char* states, void* u, cudaStream_t stream) {
  const Arguments a{p.initial_state, from, states, static_cast<__nv_bfloat16*>(p.o), static_cast<__nv_bfloat16*>(u), p.final_state, p.wanted};
  if (s.D == 64) return states != nullptr ? launch<64, 64, true>(s, v_map, a, stream) : launch<64, 64, false>(s, v_map, a, stream);
  if (rows == 64) return states != nullptr ? launch<128, 64, true>(s, v_map, a, stream) : launch<128, 64, false>(s, v_map, a, stream);
  return states != nullptr ? launch<128, 128, true>(s, v_map, a, stream) : launch<128, 128, false>(s, v_map, a, stream);
}

}  // namespace oryx::kda_cuda
