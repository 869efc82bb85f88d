// Decode attention of any shape, float32 or bfloat16, with norms of queries and keys or without. The keys that a query sees are cut to shares; a block has a share for some of the
// query heads of a key head, its warps a few keys at a time, which pass through registers: norm, rotation, scores, values. Few shares are a cluster, whose blocks send what they have of a
// head to the one that finishes it; of many a second kernel puts them together. Either way in the same order every time.
//
// A lane holds pairs of a head's values: p = lane + 32 i is (p, p + half) of the `rotated` values, which RoPE turns, and two neighbours behind them.
#include <algorithm>

#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/cuda/fragments.cuh"
#include "oryx/ops/cuda/packet.cuh"
#include "oryx/ops/cuda/state_step.cuh"
#include "oryx/ops/decode_attention/cuda/decode_attention_seen.cuh"

namespace oryx::decode_attention_cuda {
namespace {

using namespace ops::cuda;

constexpr int kGeneralWarps = 8, kGeneralThreads = 32 * kGeneralWarps;
constexpr int kJoinThreads = 256, kScaleWarps = 8, kMostSplits = 64, kMostCluster = 8;
constexpr float kNothing = -1e30f, kLog2OfE = 1.4426950408889634f;
// Up to so many bytes of keys and values the kernels that share tokens out evenly take longer than this one (12 heads of 64 on an H100: 7.6 us for 9.9 at 512 tokens, 15.6 for 12.2 at 2,048).
constexpr int64_t kFewBytes = int64_t{2} << 20;

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

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// To shared memory of block `rank` of the cluster.
__device__ __forceinline__ void send(float* to, int rank, float x) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
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
    const bool fresh = !query && a.new_keys != nullptr && token_of(r, i) == r.end - 1;
    const T* row = query   ? static_cast<const T*>(a.q) + n * a.q_row
                   : fresh ? static_cast<const T*>(a.new_keys) + n * a.q_row
                           : static_cast<const T*>(a.keys) + place(a, n, token_of(r, i), a.key_row, a.key_token);
    const float scale = scale_of(row, query || fresh ? a.K : a.key_head, query ? a.Hq : a.Hk);
    if (lane == 0) scales[query ? n : a.N + static_cast<int64_t>(n) * most + i] = scale;
  }
}

// A head's output as it is wanted: shares s of its sums o(s, e), with maxima and sums ml(s). By a whole block.
template <typename T, int kThreads, typename O, typename Ml>
__device__ void finish_head(const OryxDecodeAttention& a, int n, int head, int shares, O o, Ml ml) {
  __shared__ float squares[kThreads / 32];
  constexpr int kMany = 1024 / kThreads;
  const int V = static_cast<int>(a.V), t = threadIdx.x;
  float top = kNothing, total = 0.0f, value[kMany], square = 0.0f;
  for (int s = 0; s < shares; ++s) top = fmaxf(top, ml(s).x);
  for (int s = 0; s < shares; ++s) total = fmaf(exp2f(ml(s).x - top), ml(s).y, total);
#pragma unroll
  for (int i = 0; i < kMany; ++i) {
    const int e = t + i * kThreads;
    value[i] = 0.0f;
    if (e >= V) continue;
    for (int s = 0; s < shares; ++s) {
      if (ml(s).y > 0.0f) value[i] = fmaf(exp2f(ml(s).x - top), o(s, e), value[i]);
    }
    value[i] = total > 0.0f ? value[i] / total : 0.0f;
    square = fmaf(value[i], value[i], square);
  }
  float scale = 1.0f;
  if (a.o_tiles != 0 && a.head_norm != nullptr) {
    square = warp_sum<32>(square);
    __syncthreads();
    if (t % 32 == 0) squares[t / 32] = square;
    __syncthreads();
    square = 0.0f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) square += squares[w];
    scale = rsqrtf(square / static_cast<float>(V) + a.head_norm_eps);
  }
#pragma unroll
  for (int i = 0; i < kMany; ++i) {
    const int e = t + i * kThreads;
    if (e >= V) continue;
    if (a.o_tiles == 0) {
      static_cast<T*>(a.o)[(static_cast<int64_t>(n) * a.Hq + head) * V + e] = from_float<T>(value[i]);
      continue;
    }
    float x = value[i] * scale;
    if (a.head_norm != nullptr) x *= __ldg(a.head_norm + e);
    if (a.gate != nullptr) {
      const float gate = to_float(static_cast<const T*>(a.gate)[n * a.gate_row + static_cast<int64_t>(head) * V + e]);
      x *= gate / (1.0f + __expf(-gate));
    }
    *activation(a.o, a.o_tiles, n, head * V + e) = __float2bfloat16_rn(x);
  }
}

// kHeads 8: a warp takes kTokens keys for eight query heads, whose scores, maxima and sums are those of lanes 4 h. 1: of one head, and lanes 4 t have the scores of key t.
template <typename T, int kPer, int kHeads>
__global__ void __launch_bounds__(kGeneralThreads) general_kernel(const __grid_constant__ OryxDecodeAttention a, int most, const float* scales, float2* part_ml, float* part_o) {
  constexpr int kPairs = kPer / 2, kTokens = kPer > 8 ? 1 : kHeads == 8 ? 2 : 8;
  constexpr bool kTokenLanes = kHeads == 1 && kTokens == 8;
  static_assert(kHeads == 1 || kHeads == 8);
  extern __shared__ float memory[];  // outputs by warp and head [V]; then what other blocks send
  __shared__ float2 own[kGeneralWarps][kHeads], sent[kMostCluster][kHeads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockIdx.z, K = static_cast<int>(a.K), V = static_cast<int>(a.V);
  const int group = static_cast<int>(a.Hq / a.Hk), blocks_a_head = (group + kHeads - 1) / kHeads;
  const int key_head = static_cast<int>(blockIdx.y) / blocks_a_head, first_head = static_cast<int>(blockIdx.y) % blocks_a_head * kHeads, heads = min(kHeads, group - first_head);
  const bool turns = a.rope != nullptr, cluster = part_o == nullptr;
  const int shares = gridDim.x, rank = blockIdx.x;
  Pair pairs[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) pairs[i] = pair_of(a, lane + 32 * i);
  launch_dependents();
  wait_for_previous();
  const Range r = visible(a, n);
  const int64_t count = r.count();
  if (count == 0) {  // of all blocks of the sequence
    for (int i = threadIdx.x; cluster && a.o_tiles == 0 && rank == 0 && i < heads * V; i += kGeneralThreads) {
      static_cast<T*>(a.o)[(static_cast<int64_t>(n) * a.Hq + key_head * group + first_head) * V + i] = from_float<T>(0.0f);
    }
    if (!cluster && static_cast<int>(threadIdx.x) < heads) {
      part_ml[(static_cast<int64_t>(rank) * a.N + n) * a.Hq + key_head * group + first_head + threadIdx.x] = make_float2(kNothing, 0.0f);
    }
    return;
  }
  if (cluster) cluster_arrive();
  const int from = static_cast<int>(count * rank / shares), to = static_cast<int>(count * (rank + 1) / shares);
  // The query's own token, where it is not in the cache: the block of the last share that has the first of the key head's queries puts it there.
  const T *fresh_key = nullptr, *fresh_value = nullptr;
  if (a.new_keys != nullptr) {
    fresh_key = static_cast<const T*>(a.new_keys) + n * a.q_row + static_cast<int64_t>(key_head) * K;
    fresh_value = static_cast<const T*>(a.new_values) + n * a.q_row + static_cast<int64_t>(key_head) * V;
    if (rank == shares - 1 && first_head == 0) {
      T* const keys = static_cast<T*>(const_cast<void*>(a.keys)) + place(a, n, r.end - 1, a.key_row, a.key_token) + key_head * a.key_head;
      T* const values = static_cast<T*>(const_cast<void*>(a.values)) + place(a, n, r.end - 1, a.value_row, a.value_token) + key_head * a.value_head;
      for (int i = threadIdx.x; i < K; i += kGeneralThreads) keys[i] = fresh_key[i];
      for (int i = threadIdx.x; i < V; i += kGeneralThreads) values[i] = fresh_value[i];
    }
  }
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
  float factor[kPer], step_c[kPairs], step_s[kPairs];  // the keys' norm; a token on
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float* weight = a.k_norm + (a.norm_together ? key_head * K : 0);
    factor[2 * i] = a.k_norm != nullptr ? value_at(weight, pairs[i].lo) : 1.0f, factor[2 * i + 1] = a.k_norm != nullptr ? value_at(weight, pairs[i].hi) : 1.0f;
  }
  if (turns) angles_at(a.capacity > 1 ? 1 : 0);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) step_c[i] = turns ? cosine[i] : 1.0f, step_s[i] = turns ? sine[i] : 0.0f;
  float acc[kHeads][kPer], m = kNothing, sum = 0.0f;
  constexpr int kLanesAHead = 32 / kHeads;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) acc[h][i] = 0.0f;
  }
#pragma unroll 1
  for (int base = from + warp * kTokens; base < to; base += kGeneralWarps * kTokens) {
    // Lanes below kTokens find where the keys lie, those behind where the values do.
    const int asked = min(base + lane % kTokens, to - 1), found = token_of(r, asked);
    const bool of_values = lane >= kTokens;
    const int64_t at = place(a, n, found, of_values ? a.value_row : a.key_row, of_values ? a.value_token : a.key_token) + key_head * (of_values ? a.value_head : a.key_head);
    T keys[kTokens][kPer], values[kTokens][kPer];
    int tokens[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      tokens[t] = __shfl_sync(~0u, found, t);
      const T* k = static_cast<const T*>(a.keys) + __shfl_sync(~0u, at, t);
      if (fresh_key != nullptr && tokens[t] == r.end - 1) k = fresh_key;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        keys[t][2 * p] = pairs[p].lo >= 0 ? k[pairs[p].lo] : from_float<T>(0.0f), keys[t][2 * p + 1] = pairs[p].hi >= 0 ? k[pairs[p].hi] : from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const T* v = static_cast<const T*>(a.values) + __shfl_sync(~0u, at, kTokens + t);
      if (fresh_key != nullptr && tokens[t] == r.end - 1) v = fresh_value;
#pragma unroll
      for (int e = 0; e < kPer; ++e) values[t][e] = lane + 32 * e < V ? v[lane + 32 * e] : from_float<T>(0.0f);
    }
    if (turns) angles_at(tokens[0]);
    float scores[kTokens], dots8[8], squares8[8];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (turns && t > 0) {
        if (tokens[t] != tokens[t - 1] + 1) {
          angles_at(tokens[t]);
        } else {
#pragma unroll
          for (int p = 0; p < kPairs; ++p) {
            const float x = cosine[p], y = sine[p];
            cosine[p] = fmaf(-y, step_s[p], x * step_c[p]), sine[p] = fmaf(x, step_s[p], y * step_c[p]);
          }
        }
      }
      float k[kPer], squares = 0.0f;
#pragma unroll
      for (int e = 0; e < kPer; ++e) k[e] = to_float(keys[t][e]);
      if (a.k_norm != nullptr) {
#pragma unroll
        for (int e = 0; e < kPer; ++e) squares = fmaf(k[e], k[e], squares), k[e] *= factor[e];
      }
      if (turns) {
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
      if constexpr (kTokenLanes) {
        dots8[t] = dots[0], squares8[t] = squares;
      } else {
        float scale = 1.0f;
        if (a.k_norm != nullptr) {
          scale = a.norm_together ? __ldcg(scales + a.N + static_cast<int64_t>(n) * most + min(base + t, to - 1)) : rsqrtf(warp_sum<32>(squares) / static_cast<float>(K) + a.norm_eps);
        }
        float sum_of_lanes;
        if constexpr (kHeads == 8) {
          sum_of_lanes = row_sum8<32>(dots, lane);
        } else {
          sum_of_lanes = warp_sum<32>(dots[0]);
        }
        scores[t] = base + t < to ? scale * sum_of_lanes : kNothing;
      }
    }
    if constexpr (kTokenLanes) {
      float scale = 1.0f;
      const int mine = base + lane / 4;
      if (a.k_norm != nullptr) {
        scale = a.norm_together ? __ldcg(scales + a.N + static_cast<int64_t>(n) * most + min(mine, to - 1)) : rsqrtf(row_sum8<32>(squares8, lane) / static_cast<float>(K) + a.norm_eps);
      }
      const float dot = row_sum8<32>(dots8, lane), score = mine < to ? scale * dot : kNothing;  // all lanes take part in the sum
      float top = fmaxf(m, score);
#pragma unroll
      for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      const float shrink = exp2f(m - top), p = mine < to ? exp2f(score - top) : 0.0f;
      m = top, sum = fmaf(sum, shrink, p);
#pragma unroll
      for (int e = 0; e < kPer; ++e) acc[0][e] *= shrink;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float by = __shfl_sync(~0u, p, 4 * t);
#pragma unroll
        for (int e = 0; e < kPer; ++e) acc[0][e] = fmaf(by, to_float(values[t][e]), acc[0][e]);
      }
    } else {
      float top = m;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) top = fmaxf(top, scores[t]);
      if (__any_sync(~0u, top > m)) {
        const float shrink = exp2f(m - top);
        m = top, sum *= shrink;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float by = __shfl_sync(~0u, shrink, h * kLanesAHead);
#pragma unroll
          for (int e = 0; e < kPer; ++e) acc[h][e] *= by;
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float p = base + t < to ? exp2f(scores[t] - m) : 0.0f;
        sum += p;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float by = __shfl_sync(~0u, p, h * kLanesAHead);
#pragma unroll
          for (int e = 0; e < kPer; ++e) acc[h][e] = fmaf(by, to_float(values[t][e]), acc[h][e]);
        }
      }
    }
  }
  if constexpr (kTokenLanes) {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  }
  // The warps' sums.
  if (lane % kLanesAHead == 0) own[warp][lane / kLanesAHead] = make_float2(m, sum);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      if (lane + 32 * e < V) memory[(warp * kHeads + h) * V + lane + 32 * e] = acc[h][e];
    }
  }
  __syncthreads();
  if (cluster) cluster_wait();  // the others have begun
  // Head h is finished by block h % shares, as its (h / shares)-th.
  float* const received = memory + kGeneralWarps * kHeads * V;  // [heads that it finishes][shares][V]
  for (int i = threadIdx.x; i < heads * V; i += kGeneralThreads) {
    const int h = i / V, e = i % V;
    float top = kNothing, total = 0.0f, x = 0.0f;
#pragma unroll
    for (int w = 0; w < kGeneralWarps; ++w) top = fmaxf(top, own[w][h].x);
#pragma unroll
    for (int w = 0; w < kGeneralWarps; ++w) {
      const float weight = exp2f(own[w][h].x - top);
      total = fmaf(weight, own[w][h].y, total), x = fmaf(weight, memory[(w * kHeads + h) * V + e], x);
    }
    if (cluster) {
      send(received + ((h / shares) * shares + rank) * V + e, h % shares, x);
      if (e == 0) send(&sent[rank][h].x, h % shares, top), send(&sent[rank][h].y, h % shares, total);
    } else {
      const int64_t part = (static_cast<int64_t>(rank) * a.N + n) * a.Hq + key_head * group + first_head + h;
      part_o[part * V + e] = x;
      if (e == 0) part_ml[part] = make_float2(top, total);
    }
  }
  if (!cluster) return;
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  for (int h = rank; h < heads; h += shares) {
    const float* const x = received + (h / shares) * shares * V;
    finish_head<T, kGeneralThreads>(a, n, key_head * group + first_head + h, shares, [&](int s, int e) { return x[s * V + e]; }, [&](int s) { return sent[s][h]; });
  }
}

template <typename T>
__global__ void __launch_bounds__(kJoinThreads) general_join_kernel(const __grid_constant__ OryxDecodeAttention a, int splits, const float2* part_ml, const float* part_o) {
  __shared__ float2 shares[kMostSplits];
  const int h = blockIdx.x, n = blockIdx.y, V = static_cast<int>(a.V);
  launch_dependents();
  wait_for_previous();
  if (a.o_tiles != 0 && visible(a, n).count() == 0) return;
  const auto part = [&](int c) { return (static_cast<int64_t>(c) * a.N + n) * a.Hq + h; };
  for (int c = threadIdx.x; c < splits; c += kJoinThreads) shares[c] = __ldcg(part_ml + part(c));
  __syncthreads();
  finish_head<T, kJoinThreads>(a, n, h, splits, [&](int s, int e) { return __ldcg(part_o + part(s) * V + e); }, [&](int s) { return shares[s]; });
}

int64_t blocks_of(const OryxDecodeAttention& a, int heads) { return a.Hk * ((a.Hq / a.Hk + heads - 1) / heads); }
int heads_of(const OryxDecodeAttention& a) { return a.Hq > a.Hk && std::max(a.K, a.V) <= 256 ? 8 : 1; }
int64_t scale_floats(const OryxDecodeAttention& a) { return a.norm_together && a.q_norm != nullptr ? (a.N * (1 + most_seen(a)) + 3) / 4 * 4 : 0; }

// Shares that keep the chip busy, whatever the lengths, and no more; up to kMostCluster a cluster.
int splits_of(const OryxDecodeAttention& a) {
  const int64_t blocks = blocks_of(a, heads_of(a)) * a.N, wanted = (264 + blocks - 1) / blocks, seen = most_seen(a);
  // A block that would go more than so many times round is worth a second kernel.
  const bool long_ones = wanted > kMostCluster && seen > 16 * kMostCluster * kGeneralWarps * (heads_of(a) == 8 ? 2 : 8);
  if (long_ones) return static_cast<int>(std::min<int64_t>({wanted, (seen + 63) / 64, kMostSplits}));
  int cluster = 1;
  while (cluster < kMostCluster && cluster < wanted && 32 * cluster < seen) cluster *= 2;
  return cluster;
}

template <typename T, int kPer, int kHeads>
int launch_general(const OryxDecodeAttention& a, float* workspace, cudaStream_t stream) {
  const int64_t heads = blocks_of(a, kHeads), seen = most_seen(a), scale_count = scale_floats(a);
  const int splits = splits_of(a);
  const bool cluster = splits <= kMostCluster;
  float* const scales = workspace;
  float2* const ml = reinterpret_cast<float2*>(workspace + scale_count);
  float* const o = cluster ? nullptr : reinterpret_cast<float*>(ml + splits * a.N * a.Hq);
  if (scale_count > 0) {
    const int64_t some = std::max<int64_t>(1, std::min<int64_t>((seen + kScaleWarps) / kScaleWarps, 264 / a.N + 1));
    if (const int e = launch_after(scales_kernel<T>, dim3(static_cast<unsigned>(some), static_cast<unsigned>(a.N)), 32 * kScaleWarps, 0, stream, a, static_cast<int>(seen), scales); e != 0) return e;
  }
  const int64_t finished = (kHeads + splits - 1) / splits;  // heads that a block of the cluster finishes
  const int bytes = static_cast<int>(4 * a.V * (kGeneralWarps * kHeads + (cluster ? finished * splits : 0)));
  const auto kernel = general_kernel<T, kPer, kHeads>;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); e != cudaSuccess) return e;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(heads), static_cast<unsigned>(a.N));
  if (const int e = launch_clusters_after(cluster ? splits : 1, kernel, grid, kGeneralThreads, bytes, stream, a, static_cast<int>(seen), static_cast<const float*>(scales), ml, o); e != 0) return e;
  if (cluster) return cudaSuccess;
  return launch_after(general_join_kernel<T>, dim3(static_cast<unsigned>(a.Hq), static_cast<unsigned>(a.N)), kJoinThreads, 0, stream, a, splits, static_cast<const float2*>(ml),
                      static_cast<const float*>(o));
}

template <typename T>
int by_shape(const OryxDecodeAttention& a, float* workspace, cudaStream_t stream) {
  const int64_t width = std::max(a.K, a.V);
  if (heads_of(a) == 8) {
    if (width <= 64) return launch_general<T, 2, 8>(a, workspace, stream);
    return width <= 128 ? launch_general<T, 4, 8>(a, workspace, stream) : launch_general<T, 8, 8>(a, workspace, stream);
  }
  if (width <= 64) return launch_general<T, 2, 1>(a, workspace, stream);
  if (width <= 128) return launch_general<T, 4, 1>(a, workspace, stream);
  return width <= 256 ? launch_general<T, 8, 1>(a, workspace, stream) : launch_general<T, 32, 1>(a, workspace, stream);
}

}  // namespace
}  // namespace oryx::decode_attention_cuda

using namespace oryx::decode_attention_cuda;

extern "C" int64_t oryx_decode_attention_general_workspace(const OryxDecodeAttention* a) {
  const int64_t splits = splits_of(*a);
  return 16 + 4 * (scale_floats(*a) + (splits <= kMostCluster ? 0 : splits * a->N * a->Hq * (2 + a->V)));
}

extern "C" int oryx_decode_attention_is_small(const OryxDecodeAttention* a) { return 2 * a->N * a->Hk * most_seen(*a) * (a->K + a->V) <= kFewBytes ? 1 : 0; }

extern "C" int oryx_decode_attention_general(const OryxDecodeAttention* a, int dtype, void* workspace, void* stream) {
  if (a->N == 0 || a->Hq == 0) return cudaSuccess;
  if (a->N > 65535 || std::max(a->K, a->V) > 1024 || a->Hq % a->Hk != 0) return cudaErrorInvalidValue;
  const auto memory = static_cast<float*>(workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  return dtype == kFloat32 ? by_shape<float>(*a, memory, on) : by_shape<__nv_bfloat16>(*a, memory, on);
}
