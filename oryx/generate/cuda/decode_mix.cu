// The recurrent state of a batch's layer (decode_batch.h): every multiprocessor streams heads' states through a ring in shared memory, in by the copy engine ahead of what the
// kernel in front still computes, and out again.
//
// Sixteen warps update a head's state, eight value rows each, through rings of their own. Others make what these need of a head (keys behind their convolution, query, values, gates),
// each a head of its own in turn, and keep what the state keeps of the token.
#include <algorithm>

#include "oryx/generate/cuda/decode_batch.h"
#include "oryx/generate/cuda/decode_common.cuh"

namespace oryx::decode_cuda {
namespace {

constexpr int kMixWarps = 16, kRows = kWidth / kMixWarps, kPieceBytes = kRows * kWidth * 4;
constexpr int kStages = 2;  // a third makes the kernel slower: its memory is the next kernel's, too
constexpr int kMostPlaces = 64;
constexpr int kSlots = 3;  // heads prepared ahead, by a warp each
constexpr int kRingThreads = (kMixWarps + kSlots) * 32;
static_assert(kRows == 8);
constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // PTX: createpolicy; a state is read again a token later

// Of one head of one sequence.
struct Prepared {
  float k[kWidth], q[kWidth], v[kWidth], factor[kWidth];  // factor: head norm's weight times the gate
  float beta, decay, k_scale, q_scale;
  int linear, unused[3];
};

__device__ __forceinline__ void state_load(uint32_t dst, const void* src, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(dst), "l"(src), "r"(kPieceBytes), "r"(bar),
               "l"(kEvictFirst)
               : "memory");
}
struct Four {
  float x[4];
};
__device__ __forceinline__ Four four(const void* p, int64_t at) {
  const uint2 w = __ldcg(reinterpret_cast<const uint2*>(static_cast<const bf16*>(p) + at));
  return {low(w.x), high(w.x), low(w.y), high(w.y)};
}

// What a head needs that the kernel before this one does not make. A warp, four channels a lane.
struct Fixed {
  Tail4 k_tail, v_tail;
  float4 k_filters[4], v_filters[4], weight;
  float A_log, bias;
  __device__ __forceinline__ void load(const OryxBatchMix& a, int place, int h, int lane) {
    const int64_t D = a.H * kWidth, channel = h * kWidth + 4 * lane;
    k_tail.load(a.k_tail, place * D + channel), v_tail.load(a.v_tail, place * D + channel);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      k_filters[i] = __ldg(reinterpret_cast<const float4*>(a.k_conv) + channel + i), v_filters[i] = __ldg(reinterpret_cast<const float4*>(a.v_conv) + channel + i);
    }
    weight = __ldg(reinterpret_cast<const float4*>(a.o_norm) + lane);
    A_log = __ldg(a.A_log + h), bias = __ldg(a.dt_bias + h);
  }
};

__device__ __forceinline__ void prepare(const OryxBatchMix& a, const Fixed& in, int n, int place, int h, Prepared& to, int lane) {
  const int64_t D = a.H * kWidth, channel = h * kWidth + 4 * lane;
  const bf16* projected = static_cast<const bf16*>(a.projected) + n * a.row;
  const Four k_raw = four(projected, channel), v_raw = four(projected, D + channel), gate = four(projected, 2 * D + channel), q = four(projected, 3 * D + channel);
  const float write = __ldcg(a.narrow + n * 2 * a.H + h), step = __ldcg(a.narrow + (n * 2 + 1) * a.H + h);
  const bool linear = a.modes[n] == 0;
  const int position = a.positions[n];
  const bool keeps = a.keys != nullptr && position < a.capacity;
  const int row = keeps ? static_cast<int>(kept_row(a.places, n, position)) : 0;  // a pool has fewer rows than 2^31
  const float4 weight = in.weight;
  const Tail4 &k_tail = in.k_tail, &v_tail = in.v_tail;
  float k[4], v[4], kk = 0.0f, qq = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    k[i] = convolved(in.k_filters[i], k_tail.at(i, 0), k_tail.at(i, 1), k_tail.at(i, 2), k_raw.x[i]);
    v[i] = convolved(in.v_filters[i], v_tail.at(i, 0), v_tail.at(i, 1), v_tail.at(i, 2), v_raw.x[i]);
    kk = fmaf(k[i], k[i], kk), qq = fmaf(q.x[i], q.x[i], qq);
  }
  const float beta = sigmoid(write), g = log_decay(in.A_log, step + in.bias);
  kk = rsqrtf(warp_sum(kk) + 1e-6f), qq = rsqrtf(warp_sum(qq) + 1e-6f) * 0.08838834764831845f;
  *reinterpret_cast<float4*>(to.k + 4 * lane) = make_float4(k[0], k[1], k[2], k[3]);
  *reinterpret_cast<float4*>(to.q + 4 * lane) = make_float4(q.x[0], q.x[1], q.x[2], q.x[3]);
  *reinterpret_cast<float4*>(to.v + 4 * lane) = make_float4(v[0], v[1], v[2], v[3]);
  *reinterpret_cast<float4*>(to.factor + 4 * lane) = make_float4(weight.x * silu(gate.x[0]), weight.y * silu(gate.x[1]), weight.z * silu(gate.x[2]), weight.w * silu(gate.x[3]));
  if (lane == 0) to.beta = beta, to.decay = __expf(g), to.k_scale = kk, to.q_scale = qq, to.linear = linear;
  k_tail.shifted(k_raw.x).store(a.k_tail, place * D + channel);
  v_tail.shifted(v_raw.x).store(a.v_tail, place * D + channel);
  if (!keeps) return;
  *reinterpret_cast<uint2*>(static_cast<bf16*>(a.keys) + n * a.key_sequence + row * D + channel) = make_uint2(pack(k[0], k[1]), pack(k[2], k[3]));
  *reinterpret_cast<uint2*>(static_cast<bf16*>(a.values) + n * a.value_sequence + row * D + channel) = make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
  if (lane != 0) return;
  a.g_rows[n * a.g_sequence + row * a.H + h] = g;
  a.beta_rows[n * a.beta_sequence + row * a.H + h] = beta;
  if (h == 0 && a.mode_rows != nullptr) a.mode_rows[n * a.mode_sequence + row] = linear ? 0 : 1;
}

__global__ void __launch_bounds__(kRingThreads, 1) mix_kernel(const __grid_constant__ OryxBatchMix a) {
  extern __shared__ __align__(128) char rings[];  // [warps][kStages][kPieceBytes]
  __shared__ Prepared slots[kSlots];
  __shared__ float sums[2][kMixWarps];
  __shared__ __align__(8) uint64_t barriers[kMixWarps * kStages + 2 * kSlots];
  __shared__ int places[kMostPlaces];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, total = active_of(a.places, a.N) * static_cast<int>(a.H), stride = static_cast<int>(gridDim.x), begin = static_cast<int>(blockIdx.x);
  const uint32_t ready = smem_address(barriers), taken = ready + 8 * kSlots, filled = taken + 8 * kSlots + 8 * kStages * warp;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) barrier_init(ready + 8 * i, kWarpArrivals), barrier_init(taken + 8 * i, kMixWarps * kWarpArrivals);
    for (int i = 0; i < kMixWarps * kStages; ++i) barrier_init(taken + 8 * kSlots + 8 * i, 1);
    barrier_init_fence();
  }
  // Placed by the host before the first kernel of the step.
  if (threadIdx.x < a.N) places[threadIdx.x] = place_of(a.places, static_cast<int>(threadIdx.x));
  __syncthreads();
  launch_dependents();
  if (warp >= kMixWarps) {  // what the others need of each head
    const int slot = warp - kMixWarps, H = static_cast<int>(a.H);
    int unit = begin + slot * stride, turn = 0;
    Fixed in;
    if (unit < total) in.load(a, places[unit / H], unit % H, lane);
    wait_for_previous();
    for (; unit < total; unit += kSlots * stride, ++turn) {
      if (turn > 0) barrier_wait(taken + 8 * slot, (turn - 1) & 1);
      prepare(a, in, unit / H, places[unit / H], unit % H, slots[slot], lane);
      __syncwarp();
      barrier_arrive_warp(ready + 8 * slot, lane);
      if (const int next = unit + kSlots * stride; next < total) in.load(a, places[next / H], next % H, lane);
    }
    return;
  }
  char* const ring = rings + warp * kStages * kPieceBytes;
  float* const state = a.S + warp * kRows * kWidth;
  const auto piece = [&](int unit) {
    const int H = static_cast<int>(a.H);
    return state + (static_cast<int64_t>(places[unit / H]) * H + unit % H) * kWidth * kWidth;
  };
  const auto fetch = [&](int unit, int stage) {
    barrier_expect(filled + 8 * stage, kPieceBytes);
    state_load(smem_address(ring + stage * kPieceBytes), piece(unit), filled + 8 * stage);
  };
  // The state does not depend on what the kernel before this one does.
  if (lane == 0) {
    for (int i = 0; i < kStages && begin + i * stride < total; ++i) fetch(begin + i * stride, i);
  }
  wait_for_previous();
  int slot = 0, slot_turn = 0, stage = 0, turn = 0, odd = 0;
  for (int unit = begin; unit < total; unit += stride) {
    const int n = unit / static_cast<int>(a.H), h = unit % static_cast<int>(a.H), own = warp * kRows + lane / 4;
    const Prepared& p = slots[slot];
    barrier_wait(ready + 8 * slot, slot_turn & 1);
    const float4 k = *reinterpret_cast<const float4*>(p.k + 4 * lane), q = *reinterpret_cast<const float4*>(p.q + 4 * lane);
    const float v = p.v[own], factor = p.factor[own], beta = p.beta, decay = p.decay, kk = p.k_scale, qq = p.q_scale;
    const bool linear = p.linear != 0;
    __syncwarp();
    barrier_arrive_warp(taken + 8 * slot, lane);
    if (++slot == kSlots) slot = 0, ++slot_turn;
    float4* rows = reinterpret_cast<float4*>(ring + stage * kPieceBytes) + lane;
    barrier_wait(filled + 8 * stage, turn & 1);
    float4 s[kRows];
    float part[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) s[r] = rows[r * (kWidth / 4)];
#pragma unroll
    for (int r = 0; r < kRows; ++r) part[r] = fmaf(s[r].x, k.x, fmaf(s[r].y, k.y, fmaf(s[r].z, k.z, s[r].w * k.w)));
    const float write = beta * (v - decay * warp_sum8(part) * kk) * kk;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float w = __shfl_sync(~0u, write, 4 * r);
      s[r].x = fmaf(w, k.x, decay * s[r].x), s[r].y = fmaf(w, k.y, decay * s[r].y);
      s[r].z = fmaf(w, k.z, decay * s[r].z), s[r].w = fmaf(w, k.w, decay * s[r].w);
      rows[r * (kWidth / 4)] = s[r];
      part[r] = fmaf(s[r].x, q.x, fmaf(s[r].y, q.y, fmaf(s[r].z, q.z, s[r].w * q.w)));
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      bulk_store(piece(unit), smem_address(rows), kPieceBytes, kEvictFirst);
      bulk_commit();
      // The piece stored a head ago has left the ring: its place is free.
      const int next = unit + (kStages - 1) * stride;
      if (unit != begin && next < total) {
        asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        fetch(next, stage == 0 ? kStages - 1 : stage - 1);
      }
    }
    if (++stage == kStages) stage = 0, ++turn;
    if (!linear) continue;  // the whole block's
    const float out = warp_sum8(part) * qq;
    float squares = warp_sum(lane % 4 == 0 ? out * out : 0.0f);
    if (lane == 0) sums[odd][warp] = squares;
    named_barrier(1, kMixWarps * 32);
    squares = 0.0f;
#pragma unroll
    for (int w = 0; w < kMixWarps; ++w) squares += sums[odd][w];
    odd ^= 1;
    if (lane % 4 == 0) *activation(a.out, a.tiles, n, h * kWidth + own) = __float2bfloat16_rn(out * rsqrtf(squares / kWidth + a.head_norm_eps) * factor);
  }
  if (lane == 0) bulk_wait_read();
}

}  // namespace
}  // namespace oryx::decode_cuda

extern "C" int oryx_batch_mix(const OryxBatchMix* a, void* stream) {
  using namespace oryx::decode_cuda;
  static int multiprocessors = 0;
  if (multiprocessors == 0) {
    int device = 0;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
    if (const cudaError_t e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device); e != cudaSuccess) return e;
  }
  if (a->N > kMostPlaces) return cudaErrorInvalidValue;
  constexpr int bytes = kMixWarps * kStages * kPieceBytes;
  if (const cudaError_t e = cudaFuncSetAttribute(mix_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  return launch_after(mix_kernel, dim3(static_cast<unsigned>(std::min<int64_t>(multiprocessors, a->N * a->H))), kRingThreads, bytes, static_cast<cudaStream_t>(stream), *a);
}
