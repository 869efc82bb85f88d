// Walks over the chunks of a sequence without outputs: the state before every chunk (backward needs it), and what
// segments start from. One warpgroup has 64 rows of S in registers; of two more warps one copies the inputs in, one
// computes the scalars.
#include "oryx/ops/ssd/cuda/ssd_cuda_internal.cuh"

namespace oryx::ssd_cuda {
namespace {

constexpr int kStages = 3;

template <int kK, bool kStore>
struct Layout {
  static constexpr int kPanels = kK / 64;
  static constexpr int kColumns = 0;
  static constexpr int kRows = kPanels * kPanel;
  static constexpr int kScalars = kRows + kPanel;
  static constexpr int kStage = kScalars + kScalarBytes;
  static constexpr int kState = kPanels * kPanel;
  static constexpr int kOut = kStages * kStage;
  static constexpr int kAhead = kOut + (kStore ? 2 * kState : 0);  // dt_raw of the chunks to come
  static constexpr int kBarriers = kAhead + Ahead<8>::kSize;
  static constexpr int kBytes = kBarriers + 16 * kStages + 8 + 1024;  // and what aligning the start to 1024 may take
};

template <int kK, bool kStore>
__global__ void __launch_bounds__(192, 2)
    walk_kernel(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap d_map, const Shape s,
                const __grid_constant__ Walk w) {
  using L = Layout<kK, kStore>;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t full = base + L::kBarriers, empty = full + 8 * kStages, aside = empty + 8 * kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  wait_for_previous();  // who may write the bounds of sequences
  const int blocks = s.V / 64, rb = blockIdx.x % blocks, hs = blockIdx.x / blocks % s.Hs,
            n = blockIdx.x / blocks / s.Hs;
  const int direction = w.direction + blockIdx.z, segment = blockIdx.y, readers = direction == 0 ? 1 : s.Ho / s.Hs;
  const Sequence seq = sequence(s, n);
  const int parts = kStore ? s.segments : s.segments * s.pieces;  // `segment` is one of them
  const Range range = segment_chunks(seq.length, direction == 0 ? segment : parts - 1 - segment, parts);
  const int items = (range.last - range.first) * readers;
  const auto chunk_of = [&](int i) { return direction == 0 ? range.first + i : range.last - 1 - i / readers; };

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 2 * kWarpArrivals);
      barrier_init(empty + 8 * i, 4 * kWarpArrivals);
    }
    barrier_init(aside, 1);
    barrier_init_fence();
  }
  __syncthreads();
  // Not of the pass that finds segments: what comes next has one block a multiprocessor, and started early those that
  // read the same land far from each other.
  if constexpr (kStore) launch_dependents();

  if (warp == 4) {  // copies
    const auto keep_of = [&](int i) {
      const int c = chunk_of(i), count = min(kC, seq.length - c * kC);
      return direction == 0 ? first_rows(count) : wanted_rows(w.wanted, seq.begin + c * kC, count, lane);
    };
    uint32_t phase = 0;
    uint64_t ahead = items > 0 ? keep_of(0) : 0;
    for (int i = 0; i < items; ++i) {
      const uint64_t keep = ahead;
      if (i + 1 < items) ahead = keep_of(i + 1);
      const int stage = i % kStages, token = seq.begin + chunk_of(i) * kC, ho = hs * readers + i % readers;
      const uint32_t at = base + stage * L::kStage, bar = keep == ~0ull ? full + 8 * stage : aside;
      if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) & 1);
      if (lane == 0 && keep != 0) {
        barrier_expect(bar, L::kScalars);
        if (direction == 0) {
          for (int p = 0; p < L::kPanels; ++p)
            tensor_load(at + L::kColumns + p * kPanel, &k_map, bar, 0, hs / (s.Hs / s.Hk), token, p);
          tensor_load(at + L::kRows, &v_map, bar, 0, hs / (s.Hs / s.Hv), token, rb);
        } else {
          for (int p = 0; p < L::kPanels; ++p)
            tensor_load(at + L::kColumns + p * kPanel, &q_map, bar, 0, ho / (s.Ho / s.Hq), token, p);
          tensor_load(at + L::kRows, &d_map, bar, 0, ho, token, rb);
        }
      }
      if (keep != ~0ull) {  // what is not of the sequence, or not wanted, counts for nothing, whatever it is
        if (keep != 0) barrier_wait(aside, phase), phase ^= 1;
        clear_rows(at, L::kPanels + 1, keep, lane);
        fence_async_proxy();
        __syncwarp();
        barrier_arrive_warp(full + 8 * stage, lane);
      } else {
        barrier_arrive_others(full + 8 * stage, lane);
      }
    }
    return;
  }
  const size_t first = static_cast<size_t>(blockIdx.x) * s.segments * s.pieces;  // of `segments`
  if (warp == 5) {                                                               // scalars
    const float bias = w.dt_bias[hs], rate = log2_rate(w.A_log[hs]);
    float total = 0.f;
    Ahead<8>::run(
        base + L::kAhead, items, lane,
        [&](int i, uint32_t slot) {
          const int c = chunk_of(i);
          copy_steps(slot, w.dt_raw, s.Hs, hs, seq.begin + c * kC, seq.length - c * kC, lane);
        },
        [&](int i, uint32_t slot) {
          const int stage = i % kStages;
          const float2 raw = load_shared2(slot);
          if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) & 1);
          const float end = chunk_scalars(base + stage * L::kStage + L::kScalars, raw, bias, rate,
                                          seq.length - chunk_of(i) * kC, lane);
          if (i % readers == 0) total += end;
          __syncwarp();
          barrier_arrive_warp(full + 8 * stage, lane);
        });
    if (!kStore && lane == 0) w.segments[direction].decay[first + segment] = total;
    return;
  }

  const size_t rows = static_cast<size_t>(blockIdx.x) * kC * kK;  // of [N, Hs, V / 64, 64, K]
  State<kK> S;
  S.clear();
  if (segment > 0) {
    if (kStore) segment_start(S, w.segments[direction], first, segment * s.pieces, warp, lane);
  } else if (w.start[direction] != nullptr) {
    S.add(w.start[direction] + rows, 1.f, warp, lane);
  }
  const int first_chunk = s.cu_seqlens == nullptr ? n * ((s.T + kC - 1) / kC) : kStore ? w.chunk_offsets[n] : 0;
  // The rows of the next item are made while this one's product runs.
  uint32_t even[16], odd[16];
  const auto load = [&](int i, uint32_t(&to)[16]) {
    const int stage = i % kStages;
    const uint32_t at = base + stage * L::kStage;
    barrier_wait(full + 8 * stage, (i / kStages) & 1);
    S.load_rows(to, at + L::kRows, at + L::kScalars + (direction == 0 ? kTail : kGamma), warp, lane);
  };
  const auto item = [&](int i, uint32_t(&now)[16], uint32_t(&next)[16]) {
    const int stage = i % kStages;
    const uint32_t at = base + stage * L::kStage;
    if (kStore && i % readers == 0) {
      const uint32_t out = base + L::kOut + (i / readers & 1) * L::kState;
      if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
      named_barrier(1, 128);
      S.stage(out, warp, lane);
      fence_async_proxy();
      named_barrier(1, 128);
      if (threadIdx.x == 0) {
        const size_t record = (static_cast<size_t>(first_chunk + chunk_of(i)) * s.Hs + hs) * blocks + rb;
        bulk_store(w.states[direction] + record * kC * kK, out, L::kState);
        bulk_commit();
      }
    }
    S.advance(now, at + L::kColumns, i % readers == 0 ? load_shared(at + L::kScalars + kGamma + 252) : 1.f);
    if (i + 1 < items) load(i + 1, next);
    S.settle(now);
    barrier_arrive_warp(empty + 8 * stage, lane);
  };
  if (items > 0) load(0, even);
  for (int i = 0; i < items; i += 2) {
    item(i, even, odd);
    if (i + 1 < items) item(i + 1, odd, even);
  }
  if (!kStore)
    S.write(w.segments[direction].own + (first + segment) * kC * kK, warp, lane);
  else if (segment == s.segments - 1 && w.end[direction] != nullptr)
    S.write(w.end[direction] + rows, warp, lane);
  if (kStore && threadIdx.x == 0) bulk_wait();
}

__global__ void chunk_offsets_kernel(const Shape s, int32_t* offsets) {
  const int lane = threadIdx.x;
  int before = 0;
  for (int i = 0; i < s.N; i += 32) {
    int c = i + lane < s.N ? (sequence(s, i + lane).length + kC - 1) / kC : 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, c, d);
      if (lane >= d) c += other;
    }
    if (i + lane < s.N) offsets[i + lane + 1] = before + c;
    before += __shfl_sync(~0u, c, 31);
  }
  if (lane == 0) offsets[0] = 0;
}

template <int kK, bool kStore>
cudaError_t launch(const Shape& s, const Walk& w, const CUtensorMap* maps, cudaStream_t stream) {
  auto* kernel = walk_kernel<kK, kStore>;
  const int bytes = Layout<kK, kStore>::kBytes;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(s.N * s.Hs * (s.V / 64), kStore ? s.segments : (s.segments - 1) * s.pieces, w.directions);
  return static_cast<cudaError_t>(launch_clusters_after(s.V / 64, kernel, grid, 192, bytes, stream, maps[0], maps[1],
                                                        maps[2], maps[3], s, w));
}

}  // namespace

cudaError_t launch_walk(const Shape& s, const Walk& w, bool only_segments, const CUtensorMap* maps,
                        cudaStream_t stream) {
  if (s.K == 128) return only_segments ? launch<128, false>(s, w, maps, stream) : launch<128, true>(s, w, maps, stream);
  return only_segments ? launch<64, false>(s, w, maps, stream) : launch<64, true>(s, w, maps, stream);
}

cudaError_t launch_chunk_offsets(const Shape& s, int32_t* offsets, cudaStream_t stream) {
  chunk_offsets_kernel<<<1, 32, 0, stream>>>(s, offsets);
  return cudaGetLastError();
}

}  // namespace oryx::ssd_cuda
