// Decode attention of any shape, float32 or bfloat16, with norms of queries and keys or without. The keys that a query sees are cut to shares; a block has a share for some of the
// query heads of a key head, its warps every fourth key of it, which passes through registers: norm, rotation, scores, values. A second kernel puts the shares together, in order.
//
// A lane holds pairs of a head's values: p = lane + 32 i is (p, p + half) of the `rotated` values, which RoPE turns, and two neighbours behind them.
#include <algorithm>

#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/cuda/state_step.cuh"
#include "oryx/ops/decode_attention/cuda/decode_attention_seen.cuh"

namespace oryx::decode_attention_cuda {
namespace {

using namespace ops::cuda;

constexpr int kGeneralWarps = 4, kGeneralThreads = 32 * kGeneralWarps;
constexpr int kJoinWarps = 4, kScaleWarps = 8, kMostSplits = 64;
constexpr float kNothing = -1e30f, kLog2OfE = 1.4426950408889634f;

int64_t most_seen(const OryxDecodeAttention& a) {
  int64_t most = a.capacity;
  if (a.window > 0) most = std::min(most, a.window + a.first);
  return a.reach > 0 ? std::min(most, a.reach) : most;
}

struct Pair {
  int lo, hi;  // -1: there is none
  bool turns;
};
__device__ __forceinline__ Pair pair_of(const OryxDecodeAttention& a, int p) {
  const int half = a.rope != nullptr ? static_cast<int>(a.rotated) / 2 : 0, K = static_cast<int>(a.K);
  if (p < half) return {p, p + half, true};
  const int lo = 2 * p;
  return {lo < K ? lo : -1, lo + 1 < K ? lo + 1 : -1, false};
}
template <typename T>
__device__ __forceinline__ float value_at(const T* p, int i) {
  return i < 0 ? 0.0f : to_float(p[i]);
}

__device__ __forceinline__ int token_of(const Range& r, int i) {
  const int first = r.first_end - r.first_begin;
  return i < first ? r.first_begin + i : r.begin + i - first;
}

// Of a norm over all heads: 1 / sqrt(mean of squares + eps) of the query [N], then of the keys that it sees [N, most].
template <typename T>
__global__ void __launch_bounds__(32 * kScaleWarps) scales_kernel(const __grid_constant__ OryxDecodeAttention a, int most, float* scales) {
  const int n = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, K = static_cast<int>(a.K);
  launch_dependents();
  wait_for_previous();
  const Range r = visible(a, n);
  const int count = r.count();
  const auto scale_of = [&](const T* row, int64_t head_stride, int64_t heads) {
    float sum = 0.0f;
    for (int64_t h = 0; h < heads; ++h) {
      for (int i = lane; i < K; i += 32) {
        const float x = to_float(row[h * head_stride + i]);
        sum = fmaf(x, x, sum);
      }
    }
    return rsqrtf(warp_sum<32>(sum) / static_cast<float>(heads * K) + a.norm_eps);
  };
  // Item `count` is the query.
  for (int i = blockIdx.x * kScaleWarps + warp; i <= count && count > 0; i += gridDim.x * kScaleWarps) {
    const bool query = i == count;
    const T* row = query ? static_cast<const T*>(a.q) + n * a.q_row : static_cast<const T*>(a.keys) + place(a, n, token_of(r, i), a.key_row, a.key_token);
    const float scale = scale_of(row, query ? a.K : a.key_head, query ? a.Hq : a.Hk);
    if (lane == 0) scales[query ? n : a.N + static_cast<int64_t>(n) * most + i] = scale;
  }
}

template <typename T, int kPer, int kHeads>
__global__ void __launch_bounds__(kGeneralThreads) general_kernel(const __grid_constant__ OryxDecodeAttention a, int most, const float* scales, float2* part_ml, float* part_o) {
  constexpr int kPairs = kPer / 2;
  static_assert(kHeads == 1 || kHeads == 8);
  extern __shared__ float memory[];  // by warp and head: maximum, sum; then outputs [V]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockIdx.z, K = static_cast<int>(a.K), V = static_cast<int>(a.V);
  const int group = static_cast<int>(a.Hq / a.Hk), blocks_a_head = (group + kHeads - 1) / kHeads;
  const int key_head = static_cast<int>(blockIdx.y) / blocks_a_head, first_head = static_cast<int>(blockIdx.y) % blocks_a_head * kHeads, heads = min(kHeads, group - first_head);
  const bool turns = a.rope != nullptr;
  launch_dependents();
  wait_for_previous();
  const Range r = visible(a, n);
  const int64_t count = r.count();
  const int from = static_cast<int>(count * blockIdx.x / gridDim.x), to = static_cast<int>(count * (blockIdx.x + 1) / gridDim.x);
  const int64_t part = (static_cast<int64_t>(blockIdx.x) * a.N + n) * a.Hq + key_head * group + first_head;
  if (from == to) {
    if (static_cast<int>(threadIdx.x) < heads) part_ml[part + threadIdx.x] = make_float2(kNothing, 0.0f);
    return;
  }
  Pair pairs[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) pairs[i] = pair_of(a, lane + 32 * i);
  float cosine[kPairs], sine[kPairs];
  const auto angles_at = [&](int position) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      cosine[i] = 1.0f, sine[i] = 0.0f;
      if (!pairs[i].turns) continue;
      const float* row = a.rope + position * a.rotated;
      cosine[i] = __ldg(row + pairs[i].lo), sine[i] = __ldg(row + a.rotated / 2 + pairs[i].lo);
    }
  };
  float q[kHeads][kPer];
  if (turns) angles_at(r.end - 1);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = key_head * group + first_head + h;
    const T* from_q = static_cast<const T*>(a.q) + n * a.q_row + static_cast<int64_t>(head) * K;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      q[h][2 * i] = h < heads ? value_at(from_q, pairs[i].lo) : 0.0f, q[h][2 * i + 1] = h < heads ? value_at(from_q, pairs[i].hi) : 0.0f;
      squares = fmaf(q[h][2 * i], q[h][2 * i], fmaf(q[h][2 * i + 1], q[h][2 * i + 1], squares));
    }
    float scale = a.scale * kLog2OfE;
    if (a.q_norm != nullptr) scale *= a.norm_together ? __ldcg(scales + n) : rsqrtf(warp_sum<32>(squares) / static_cast<float>(K) + a.norm_eps);
    const float* weight = a.q_norm + (a.norm_together && h < heads ? head * K : 0);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float x = q[h][2 * i] * scale, y = q[h][2 * i + 1] * scale;
      if (a.q_norm != nullptr) x *= value_at(weight, pairs[i].lo), y *= value_at(weight, pairs[i].hi);
      q[h][2 * i] = turns ? x * cosine[i] - y * sine[i] : x, q[h][2 * i + 1] = turns ? y * cosine[i] + x * sine[i] : y;
    }
  }
  float factor[kPer], step_c[kPairs], step_s[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float* weight = a.k_norm + (a.norm_together ? key_head * K : 0);
    factor[2 * i] = a.k_norm != nullptr ? value_at(weight, pairs[i].lo) : 1.0f, factor[2 * i + 1] = a.k_norm != nullptr ? value_at(weight, pairs[i].hi) : 1.0f;
  }
  if (turns) {
    angles_at(min(kGeneralWarps, static_cast<int>(a.capacity) - 1));
#pragma unroll
    for (int i = 0; i < kPairs; ++i) step_c[i] = cosine[i], step_s[i] = sine[i];
  }
  float acc[kHeads][kPer], m = kNothing, sum = 0.0f;  // m and sum: of head `own`
  constexpr int kLanesAHead = 32 / kHeads;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) acc[h][i] = 0.0f;
  }
  T key[kPer], value[kPer];
  const auto fetch = [&](int i) {
    if (i >= to) return;
    const int token = token_of(r, i);
    const T* k = static_cast<const T*>(a.keys) + place(a, n, token, a.key_row, a.key_token) + key_head * a.key_head;
    const T* v = static_cast<const T*>(a.values) + place(a, n, token, a.value_row, a.value_token) + key_head * a.value_head;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      key[2 * p] = pairs[p].lo >= 0 ? k[pairs[p].lo] : from_float<T>(0.0f), key[2 * p + 1] = pairs[p].hi >= 0 ? k[pairs[p].hi] : from_float<T>(0.0f);
    }
#pragma unroll
    for (int e = 0; e < kPer; ++e) value[e] = lane + 32 * e < V ? v[lane + 32 * e] : from_float<T>(0.0f);
  };
  fetch(from + warp);
  int before = -1;  // the token that the angles are of
  for (int i = from + warp; i < to; i += kGeneralWarps) {
    const int token = token_of(r, i);
    float k[kPer], v[kPer];
#pragma unroll
    for (int e = 0; e < kPer; ++e) k[e] = to_float(key[e]), v[e] = to_float(value[e]);
    fetch(i + kGeneralWarps);
    float scale = 1.0f;
    if (a.k_norm != nullptr) {
      float squares = 0.0f;
#pragma unroll
      for (int e = 0; e < kPer; ++e) squares = fmaf(k[e], k[e], squares);
      scale = a.norm_together ? __ldcg(scales + a.N + static_cast<int64_t>(n) * most + i) : rsqrtf(warp_sum<32>(squares) / static_cast<float>(K) + a.norm_eps);
#pragma unroll
      for (int e = 0; e < kPer; ++e) k[e] *= factor[e];
    }
    if (turns) {
      if (before < 0 || token != before + kGeneralWarps) {
        angles_at(token);
      } else {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const float x = cosine[p], y = sine[p];
          cosine[p] = fmaf(-y, step_s[p], x * step_c[p]), sine[p] = fmaf(x, step_s[p], y * step_c[p]);
        }
      }
      before = token;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const float x = k[2 * p], y = k[2 * p + 1];
        k[2 * p] = x * cosine[p] - y * sine[p], k[2 * p + 1] = y * cosine[p] + x * sine[p];
      }
    }
    float dots[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      dots[h] = 0.0f;
#pragma unroll
      for (int e = 0; e < kPer; ++e) dots[h] = fmaf(q[h][e], k[e], dots[h]);
    }
    float score;
    if constexpr (kHeads == 8) {
      score = scale * row_sum8<32>(dots, lane);
    } else {
      score = scale * warp_sum<32>(dots[0]);
    }
    if (__any_sync(~0u, score > m)) {
      const float top = fmaxf(m, score), shrink = exp2f(m - top);
      m = top, sum *= shrink;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float by = __shfl_sync(~0u, shrink, h * kLanesAHead);
#pragma unroll
        for (int e = 0; e < kPer; ++e) acc[h][e] *= by;
      }
    }
    const float p = exp2f(score - m);
    sum += p;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float by = __shfl_sync(~0u, p, h * kLanesAHead);
#pragma unroll
      for (int e = 0; e < kPer; ++e) acc[h][e] = fmaf(by, v[e], acc[h][e]);
    }
  }
  // The warps' sums.
  float2* const own = reinterpret_cast<float2*>(memory);
  float* const outputs = memory + 2 * kGeneralWarps * kHeads;
  if (lane % kLanesAHead == 0) own[warp * kHeads + lane / kLanesAHead] = make_float2(m, sum);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      if (lane + 32 * e < V) outputs[(warp * kHeads + h) * V + lane + 32 * e] = acc[h][e];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * V; i += kGeneralThreads) {
    const int h = i / V, e = i % V;
    float top = kNothing, total = 0.0f, x = 0.0f;
    for (int w = 0; w < kGeneralWarps; ++w) top = fmaxf(top, own[w * kHeads + h].x);
    for (int w = 0; w < kGeneralWarps; ++w) {
      const float weight = exp2f(own[w * kHeads + h].x - top);
      total = fmaf(weight, own[w * kHeads + h].y, total), x = fmaf(weight, outputs[(w * kHeads + h) * V + e], x);
    }
    part_o[(part + h) * V + e] = x;
    if (e == 0) part_ml[part + h] = make_float2(top, total);
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kJoinWarps) general_join_kernel(const __grid_constant__ OryxDecodeAttention a, int splits, const float2* part_ml, const float* part_o) {
  __shared__ float2 shares[kMostSplits];
  const int h = blockIdx.x, n = blockIdx.y, V = static_cast<int>(a.V);
  launch_dependents();
  wait_for_previous();
  const auto part = [&](int c) { return (static_cast<int64_t>(c) * a.N + n) * a.Hq + h; };
  for (int c = threadIdx.x; c < splits; c += 32 * kJoinWarps) shares[c] = __ldcg(part_ml + part(c));
  __syncthreads();
  float top = kNothing, total = 0.0f;
  for (int c = 0; c < splits; ++c) top = fmaxf(top, shares[c].x);
  for (int c = 0; c < splits; ++c) total = fmaf(exp2f(shares[c].x - top), shares[c].y, total);
  for (int e = threadIdx.x; e < V; e += 32 * kJoinWarps) {
    float x = 0.0f;
    for (int c = 0; c < splits; ++c) {
      if (shares[c].y > 0.0f) x = fmaf(exp2f(shares[c].x - top), __ldcg(part_o + part(c) * V + e), x);
    }
    static_cast<T*>(a.o)[(static_cast<int64_t>(n) * a.Hq + h) * V + e] = from_float<T>(total > 0.0f ? x / total : 0.0f);
  }
}

// Shares that keep the chip busy, whatever the lengths, and no more.
int splits_of(const OryxDecodeAttention& a, int64_t blocks) {
  const int64_t wanted = (528 + blocks - 1) / blocks, useful = (most_seen(a) + 31) / 32;
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, useful, static_cast<int64_t>(kMostSplits)})));
}
int64_t blocks_of(const OryxDecodeAttention& a, int heads) { return a.Hk * ((a.Hq / a.Hk + heads - 1) / heads); }
int heads_of(const OryxDecodeAttention& a) { return a.Hq > a.Hk && std::max(a.K, a.V) <= 256 ? 8 : 1; }
int64_t scale_floats(const OryxDecodeAttention& a) { return a.norm_together && a.q_norm != nullptr ? (a.N * (1 + most_seen(a)) + 3) / 4 * 4 : 0; }

template <typename T, int kPer, int kHeads>
int launch_general(const OryxDecodeAttention& a, float* workspace, cudaStream_t stream) {
  const int64_t heads = blocks_of(a, kHeads), seen = most_seen(a), scale_count = scale_floats(a);
  const int splits = splits_of(a, heads * a.N);
  float* const scales = workspace;
  float2* const ml = reinterpret_cast<float2*>(workspace + scale_count);
  float* const o = reinterpret_cast<float*>(ml + splits * a.N * a.Hq);
  if (scale_count > 0) {
    const int64_t some = std::max<int64_t>(1, std::min<int64_t>((seen + kScaleWarps) / kScaleWarps, 264 / a.N + 1));
    if (const int e = launch_after(scales_kernel<T>, dim3(static_cast<unsigned>(some), static_cast<unsigned>(a.N)), 32 * kScaleWarps, 0, stream, a, static_cast<int>(seen), scales); e != 0) return e;
  }
  const int bytes = static_cast<int>(4 * kGeneralWarps * kHeads * (2 + a.V));
  const auto kernel = general_kernel<T, kPer, kHeads>;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(heads), static_cast<unsigned>(a.N));
  if (const int e = launch_after(kernel, grid, kGeneralThreads, bytes, stream, a, static_cast<int>(seen), static_cast<const float*>(scales), ml, o); e != 0) return e;
  return launch_after(general_join_kernel<T>, dim3(static_cast<unsigned>(a.Hq), static_cast<unsigned>(a.N)), 32 * kJoinWarps, 0, stream, a, splits, static_cast<const float2*>(ml),
                      static_cast<const float*>(o));
}

template <typename T>
int by_shape(const OryxDecodeAttention& a, float* workspace, cudaStream_t stream) {
  const int64_t width = std::max(a.K, a.V);
  if (heads_of(a) == 8) return width <= 128 ? launch_general<T, 4, 8>(a, workspace, stream) : launch_general<T, 8, 8>(a, workspace, stream);
  if (width <= 128) return launch_general<T, 4, 1>(a, workspace, stream);
  return width <= 256 ? launch_general<T, 8, 1>(a, workspace, stream) : launch_general<T, 32, 1>(a, workspace, stream);
}

}  // namespace
}  // namespace oryx::decode_attention_cuda

using namespace oryx::decode_attention_cuda;

extern "C" int64_t oryx_decode_attention_general_workspace(const OryxDecodeAttention* a) {
  const int64_t splits = splits_of(*a, blocks_of(*a, heads_of(*a)) * a->N);
  return 4 * (scale_floats(*a) + splits * a->N * a->Hq * (2 + a->V));
}

extern "C" int oryx_decode_attention_general(const OryxDecodeAttention* a, int dtype, void* workspace, void* stream) {
  if (a->N == 0 || a->Hq == 0) return cudaSuccess;
  if (a->N > 65535 || std::max(a->K, a->V) > 1024 || a->Hq % a->Hk != 0) return cudaErrorInvalidValue;
  const auto memory = static_cast<float*>(workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  return dtype == kFloat32 ? by_shape<float>(*a, memory, on) : by_shape<__nv_bfloat16>(*a, memory, on);
}
