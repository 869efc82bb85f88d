// What a segment of a sequence does to a state that passes through it: S1 = S0 M + N (see gated_delta_cuda.h), both in one walk over its chunks
// from the last to the first. With M_i and N_i those of chunk i, Kg = diag(exp(G)) K, Kt = diag(exp(G_C - G)) K and R the product of the
// matrices behind chunk i,
//
//   x = Kt R      z = T^T x      R <- M_i R = exp(G_C) R - Kg^T z      N += N_i R = V^T z
//
// A warpgroup has 64 columns of R and N, as rows of their transposes, in registers. N is a sum: the chain of products is R's alone, and K and T
// are read once for both. Forward in time N would be a second walk of its own.
#include "gated_delta_walk.cuh"
#include "oryx/ops/cuda/dependent_launch.cuh"

namespace oryx::gated_delta_cuda {
namespace {

struct Layout {
  static constexpr int kStages = 5;
  static constexpr int kThreads = 384;  // two warpgroups, then the warp that copies in, with three idle ones for `setmaxnreg`
  static constexpr int kWarps = 8;
  static constexpr int kK = 0;
  static constexpr int kV = 2 * kPanel;
  static constexpr int kRecord = 4 * kPanel;
  static constexpr int kStage = kRecord + kSharedRecord;
  static constexpr int kBarriers = kStages * kStage;
  static constexpr int kBytes = kBarriers + 16 * kStages + 1024;  // and what aligning the start to 1024 may take
};

__global__ void __launch_bounds__(Layout::kThreads, 1)
    segments_kernel(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, const Shape s, const char* record,
                    float* own, float* map, float* map_transposed) {
  using L = Layout;
  constexpr int kStages = L::kStages;
  extern __shared__ char raw_shared[];
  const uint32_t base = (smem_address(raw_shared) + 1023) & ~1023u;
  const uint32_t full = base + L::kBarriers, empty = full + 8 * kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int hs = blockIdx.x % s.Hs, n = blockIdx.x / s.Hs, segment = blockIdx.y;
  const Sequence seq = sequence(s, n);
  const int chunks = (seq.length + kC - 1) / kC;
  // Never the last segment: these chunks are whole.
  const int c0 = static_cast<int>(static_cast<int64_t>(chunks) * segment / s.segments);
  const int c1 = static_cast<int>(static_cast<int64_t>(chunks) * (segment + 1) / s.segments);

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, L::kWarps * kWarpArrivals);
    }
    barrier_init_fence();
  }
  for (int i = 0; i < kStages; ++i) clear_T(base + i * L::kStage + L::kRecord, threadIdx.x, L::kThreads);
  __syncthreads();
  ops::cuda::wait_for_previous();

  if (warp >= L::kWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == L::kWarps && lane == 0) {
      const int hk = hs / (s.Hs / s.Hk), hv = hs / (s.Hs / s.Hv);
      for (int c = c1 - 1, i = 0; c >= c0; --c, ++i) {
        const int stage = i % kStages;
        const uint32_t at = base + stage * L::kStage, bar = full + 8 * stage;
        if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) & 1);
        barrier_expect(bar, L::kRecord + kRecordBytes);
        const int token = seq.begin + c * kC;
        load_record(at + L::kRecord, record + (static_cast<size_t>(seq.first_chunk + c) * s.Hs + hs) * kRecordBytes, bar, kEvictNormal);
        for (int p = 0; p < 2; ++p) {
          tensor_load(at + L::kK + p * kPanel, &k_map, bar, 0, hk, token, p);
          tensor_load(at + L::kV + p * kPanel, &v_map, bar, 0, hv, token, p);
        }
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");

  const int row = 16 * warp + lane / 4;  // this thread's rows (columns of R and N): this one and 8 further on
  const int column = 2 * (lane % 4);     // and its columns: this one and the next of every eight
  float R[64], N[64];
#pragma unroll
  for (int j = 0; j < 64; ++j) {
    R[j] = row + j % 4 / 2 * 8 == 8 * (j / 4) + column + j % 2 ? 1.f : 0.f;
    N[j] = 0.f;
  }
  uint32_t rb[32], zb[16];  // R and z in bfloat16
#pragma unroll
  for (int j = 0; j < 32; ++j) rb[j] = pack(R[2 * j], R[2 * j + 1]);
#pragma unroll
  for (int j = 0; j < 16; ++j) zb[j] = 0;
  for (int c = c1 - 1, i = 0; c >= c0; --c, ++i) {
    const int stage = i % kStages;
    const uint32_t at = base + stage * L::kStage, rows = at + L::kRecord + kSharedRows + 4 * column;
    barrier_wait(full + 8 * stage, (i / kStages) & 1);
    float x[32];
    keep(rb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 8; ++kk) wgmma_64x64(x, rb + 4 * kk, descriptor_nk(at + L::kK, kk, kPanel), kk > 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(x);
    keep(rb);
    keep(N);
    keep(zb);
    if (i > 0) barrier_arrive_warp(empty + 8 * ((i - 1) % kStages), lane);  // its V was read until now

    uint32_t xb[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 f = load_shared2(rows + 4 * (64 + 8 * (j / 2)));
      xb[j] = pack(f.x * x[2 * j], f.y * x[2 * j + 1]);
    }
    keep(xb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x64_kn(x, xb + 4 * kk, descriptor_T(at + L::kRecord, kk), kk > 0);
    wgmma_commit();
    const float decay = power2(load_shared(at + L::kRecord + kSharedRows + 4 * 191));
#pragma unroll
    for (int j = 0; j < 64; ++j) R[j] *= decay;
    keep(R);
    wgmma_wait<0>();
    keep(x);
    keep(xb);

#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 e = load_shared2(rows + 4 * (8 * (j / 2)));
      xb[j] = pack(-e.x * x[2 * j], -e.y * x[2 * j + 1]);
      zb[j] = pack(x[2 * j], x[2 * j + 1]);
    }
    keep(xb);
    keep(zb);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x128_kn(R, xb + 4 * kk, descriptor(at + L::kK + kk * 2048, kPanel, 1024), 1);
    wgmma_commit();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) wgmma_64x128_kn(N, zb + 4 * kk, descriptor(at + L::kV + kk * 2048, kPanel, 1024), 1);
    wgmma_commit();
    wgmma_wait<1>();
    keep(R);
    keep(xb);
#pragma unroll
    for (int j = 0; j < 32; ++j) rb[j] = pack(R[2 * j], R[2 * j + 1]);
  }
  wgmma_wait<0>();
  keep(N);
  keep(zb);

  // `combine` multiplies in tf32: M is rounded here, once.
#pragma unroll
  for (int j = 0; j < 64; ++j) R[j] = __uint_as_float(tf32(R[j]));
  const size_t to = ((static_cast<size_t>(n) * s.Hs + hs) * s.segments + segment) * kD * kD;
#pragma unroll
  for (int j = 0; j < 64; ++j) {
    const int r = row + j % 4 / 2 * 8, at = 8 * (j / 4) + column + j % 2;
    own[to + at * kD + r] = N[j];
    map[to + at * kD + r] = R[j];
  }
  if (map_transposed != nullptr) {
#pragma unroll
    for (int j = 0; j < 64; j += 2)
      *reinterpret_cast<float2*>(map_transposed + to + (row + j % 4 / 2 * 8) * kD + 8 * (j / 4) + column) = make_float2(R[j], R[j + 1]);
  }
}

// Every segment's last state: own[i] += own[i - 1] map[i], from own[-1] = `initial` where there is one; or in reverse, own[i] += own[i + 1]
// map[i]. A block has 32 rows of one head, a warp 16 x 32 of them; products in tf32 (the maps are rounded to it). The maps are copied in ahead, a row at a time: rows lie so
// that no two of what a warp reads at once meet in a bank.
constexpr int kCombineRows = 32, kCombineThreads = 256;
constexpr int kMapStride = kD + 8, kBeforeStride = kD + 4;  // floats
constexpr int kMapBytes = kD * kMapStride * 4;
constexpr int kMaps = 3;  // in shared memory
constexpr int kCombineBytes = kMaps * kMapBytes + kCombineRows * kBeforeStride * 4 + 8 * kMaps;
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(int segments, bool reverse, int D, const float* __restrict__ initial,
                                                                  float* __restrict__ own, const float* __restrict__ map) {
  extern __shared__ __align__(128) char raw_shared[];
  uint32_t* const maps = reinterpret_cast<uint32_t*>(raw_shared);
  uint32_t* const before = maps + kMaps * kD * kMapStride;
  const uint32_t bar = smem_address(before + kCombineRows * kBeforeStride), at_map = smem_address(maps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int row = warp / 4 * 16 + r, column = warp % 4 * 32;  // this thread's rows: this one and 8 further on; this warp's columns
  const size_t first = static_cast<size_t>(blockIdx.x) * segments * kD * kD;
  const size_t at = static_cast<size_t>(blockIdx.y * kCombineRows + row) * kD + column + 2 * c;
  const auto segment = [&](int i) { return first + static_cast<size_t>(reverse ? segments - 1 - i : i) * kD * kD; };  // the i-th in the order of work
  const int from = initial != nullptr ? 0 : 1;
  const auto fetch = [&](int i) {
    if (threadIdx.x >= kD || i >= segments - 1) return;
    const int slot = (i - from) % kMaps;
    if (threadIdx.x == 0) barrier_expect(bar + 8 * slot, kD * kD * 4);
    bulk_load(at_map + slot * kMapBytes + threadIdx.x * kMapStride * 4, map + segment(i) + threadIdx.x * kD, kD * 4, bar + 8 * slot);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaps; ++i) barrier_init(bar + 8 * i, 1);
    barrier_init_fence();
  }
  __syncthreads();
  ops::cuda::wait_for_previous();
  ops::cuda::launch_dependents();
  for (int i = 0; i < kMaps; ++i) fetch(from + i);
  float sum[4][4];
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float2 x = make_float2(0.f, 0.f);
      const int v = blockIdx.y * kCombineRows + row + 8 * h, k = column + 8 * n + 2 * c;
      if (initial == nullptr) x = *reinterpret_cast<const float2*>(own + segment(0) + at + 8 * h * kD + 8 * n);
      else if (v < D && k < D) x = *reinterpret_cast<const float2*>(initial + (static_cast<size_t>(blockIdx.x) * D + v) * D + k);
      sum[n][2 * h] = x.x, sum[n][2 * h + 1] = x.y;
    }
  float2 next[4][2];  // own[i], read one ahead
  const auto read = [&](int i) {
    if (i >= segments - 1) return;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) next[n][h] = *reinterpret_cast<const float2*>(own + segment(i) + at + 8 * h * kD + 8 * n);
  };
  read(from);
  for (int i = from; i < segments - 1; ++i) {
    float* const to = own + segment(i) + at;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint2*>(&before[(row + 8 * h) * kBeforeStride + column + 8 * n + 2 * c]) = make_uint2(tf32(sum[n][2 * h]), tf32(sum[n][2 * h + 1]));
        sum[n][2 * h] = next[n][h].x, sum[n][2 * h + 1] = next[n][h].y;
      }
    read(i + 1);
    __syncthreads();
    const int slot = (i - from) % kMaps;
    barrier_wait(bar + 8 * slot, (i - from) / kMaps & 1);
    const uint32_t* const m = maps + slot * kD * kMapStride;
#pragma unroll 4
    for (int k = 0; k < kD; k += 8) {
      const uint32_t* const b = before + row * kBeforeStride + k + c;
      const uint32_t fragment[4] = {b[0], b[8 * kBeforeStride], b[4], b[8 * kBeforeStride + 4]};
#pragma unroll
      for (int n = 0; n < 4; ++n)
        mma_tf32(sum[n], fragment, m[(k + c) * kMapStride + column + 8 * n + r], m[(k + c + 4) * kMapStride + column + 8 * n + r]);
    }
    __syncthreads();
    fetch(i + kMaps);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) *reinterpret_cast<float2*>(to + 8 * h * kD + 8 * n) = make_float2(sum[n][2 * h], sum[n][2 * h + 1]);
  }
}

}  // namespace

cudaError_t launch_segments(const Shape& s, const CUtensorMap* maps, const char* record, float* own, float* map, float* map_transposed,
                            cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(segments_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kBytes);
  if (status != cudaSuccess) return status;
  return static_cast<cudaError_t>(ops::cuda::launch_after(segments_kernel, dim3(s.N * s.Hs, s.segments - 1), Layout::kThreads, Layout::kBytes, stream,
                                                          maps[1], maps[2], s, record, own, map, map_transposed));
}

cudaError_t launch_combine(const Shape& s, bool reverse, const float* initial, float* own, const float* map, cudaStream_t stream) {
  if (s.segments < (initial != nullptr ? 2 : 3)) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(combine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kCombineBytes);
  if (status != cudaSuccess) return status;
  return static_cast<cudaError_t>(ops::cuda::launch_after(combine_kernel, dim3(s.N * s.Hs, kD / kCombineRows), kCombineThreads, kCombineBytes, stream,
                                                          s.segments, reverse, s.D, initial, own, map));
}

}  // namespace oryx::gated_delta_cuda
