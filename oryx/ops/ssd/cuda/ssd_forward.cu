// The forward pass (see ssd_cuda.h). In a block one warpgroup has 64 rows of S in registers and walks the chunks;
// before each chunk it leaves S in bfloat16 for one of two others, which take turns at the chunks' outputs. Of the
// fourth one warp copies the inputs in, kStages chunks ahead, and one computes the scalars.
#include "oryx/ops/cuda/tensor_map.h"
#include "oryx/ops/ssd/cuda/ssd_cuda_internal.cuh"

namespace oryx::ssd_cuda {
namespace {

constexpr int kStages = 4;

template <int kK>
struct Layout {
  static constexpr int kPanels = kK / 64;
  static constexpr int kKeys = 0;
  static constexpr int kValues = kPanels * kPanel;
  static constexpr int kQueries = kValues + kPanel;
  static constexpr int kScalars = kQueries + kPanels * kPanel;
  static constexpr int kStage = kScalars + kScalarBytes;
  static constexpr int kState = kStages * kStage;  // two, in bfloat16
  static constexpr int kStateBytes = kPanels * kPanel;
  static constexpr int kOut = kState + 2 * kStateBytes;  // 64 tokens of 64 elements for each of two warpgroups
  static constexpr int kAhead = kOut + 2 * kPanel;       // dt_raw of the chunks to come
  static constexpr int kBarriers = kAhead + Ahead<8>::kSize;
  static constexpr int kBytes = kBarriers + 24 * kStages + 40 + 1024;  // and what aligning the start to 1024 may take
};

struct Arguments {
  const float* dt_raw;
  const float* dt_bias;
  const float* A_log;
  const float* D;
  const float* initial;
  const uint8_t* wanted;
  __nv_bfloat16* o;
  float* final_state;
  Segments segments;
};

// One chunk's output of 64 value rows, by a warpgroup; `at` is the stage, `state` S before the chunk.
template <int kK>
__device__ __forceinline__ void output(uint32_t at, uint32_t state, uint32_t ready, uint32_t ready_phase,
                                       uint32_t state_free, uint32_t stage_free, uint32_t staging, float D, int warp,
                                       int lane, uint32_t (&ob)[16]) {
  using L = Layout<kK>;
  float p[32], o[32];
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kK / 16; ++kk)
    wgmma_64x64_shared(p, descriptor(at + L::kQueries + kk / 4 * kPanel + kk % 4 * 32, 16, 1024),
                       descriptor(at + L::kKeys + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
  wgmma_commit();
  barrier_wait(ready, ready_phase);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kK / 16; ++kk)
    wgmma_64x64_shared(o, descriptor(at + L::kQueries + kk / 4 * kPanel + kk % 4 * 32, 16, 1024),
                       descriptor(state + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
  wgmma_commit();
  const uint32_t scalars = at + L::kScalars, row = 4 * (16 * warp + lane / 4), column = 8 * (lane % 4);
  const float G[2] = {load_shared(scalars + kG + row), load_shared(scalars + kG + row + 32)};
  wgmma_wait<0>();
  keep(p);
  keep(o);
  barrier_arrive_warp(state_free, lane);
  uint32_t pb[16];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    pb[2 * n] = pb[2 * n + 1] = 0;
    if (n > 2 * warp + 1) continue;  // above the diagonal
    const float2 g = load_shared2(scalars + kShifted + 32 * n + column);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float p0 = power2(G[h] - g.x) * p[4 * n + 2 * h], p1 = power2(G[h] - g.y) * p[4 * n + 2 * h + 1];
      const int t = 16 * warp + lane / 4 + 8 * h, j = 8 * n + 2 * (lane % 4);
      pb[2 * n + h] = n < 2 * warp ? pack(p0, p1) : pack(j <= t ? p0 : 0.f, j + 1 <= t ? p1 : 0.f);
    }
  }
  const float gamma[2] = {power2(G[0]), power2(G[1])};
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) o[4 * n + i] *= gamma[i / 2];
  keep(o);
  keep(pb);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk)
    wgmma_64x64_kn(o, pb + 4 * kk, descriptor(at + L::kValues + kk * 2048, kPanel, 1024), 1);
  wgmma_commit();
  uint32_t v[16];
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    const int t = 16 * warp + lane % 16;
    uint32_t r[4];
    load_matrix(r, at + L::kValues + t * 128 + (((2 * kk + lane / 16) ^ (t & 7)) << 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) v[4 * kk + i] = r[i];
  }
  wgmma_wait<0>();
  keep(o);
  keep(pb);
  barrier_arrive_warp(stage_free, lane);
#pragma unroll
  for (int i = 0; i < 16; ++i) ob[i] = pack(o[2 * i] + D * low(v[i]), o[2 * i + 1] + D * high(v[i]));
}

template <int kK>
__global__ void __launch_bounds__(512, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const Shape s, const Arguments a) {
  using L = Layout<kK>;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t full = base + L::kBarriers, empty = full + 8 * kStages, ready = empty + 8 * kStages,
                 state_free = ready + 16, aside = state_free + 16, masks = aside + 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;

  wait_for_previous();  // who may write the bounds of sequences
  const int blocks = s.V / 64, rb = blockIdx.x % blocks, ho = blockIdx.x / blocks % s.Ho,
            n = blockIdx.x / blocks / s.Ho, segment = blockIdx.y;
  const int hs = ho / (s.Ho / s.Hs);
  const Sequence seq = sequence(s, n);
  const Range range = segment_chunks(seq.length, segment, s.segments);
  const int chunks = range.last - range.first, start = seq.begin + range.first * kC,
            length = seq.length - range.first * kC;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 2 * kWarpArrivals);
      barrier_init(empty + 8 * i, 8 * kWarpArrivals);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(ready + 8 * i, 4 * kWarpArrivals);
      barrier_init(state_free + 8 * i, 4 * kWarpArrivals);
    }
    barrier_init(aside, 1);
    barrier_init_fence();
  }
  __syncthreads();

  if (group == 3) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
    if (warp == 0) {  // copies
      const int hq = ho / (s.Ho / s.Hq), hk = hs / (s.Hs / s.Hk), hv = hs / (s.Hs / s.Hv);
      const auto wanted_of = [&](int i) {
        return wanted_rows(a.wanted, start + i * kC, min(kC, length - i * kC), lane);
      };
      uint64_t ahead = chunks > 0 ? wanted_of(0) : 0;
      for (int i = 0; i < chunks; ++i) {
        const uint64_t wanted = ahead;
        if (i + 1 < chunks) ahead = wanted_of(i + 1);
        const int stage = i % kStages, token = start + i * kC, count = length - i * kC;
        const uint32_t at = base + stage * L::kStage, bar = count >= kC ? full + 8 * stage : aside;
        if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) & 1);
        if (lane == 0) {
          asm volatile("st.shared.b64 [%0], %1;" ::"r"(masks + 8 * stage), "l"(wanted) : "memory");
          barrier_expect(bar, wanted != 0 ? L::kScalars : L::kQueries);
          for (int p = 0; p < L::kPanels; ++p) tensor_load(at + L::kKeys + p * kPanel, &k_map, bar, 0, hk, token, p);
          tensor_load(at + L::kValues, &v_map, bar, 0, hv, token, rb);
          if (wanted != 0)
            for (int p = 0; p < L::kPanels; ++p)
              tensor_load(at + L::kQueries + p * kPanel, &q_map, bar, 0, hq, token, p);
        }
        if (count < kC) {  // what follows the sequence in memory, whatever it is, counts for nothing
          barrier_wait(aside, 0);
          clear_rows(at + L::kKeys, L::kPanels + 1, first_rows(count), lane);
          fence_async_proxy();
          __syncwarp();
          barrier_arrive_warp(full + 8 * stage, lane);
        } else {
          barrier_arrive_others(full + 8 * stage, lane);
        }
      }
    } else if (warp == 1) {  // scalars
      const float bias = a.dt_bias[hs], rate = log2_rate(a.A_log[hs]);
      Ahead<8>::run(
          base + L::kAhead, chunks, lane,
          [&](int i, uint32_t slot) { copy_steps(slot, a.dt_raw, s.Hs, hs, start + i * kC, length - i * kC, lane); },
          [&](int i, uint32_t slot) {
            const int stage = i % kStages;
            const float2 raw = load_shared2(slot);
            if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) & 1);
            chunk_scalars<true>(base + stage * L::kStage + L::kScalars, raw, bias, rate, length - i * kC, lane);
            __syncwarp();
            barrier_arrive_warp(full + 8 * stage, lane);
          });
    }
  } else if (group > 0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
    const int turn = group - 1;
    const float D = a.D[hs];
    const size_t stride = static_cast<size_t>(s.Ho) * s.V;
    __nv_bfloat16* const o = a.o + static_cast<size_t>(ho) * s.V + rb * 64;
    const uint32_t staging = base + L::kOut + turn * kPanel + warp * 2048,
                   state = base + L::kState + turn * L::kStateBytes;
    for (int i = turn; i < chunks; i += 2) {
      const int stage = i % kStages, token = start + i * kC, count = length - i * kC;
      const uint32_t at = base + stage * L::kStage;
      uint32_t ob[16] = {};
      barrier_wait(full + 8 * stage, (i / kStages) & 1);
      uint64_t wanted;
      asm volatile("ld.shared.b64 %0, [%1];" : "=l"(wanted) : "r"(masks + 8 * stage) : "memory");
      if (wanted != 0) {
        output<kK>(at, state, ready + 8 * turn, (i / 2) & 1, state_free + 8 * turn, empty + 8 * stage, staging, D, warp,
                   lane, ob);
      } else {
        barrier_wait(ready + 8 * turn, (i / 2) & 1);
        barrier_arrive_warp(state_free + 8 * turn, lane);
        barrier_arrive_warp(empty + 8 * stage, lane);
      }
      store_out(ob, staging, o + static_cast<size_t>(token) * stride, stride, wanted, count, warp, lane);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 144;");
    const size_t walk = (static_cast<size_t>(n) * s.Hs + hs) * blocks + rb;
    State<kK> S;
    S.clear();
    if (segment > 0)
      segment_start(S, a.segments, walk * s.segments * s.pieces, segment * s.pieces, warp, lane);
    else if (a.initial != nullptr)
      S.add(a.initial + walk * 64 * kK, 1.f, warp, lane);
    // The rows of the next chunk are made while this one's product runs.
    uint32_t even[16], odd[16];
    const auto load = [&](int i, uint32_t(&to)[16]) {
      const int stage = i % kStages;
      const uint32_t at = base + stage * L::kStage;
      barrier_wait(full + 8 * stage, (i / kStages) & 1);
      S.load_rows(to, at + L::kValues, at + L::kScalars + kTail, warp, lane);
    };
    const auto chunk = [&](int i, int turn, uint32_t(&now)[16], uint32_t(&next)[16]) {
      const int stage = i % kStages;
      const uint32_t at = base + stage * L::kStage;
      if (i >= 2) barrier_wait(state_free + 8 * turn, (i / 2 - 1) & 1);
      S.stage(base + L::kState + turn * L::kStateBytes, warp, lane);
      fence_async_proxy();
      __syncwarp();
      barrier_arrive_warp(ready + 8 * turn, lane);
      S.advance(now, at + L::kKeys, power2(load_shared(at + L::kScalars + kG + 252)));
      if (i + 1 < chunks) load(i + 1, next);
      S.settle(now);
      barrier_arrive_warp(empty + 8 * stage, lane);
    };
    if (chunks > 0) load(0, even);
    for (int i = 0; i < chunks; i += 2) {
      chunk(i, 0, even, odd);
      if (i + 1 < chunks) chunk(i + 1, 1, odd, even);
    }
    if (a.final_state != nullptr && segment == s.segments - 1 && ho % (s.Ho / s.Hs) == 0)
      S.write(a.final_state + walk * 64 * kK, warp, lane);
  }
}

template <int kK>
cudaError_t launch(const Shape& s, const Arguments& a, const CUtensorMap* maps, cudaStream_t stream) {
  auto* kernel = forward_kernel<kK>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<kK>::kBytes);
  if (status != cudaSuccess) return status;
  // The blocks of a head's values read the same queries and keys.
  return static_cast<cudaError_t>(launch_clusters_after(s.V / 64, kernel, dim3(s.N * s.Ho * (s.V / 64), s.segments),
                                                        512, Layout<kK>::kBytes, stream, maps[2], maps[0], maps[1], s,
                                                        a));
}

__global__ void wanted_kernel(const int32_t* spans, int B, int T, uint8_t* wanted) {
  const int row = spans[3 * blockIdx.x], begin = max(spans[3 * blockIdx.x + 1], 0),
            end = min(spans[3 * blockIdx.x + 2], T);
  if (row < 0 || row >= B) return;
  for (int t = begin + threadIdx.x; t < end; t += blockDim.x) wanted[static_cast<size_t>(row) * T + t] = 1;
}

Shape forward_shape(const OryxSsd& p) {
  Shape s = make_shape(p);
  const int64_t chunks = s.N > 0 ? static_cast<int64_t>(p.B) * p.T / s.N / kC : 0;
  const auto walks = [&](int heads) { return static_cast<int64_t>(s.N) * heads * (s.V / 64); };
  s.segments = p.segments != 0 ? p.segments : choose_segments(walks(s.Ho), chunks);
  s.pieces = s.N > 0 ? choose_pieces(walks(s.Hs), 1, s.segments, chunks) : 1;
  return s;
}
// Number of `Segments` entries.
size_t entries(const Shape& s) {
  return s.segments > 1 ? static_cast<size_t>(s.N) * s.Hs * (s.V / 64) * s.segments * s.pieces : 0;
}

}  // namespace

cudaError_t encode(CUtensorMap* map, const void* data, int64_t tokens, int heads, int dim) {
  const cuuint64_t row = 2 * static_cast<cuuint64_t>(dim);
  const cuuint64_t sizes[4] = {64, static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens),
                               static_cast<cuuint64_t>(dim / 64)};
  const cuuint64_t strides[3] = {row, heads * row, 128};
  const cuuint32_t box[4] = {64, 1, kC, 1};
  return ops::cuda::encode_tensor_map(map, data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace oryx::ssd_cuda

using namespace oryx::ssd_cuda;

extern "C" size_t oryx_ssd_workspace(const OryxSsd* p) {
  const Shape s = forward_shape(*p);
  return entries(s) * (64 * s.K + 1) * sizeof(float);
}

extern "C" int oryx_ssd_forward(const OryxSsd* p, void* workspace, cudaStream_t stream) {
  const Shape s = forward_shape(*p);
  if (s.N == 0) return cudaSuccess;
  const int64_t tokens = static_cast<int64_t>(p->B) * p->T;
  CUtensorMap maps[4] = {};
  cudaError_t status = cudaSuccess;
  if (tokens > 0) {
    if ((status = encode(&maps[0], p->k, tokens, p->Hk, p->K)) != cudaSuccess) return status;
    if ((status = encode(&maps[1], p->v, tokens, p->Hv, p->V)) != cudaSuccess) return status;
    if ((status = encode(&maps[2], p->q, tokens, p->Hq, p->K)) != cudaSuccess) return status;
  }
  const Segments segments{static_cast<float*>(workspace), static_cast<float*>(workspace) + entries(s) * 64 * s.K};
  if (s.segments > 1) {
    Walk w{};
    w.directions = 1, w.dt_raw = p->dt_raw, w.dt_bias = p->dt_bias, w.A_log = p->A_log;
    w.start[0] = p->initial_state, w.segments[0] = segments;
    if ((status = launch_walk(s, w, true, maps, stream)) != cudaSuccess) return status;
  }
  const Arguments a{
      p->dt_raw,      p->dt_bias, p->A_log, p->D, p->initial_state, p->wanted, static_cast<__nv_bfloat16*>(p->o),
      p->final_state, segments};
  return s.K == 128 ? launch<128>(s, a, maps, stream) : launch<64>(s, a, maps, stream);
}

extern "C" int oryx_ssd_wanted(const int32_t* spans, int32_t n, int32_t B, int32_t T, uint8_t* wanted,
                               cudaStream_t stream) {
  const cudaError_t status = cudaMemsetAsync(wanted, 0, static_cast<size_t>(B) * T, stream);
  if (status != cudaSuccess || n == 0) return status;
  wanted_kernel<<<n, 256, 0, stream>>>(spans, B, T, wanted);
  return cudaGetLastError();
}
