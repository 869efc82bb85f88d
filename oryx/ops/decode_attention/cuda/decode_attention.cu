// One query a sequence over cached keys, split along the keys (flash-decoding): bound by reading keys and values once.
//
// The tokens of all sequences, cut to pieces, are shared out evenly over the multiprocessors: shares go across sequences, so that lengths need not be known to the host.
// Warp 8 copies pieces of keys and values into a ring in shared memory; warps 0 to 7 compute, with one query head a key head on the general units
// (decode_attention_single.cuh), with several on the tensor cores (decode_attention_grouped.cuh). Either way a *slot* has its own maximum, sum and output, and adds a partial
// result. A partial's place is (share + sequence), which is unique, for the pairs of a share and a sequence that meet form a staircase. A second kernel puts the partials of a
// sequence together, in order.
//
// Keys lie in the cache before RoPE, and are turned, or the query by the distance to them, as they are read.
#include <type_traits>

#include "oryx/ops/decode_attention/cuda/decode_attention_grouped.cuh"
#include "oryx/ops/decode_attention/cuda/decode_attention_single.cuh"

namespace oryx::decode_attention_cuda {
namespace {

// The slots of a shape.
template <int K>
__host__ __device__ Layout layout_of(int64_t Hk, bool grouped) {
  return grouped ? Layout(Hk, kGroupedWarps, kTileTokens) : Layout(Hk, kSlots<K>, kSingleTokens);
}

template <bool kGrouped>
constexpr int kConsumers = 32 * (kGrouped ? kGroupedWarps : kSingleWarps);

template <int K, bool kGrouped>
__global__ void __launch_bounds__(kConsumers<kGrouped> + 32, 1) shares_kernel(const __grid_constant__ OryxDecodeAttention a, float2* part_ml, float* part_o) {
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 127) & ~static_cast<uintptr_t>(127));
  constexpr int kStageBytes = kGrouped ? kGroupedStageBytes<K> : kSingleStageBytes;
  const Layout layout = layout_of<K>(a.Hk, kGrouped);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMostStages; ++i) barrier_init(smem_address(s.full + i), 1), barrier_init(smem_address(s.empty + i), kConsumers<kGrouped> / 32 * kWarpArrivals);
    barrier_init_fence();
  }
  launch_dependents();
  wait_for_previous();
  if (a.wanted != nullptr) {
    bool any = false;
    for (int n = threadIdx.x; n < a.N; n += kConsumers<kGrouped> + 32) any |= a.wanted[n] != 0;
    if (__syncthreads_or(any) == 0) return;
  }
  if (threadIdx.x >= kConsumers<kGrouped>) find_share(a, layout.piece, s);
  if constexpr (kGrouped) load_steps<K>(a, s, layout);
  __syncthreads();
  if (threadIdx.x >= kConsumers<kGrouped>) {
    produce<K, kStageBytes>(a, s, layout);
  } else if constexpr (kGrouped) {
    consume_grouped<K>(a, s, layout, part_ml, part_o);
  } else {
    consume_single<K>(a, s, layout, part_ml, part_o);
  }
}

// The shares that met a sequence, in order. A block has kHeads of its query heads, side by side; of a head's threads, K / 4 take every kGroups-th partial.
constexpr int kJoinThreads = 512, kMostShares = 160;

template <int K, int kHeads>
__global__ void __launch_bounds__(kJoinThreads) join_kernel(const __grid_constant__ OryxDecodeAttention a, int shares, const float2* part_ml, const float* part_o) {
  constexpr int kWarpsHere = kJoinThreads / 32, kPer = kJoinThreads / kHeads, kColumns = K / 4, kGroups = kPer / kColumns;
  static_assert(kPer >= K);
  __shared__ int64_t sums[2][kWarpsHere];
  __shared__ int rows[kMostShares];  // of this sequence's partials: share + sequence
  __shared__ int count;
  __shared__ float tops[kWarpsHere], squares[kWarpsHere], totals[kHeads][kGroups];
  __shared__ float4 outputs[kHeads][kGroups][kColumns];
  const int n = blockIdx.y, t = threadIdx.x, lane = t % 32, warp = t / 32, mine = t / kPer, inner = t % kPer, head = blockIdx.x * kHeads + mine;
  launch_dependents();
  wait_for_previous();
  const Layout layout = layout_of<K>(a.Hk, a.Hq > a.Hk);
  const int own = visible(a, n).pieces(layout.piece);
  if (own == 0) {
    if (a.o_tiles == 0) {
      for (int i = inner; i < K; i += kPer) static_cast<bf16*>(a.o)[(n * a.Hq + head) * K + i] = __float2bfloat16_rn(0.0f);
    }
    return;
  }
  int64_t before = 0, total = 0;
  for (int i = t; i < a.N; i += kJoinThreads) {
    const int pieces = visible(a, i).pieces(layout.piece);
    total += pieces, before += i < n ? pieces : 0;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) before += __shfl_xor_sync(~0u, before, d), total += __shfl_xor_sync(~0u, total, d);
  if (lane == 0) sums[0][warp] = before, sums[1][warp] = total;
  __syncthreads();
  before = total = 0;
#pragma unroll
  for (int w = 0; w < kWarpsHere; ++w) before += sums[0][w], total += sums[1][w];
  // Share c has pieces [total c / shares, total (c + 1) / shares): none where there are fewer pieces than shares.
  if (warp == 0) {
    int found = 0;
    for (int base = 0; base < shares; base += 32) {
      const int64_t c = base + lane, from = total * c / shares, to = total * (c + 1) / shares;
      const bool meets = c < shares && from < to && from < before + own && to > before;
      const uint32_t mask = __ballot_sync(~0u, meets);
      if (meets) rows[found + __popc(mask & ((1u << lane) - 1))] = static_cast<int>(c) + n;
      found += __popc(mask);
    }
    if (lane == 0) count = found;
  }
  __syncthreads();
  const int parts = count * layout.side;
  const auto place_of = [&](int i) { return (static_cast<int64_t>(rows[i / layout.side]) * a.Hq + head) * layout.side + i % layout.side; };
  float top = kLowest;
  for (int i = inner; i < parts; i += kPer) top = fmaxf(top, __ldcg(&part_ml[place_of(i)]).x);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kPer / 32; ++w) top = fmaxf(top, tops[mine * (kPer / 32) + w]);
  const int group = inner / kColumns, column = inner % kColumns;
  float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float sum = 0.0f;
#pragma unroll 8
  for (int i = group; i < parts; i += kGroups) {
    const int64_t part = place_of(i);
    const float2 ml = __ldcg(part_ml + part);
    const float4 y = __ldcg(reinterpret_cast<const float4*>(part_o) + part * kColumns + column);
    const float e = exp2f(ml.x - top);
    x.x = fmaf(e, y.x, x.x), x.y = fmaf(e, y.y, x.y), x.z = fmaf(e, y.z, x.z), x.w = fmaf(e, y.w, x.w), sum = fmaf(e, ml.y, sum);
  }
  outputs[mine][group][column] = x;
  if (column == 0) totals[mine][group] = sum;
  __syncthreads();
  float value = 0.0f;
  if (inner < K) {
    sum = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) value += reinterpret_cast<const float*>(outputs[mine][g])[inner], sum += totals[mine][g];
    value /= sum;
  }
  if (a.o_tiles == 0) {
    if (inner < K) static_cast<bf16*>(a.o)[(n * a.Hq + head) * K + inner] = __float2bfloat16_rn(value);
    return;
  }
  if (a.head_norm != nullptr) {
    float square = value * value;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    square = 0.0f;
#pragma unroll
    for (int w = 0; w < K / 32; ++w) square += squares[mine * (kPer / 32) + w];
    if (inner < K) value *= rsqrtf(square / K + a.head_norm_eps) * __ldg(a.head_norm + inner);
  }
  if (inner >= K) return;
  // Of several tokens of one sequence each has a row.
  const int steps = static_cast<int>(a.steps), to = steps > 0 ? head % steps : n, at = (steps > 0 ? head / steps : head) * K + inner;
  if (steps > 0 && a.step_wanted != nullptr && a.step_wanted[to] == 0) return;
  if (a.gate != nullptr) {
    const float gate = __bfloat162float(static_cast<const bf16*>(a.gate)[to * a.gate_row + at]);
    value *= gate / (1.0f + __expf(-gate));
  }
  *activation(a.o, a.o_tiles, to, at) = __float2bfloat16_rn(value);
}

int shares_of() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return count;
}

template <int K>
int64_t partials(const OryxDecodeAttention& a, int shares) {
  return (shares + a.N) * a.Hq * layout_of<K>(a.Hk, a.Hq > a.Hk).side;
}

template <int K, bool kGrouped>
int launch(const OryxDecodeAttention& a, void* workspace, cudaStream_t stream) {
  const Layout layout = layout_of<K>(a.Hk, kGrouped);
  // One sequence whose tokens come as several: all blocks at once, with half as many partials to join.
  const int shares = a.steps > 0 ? shares_of() / layout.groups : shares_of(), bytes = static_cast<int>(sizeof(Shared)) + 128;
  if (shares == 0 || shares > kMostShares) return cudaErrorInvalidValue;
  float2* ml = static_cast<float2*>(workspace);
  float* o = reinterpret_cast<float*>(ml + (partials<K>(a, shares) + 1) / 2 * 2);
  const auto kernel = shares_kernel<K, kGrouped>;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  if (const int e = launch_after(kernel, dim3(shares, layout.groups), kConsumers<kGrouped> + 32, bytes, stream, a, ml, o); e != cudaSuccess) return e;
  // Few long sequences want many blocks, many sequences few.
  const auto join = [&](auto heads) {
    constexpr int kHeads = decltype(heads)::value;
    return launch_after(join_kernel<K, kHeads>, dim3(static_cast<unsigned>(a.Hq / kHeads), static_cast<unsigned>(a.N)), kJoinThreads, 0, stream, a, shares, ml, o);
  };
  return a.N >= 16 && a.Hq % 4 == 0 ? join(std::integral_constant<int, 4>()) : join(std::integral_constant<int, 1>());
}

template <int K>
int launch(const OryxDecodeAttention& a, void* workspace, cudaStream_t stream) {
  return a.Hq > a.Hk ? launch<K, true>(a, workspace, stream) : launch<K, false>(a, workspace, stream);
}

bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

}  // namespace
}  // namespace oryx::decode_attention_cuda

using namespace oryx::decode_attention_cuda;

extern "C" int oryx_decode_attention_supports(const OryxDecodeAttention* a) {
  const int64_t group = a->Hk > 0 ? a->Hq / a->Hk : 0;
  const auto strides = [](int64_t row, int64_t token) { return row % 8 == 0 && token % 8 == 0; };
  return (a->K == 64 || a->K == 128) && a->V == a->K && group >= 1 && group <= kMostGroup && a->Hq % a->Hk == 0 && a->key_head == a->K && a->value_head == a->V &&
         strides(a->key_row, a->key_token) && strides(a->value_row, a->value_token) && (a->rope == nullptr || a->rotated == a->K) && aligned(a->q) && a->q_row % 4 == 0 &&
         aligned(a->keys) && aligned(a->values) && a->q_norm == nullptr && a->N <= 65535 &&
         (a->steps == 0 || (a->steps > 1 && a->N == 1 && a->Hq == a->Hk * a->steps && a->wanted == nullptr && a->o_tiles > 0 && a->window == 0 && a->reach == 0));
}

extern "C" int64_t oryx_decode_attention_workspace(const OryxDecodeAttention* a) {
  const int shares = shares_of();
  const int64_t count = a->K == 64 ? partials<64>(*a, shares) : partials<128>(*a, shares);
  return ((count + 1) / 2 * 2) * 8 + count * a->K * 4;
}

extern "C" int oryx_decode_attention(const OryxDecodeAttention* a, void* workspace, void* stream) {
  if (a->N == 0) return cudaSuccess;
  return a->K == 64 ? launch<64>(*a, workspace, static_cast<cudaStream_t>(stream)) : launch<128>(*a, workspace, static_cast<cudaStream_t>(stream));
}
