// One token of a linear recurrence with a float32 state, in place: what the steps of the gated delta rule and of SSD share. Bound by reading and writing the
// state once.
//
//   S' = a S + w k^T      w_r = b (v_r - a (S k)_r) with a prediction, b v_r without
//   o  = S' q + skip v
//
// a is one number a head or, of a rule with kChannels, one for each of the K columns.
//
// A warp holds kRows value rows in registers: all its loads are under way before it needs keys, queries or scalars, which other warps of the head read too,
// from L2.
#pragma once

#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/cuda/packet.cuh"

namespace oryx::ops::cuda {

struct StateStep {
  const void *q, *k, *v;  // [N, Hq, K], [N, Hk, K], [N, Hv, V], dense
  float* state;           // rows of K values dense, V rows dense; strides below
  void* o;                // [N, Ho, V]
  int64_t N, Hq, Hk, Hv, Hs, Ho, K, V;
  int64_t state_sequence, state_head;  // strides of the state in elements
  const int32_t *places = nullptr, *active = nullptr;  // [N] where each sequence's state stands, [1] how many of the N count; null: n, all

  __device__ bool idle(int64_t n) const { return active != nullptr && n >= __ldg(active); }
  __device__ int64_t place(int64_t n) const { return places != nullptr ? __ldg(places + n) : n; }
};

struct StepScalars {
  float decay, write, key_scale, query_scale, skip;
};

constexpr int kStepWarps = 4, kStepRows = 8;

// What the kernel before this one may have written while this one had begun: not by way of the read-only cache, whose loads a compiler may move ahead of the wait.
__device__ __forceinline__ float load_fresh(const void* p, int dtype, int64_t i) {
  if (dtype == kFloat32) return __ldcg(static_cast<const float*>(p) + i);
  return __uint_as_float(static_cast<uint32_t>(__ldcg(static_cast<const unsigned short*>(p) + i)) << 16);
}
template <int kVectors>
__device__ __forceinline__ void load_narrow(const void* p, int dtype, int64_t at, float (&x)[4 * kVectors], int lanes, int lane) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = at + 4 * (lane + v * lanes);
    if (dtype == kFloat32) {
      const float4 f = __ldcg(reinterpret_cast<const float4*>(static_cast<const float*>(p) + i));
      x[4 * v] = f.x, x[4 * v + 1] = f.y, x[4 * v + 2] = f.z, x[4 * v + 3] = f.w;
    } else {
      const uint2 w = __ldcg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p) + i));
      x[4 * v] = __uint_as_float(w.x << 16), x[4 * v + 1] = __uint_as_float(w.x & 0xffff0000u);
      x[4 * v + 2] = __uint_as_float(w.y << 16), x[4 * v + 3] = __uint_as_float(w.y & 0xffff0000u);
    }
  }
}

template <int kLanesARow>
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int d = kLanesARow / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

// Sums of eight values a lane over rows of kLanesARow lanes: in lane l the sum of value l / (kLanesARow / 8), in 9 exchanges for 32 lanes where eight sums one
// by one take 40.
template <int kLanesARow>
__device__ __forceinline__ float row_sum8(const float (&x)[kStepRows], int l) {
  static_assert(kStepRows == 8 && kLanesARow >= 8);
  float a[4], b[2];
  const bool up = l & (kLanesARow / 2), mid = l & (kLanesARow / 4), right = l & (kLanesARow / 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = (up ? x[i + 4] : x[i]) + __shfl_xor_sync(0xffffffffu, up ? x[i] : x[i + 4], kLanesARow / 2);
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = (mid ? a[i + 2] : a[i]) + __shfl_xor_sync(0xffffffffu, mid ? a[i] : a[i + 2], kLanesARow / 4);
  float c = (right ? b[1] : b[0]) + __shfl_xor_sync(0xffffffffu, right ? b[0] : b[1], kLanesARow / 8);
#pragma unroll
  for (int d = kLanesARow / 16; d > 0; d /= 2) c += __shfl_xor_sync(0xffffffffu, c, d);
  return c;
}

// kK = K: 16, 32, 64, 128 or 256. kLanesARow lanes hold a row, so that a warp works on 32 / kLanesARow rows side by side. `Rule::scalars(n, head, k.k, q.q)`.
template <int kK, typename Rule>
__global__ void __launch_bounds__(kStepWarps * 32) state_step_kernel(const __grid_constant__ StateStep a, const __grid_constant__ Rule rule, int dtype) {
  constexpr int kLanesARow = kK / 4 < 32 ? kK / 4 : 32, kVectors = kK / 4 / kLanesARow, kSide = 32 / kLanesARow;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, l = lane % kLanesARow, side = lane / kLanesARow;
  const int head = blockIdx.y;
  const int64_t n = blockIdx.z;
  const int first = (static_cast<int>(blockIdx.x) * kStepWarps + warp) * kStepRows * kSide;
  const int V = static_cast<int>(a.V);
  launch_dependents();
  if (first >= V || a.idle(n)) return wait_for_previous();
  float* state = a.state + a.place(n) * a.state_sequence + head * a.state_head;
  float4 s[kStepRows][kVectors];
#pragma unroll
  for (int r = 0; r < kStepRows; ++r) {
    const int row = first + r * kSide + side;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      s[r][v] = row < V ? __ldcs(reinterpret_cast<const float4*>(state + static_cast<int64_t>(row) * kK) + l + v * kLanesARow) : make_float4(0, 0, 0, 0);
    }
  }
  wait_for_previous();
  float k[4 * kVectors], q[4 * kVectors];
  if constexpr (Rule::kChannels) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4 d = rule.decays(n, head, kK, 4 * (l + v * kLanesARow));
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) s[r][v].x *= d.x, s[r][v].y *= d.y, s[r][v].z *= d.z, s[r][v].w *= d.w;
    }
  }
  const int64_t key_head = n * a.Hk + head / (a.Hs / a.Hk);
  load_narrow<kVectors>(a.k, dtype, key_head * kK, k, kLanesARow, l);
  const int64_t value_at = (n * a.Hv + head / (a.Hs / a.Hv)) * V;
  const int readers = static_cast<int>(a.Ho / a.Hs);
  float kk = 0.0f;
#pragma unroll
  for (int i = 0; i < 4 * kVectors; ++i) kk = fmaf(k[i], k[i], kk);
  kk = row_sum<kLanesARow>(kk);
  StepScalars c = rule.scalars(n, head, kk);
  // Row r of this group of lanes belongs to its lanes l with l / kOwners == r.
  constexpr bool kTogether = kLanesARow >= 8;
  constexpr int kOwners = kTogether ? kLanesARow / 8 : 1;
  const auto row_of = [&](int r) { return first + r * kSide + side; };
  const auto value_of = [&](int r) { return row_of(r) < V ? load_fresh(a.v, dtype, value_at + row_of(r)) : 0.0f; };
  const auto parts = [&](const float(&x)[4 * kVectors], float(&p)[kStepRows]) {
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      p[r] = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        p[r] = fmaf(s[r][v].x, x[4 * v], fmaf(s[r][v].y, x[4 * v + 1], fmaf(s[r][v].z, x[4 * v + 2], fmaf(s[r][v].w, x[4 * v + 3], p[r]))));
    }
  };
  float p[kStepRows], write[kStepRows], own_value = 0.0f;
  if constexpr (Rule::kPredicts) parts(k, p);
  if constexpr (kTogether) {
    own_value = value_of(l / kOwners);
    float own = own_value;
    if constexpr (Rule::kPredicts) own -= c.decay * c.key_scale * row_sum8<kLanesARow>(p, l);
    own *= c.write * c.key_scale;
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) write[r] = __shfl_sync(0xffffffffu, own, (lane & ~(kLanesARow - 1)) + r * kOwners);
  } else {
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      write[r] = value_of(r);
      if constexpr (Rule::kPredicts) write[r] -= c.decay * c.key_scale * row_sum<kLanesARow>(p[r]);
      write[r] *= c.write * c.key_scale;
    }
  }
#pragma unroll
  for (int r = 0; r < kStepRows; ++r) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float4& x = s[r][v];
      x.x = fmaf(write[r], k[4 * v], c.decay * x.x), x.y = fmaf(write[r], k[4 * v + 1], c.decay * x.y);
      x.z = fmaf(write[r], k[4 * v + 2], c.decay * x.z), x.w = fmaf(write[r], k[4 * v + 3], c.decay * x.w);
      if (row_of(r) < V) __stcs(reinterpret_cast<float4*>(state + static_cast<int64_t>(row_of(r)) * kK) + l + v * kLanesARow, x);
    }
  }
  for (int reader = 0; reader < readers; ++reader) {
    const int64_t out_head = static_cast<int64_t>(head) * readers + reader, out_at = (n * a.Ho + out_head) * V;
    load_narrow<kVectors>(a.q, dtype, (n * a.Hq + out_head / (a.Ho / a.Hq)) * kK, q, kLanesARow, l);
    float qq = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * kVectors; ++i) qq = fmaf(q[i], q[i], qq);
    const float scale = rule.query_scale(Rule::kPredicts ? row_sum<kLanesARow>(qq) : 0.0f);
    parts(q, p);
    if constexpr (kTogether) {
      const float out = fmaf(row_sum8<kLanesARow>(p, l), scale, c.skip * own_value);
      const int row = row_of(l / kOwners);
      if (l % kOwners == 0 && row < V) store_any(a.o, dtype, out_at + row, out);
    } else {
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        const float out = fmaf(row_sum<kLanesARow>(p[r]), scale, c.skip * value_of(r));
        if (l == 0 && row_of(r) < V) store_any(a.o, dtype, out_at + row_of(r), out);
      }
    }
  }
}

// Any K and V: a warp a row.
template <typename Rule>
__global__ void __launch_bounds__(kStepWarps * 32) plain_step_kernel(const __grid_constant__ StateStep a, const __grid_constant__ Rule rule, int dtype) {
  const int lane = threadIdx.x % 32, row = static_cast<int>(blockIdx.x) * kStepWarps + threadIdx.x / 32, head = blockIdx.y;
  const int64_t n = blockIdx.z;
  launch_dependents();
  wait_for_previous();
  if (row >= a.V || a.idle(n)) return;
  const int K = static_cast<int>(a.K);
  float* s = a.state + a.place(n) * a.state_sequence + head * a.state_head + static_cast<int64_t>(row) * K;
  const int64_t k_at = (n * a.Hk + head / (a.Hs / a.Hk)) * K;
  float kk = 0.0f, p = 0.0f;
  for (int i = lane; i < K; i += 32) {
    const float k = load_fresh(a.k, dtype, k_at + i);
    if constexpr (Rule::kChannels) s[i] *= rule.decay_at(n, head, K, i);
    kk = fmaf(k, k, kk), p = fmaf(s[i], k, p);
  }
  kk = warp_sum<32>(kk), p = warp_sum<32>(p);
  const StepScalars c = rule.scalars(n, head, kk);
  const float value = load_fresh(a.v, dtype, (n * a.Hv + head / (a.Hs / a.Hv)) * a.V + row);
  const float write = c.write * (Rule::kPredicts ? value - c.decay * c.key_scale * p : value) * c.key_scale;
  for (int i = lane; i < K; i += 32) s[i] = fmaf(write, load_fresh(a.k, dtype, k_at + i), c.decay * s[i]);
  const int readers = static_cast<int>(a.Ho / a.Hs);
  for (int reader = 0; reader < readers; ++reader) {
    const int64_t out_head = static_cast<int64_t>(head) * readers + reader, q_at = (n * a.Hq + out_head / (a.Ho / a.Hq)) * K;
    float qq = 0.0f, o = 0.0f;
    for (int i = lane; i < K; i += 32) {
      const float q = load_fresh(a.q, dtype, q_at + i);
      qq = fmaf(q, q, qq), o = fmaf(s[i], q, o);
    }
    const float out = fmaf(warp_sum<32>(o), rule.query_scale(warp_sum<32>(qq)), c.skip * value);
    if (lane == 0) store_any(a.o, dtype, (n * a.Ho + out_head) * a.V + row, out);
  }
}

// `chained`: the kernel may start before the one ahead of it in the stream has ended (dependent_launch.cuh), which must not write the state.
template <typename Rule>
int launch_state_step(const StateStep& a, const Rule& rule, int dtype, cudaStream_t stream, bool chained = false) {
  if (a.N == 0 || a.Hs == 0 || a.V == 0) return cudaSuccess;
  if (a.N > 65535 || a.Hs > 65535) return cudaErrorInvalidValue;
  const bool even = aligned16(a.q) && aligned16(a.k) && aligned16(a.v) && aligned16(a.state) && a.state_sequence % 4 == 0 && a.state_head % 4 == 0;
  const auto grid = [&](int64_t rows) { return dim3(static_cast<unsigned>((a.V + rows - 1) / rows), static_cast<unsigned>(a.Hs), static_cast<unsigned>(a.N)); };
  const auto run = [&](auto width) {
    constexpr int K = decltype(width)::value, kSide = K / 4 < 32 ? 128 / K : 1;
    const dim3 blocks = grid(kStepWarps * kStepRows * kSide);
    if (chained) return launch_after(state_step_kernel<K, Rule>, blocks, kStepWarps * 32, 0, stream, a, rule, dtype);
    state_step_kernel<K, Rule><<<blocks, kStepWarps * 32, 0, stream>>>(a, rule, dtype);
    return static_cast<int>(cudaGetLastError());
  };
  if (even && a.K == 16) return run(std::integral_constant<int, 16>());
  if (even && a.K == 32) return run(std::integral_constant<int, 32>());
  if (even && a.K == 64) return run(std::integral_constant<int, 64>());
  if (even && a.K == 128) return run(std::integral_constant<int, 128>());
  if (even && a.K == 256) return run(std::integral_constant<int, 256>());
  plain_step_kernel<Rule><<<grid(kStepWarps), kStepWarps * 32, 0, stream>>>(a, rule, dtype);
  return cudaGetLastError();
}

}  // namespace oryx::ops::cuda
