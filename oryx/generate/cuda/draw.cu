// A block draws from a row. Candidates in the order of their likelihood, of equals the lower id first, are never sorted: a logit has 16 bits, so that the border of what top_k, top_p or
// the draw itself admits is a logit, found by halving the range of all, and how many of its equals are admitted.
#include <cuda_bf16.h>

#include "oryx/generate/cuda/draw.h"

namespace oryx::draw_cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kKeys = 1 << 16, kMinusInfinity = 0xffff - 0xff80;  // below it only keys of NaN

struct Sum {
  double weight;
  int count;
};

// Keys go up with the logits they stand for; both zeros have one.
__device__ __forceinline__ int key_of(uint16_t bits) {
  if ((bits & 0x7fff) == 0) return 0x8000;
  return bits & 0x8000 ? 0xffff - bits : bits | 0x8000;
}
__device__ __forceinline__ float logit_of(int key) {
  const uint16_t bits = static_cast<uint16_t>(key & 0x8000 ? key & 0x7fff : 0xffff - key);
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

struct Row {
  const uint16_t* logits;
  float* weights;
  int below;
  double highest, temperature;

  __device__ __forceinline__ int key(int i) const { return key_of(logits[i]); }
  // As the host's, from the key: equal logits have equal weights.
  __device__ __forceinline__ double exact(int key) const {
    const double gap = static_cast<double>(logit_of(key)) - highest;
    return gap == 0 ? 1.0 : exp(gap / temperature);
  }
  __device__ __forceinline__ double weight(int key) const { return static_cast<double>(static_cast<float>(exact(key))); }
};

struct Shared {
  double weights[kWarps];
  int counts[kWarps];
  int found;
};

// In an order that is always the same.
__device__ Sum block_sum(Sum x, Shared& s) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x.weight += __shfl_xor_sync(~0u, x.weight, d), x.count += __shfl_xor_sync(~0u, x.count, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.weights[threadIdx.x / 32] = x.weight, s.counts[threadIdx.x / 32] = x.count;
  __syncthreads();
  Sum all{0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all.weight += s.weights[w], all.count += s.counts[w];
  return all;
}

// Sums over the threads in their order, the same every time: of those up to this one, and of all.
template <typename T>
struct Prefix {
  T up_to, all;
};
template <typename T>
__device__ Prefix<T> block_prefix(T mine, T (&warps)[kWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T up_to = mine, before{}, all{};
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(~0u, up_to, d);
    if (lane >= d) up_to += other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = up_to;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warps[w];
    all += warps[w];
  }
  return {before + up_to, all};
}

// Candidates whose key is at least `key`.
__device__ Sum at_least(const Row& r, int key, Shared& s) {
  Sum x{0, 0};
  for (int i = threadIdx.x; i < r.below; i += kThreads) {
    if (r.key(i) >= key) x.weight += static_cast<double>(r.weights[i]), ++x.count;
  }
  return block_sum(x, s);
}

// What is admitted: all above a key, and the first `ties` that have it.
struct Admitted {
  int key, ties;
};
// Of these, those whose key is at least `key`.
__device__ Sum admitted_from(const Row& r, const Admitted& a, int key, Shared& s) {
  if (key > a.key) return at_least(r, key, s);
  Sum x = at_least(r, a.key + 1, s);
  if (a.ties > 0) x.weight += a.ties * r.weight(a.key), x.count += a.ties;  // else the key may be that of no number
  return x;
}

// The highest key from `low` on for which enough(sum of what is admitted from there on) holds; `low` where none does.
template <typename F>
__device__ int border(const Row& r, const Admitted& a, Shared& s, F enough) {
  int low = a.key, high = kKeys;  // enough at low, not at high
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (enough(admitted_from(r, a, middle, s)) ? low : high) = middle;
  }
  return low;
}

// The j-th id from 0 whose key it is.
__device__ int id_of(const Row& r, int key, int j, Shared& s) {
  const int chunk = (r.below + kThreads - 1) / kThreads, begin = min(static_cast<int>(threadIdx.x) * chunk, r.below), end = min(begin + chunk, r.below);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += r.key(i) == key ? 1 : 0;
  const int up_to = block_prefix(mine, s.counts).up_to;
  if (j < up_to && j >= up_to - mine) {
    int left = j - (up_to - mine);
    for (int i = begin; i < end; ++i) {
      if (r.key(i) == key && left-- == 0) s.found = i;
    }
  }
  __syncthreads();
  return s.found;
}

// From all, in the order of ids: the first whose sum with those before exceeds uniform times the sum of all.
__device__ int draw_of_all(const Row& r, double uniform, Shared& s) {
  const int chunk = (r.below + kThreads - 1) / kThreads, begin = min(static_cast<int>(threadIdx.x) * chunk, r.below), end = min(begin + chunk, r.below);
  double mine = 0;
  for (int i = begin; i < end; ++i) mine += static_cast<double>(r.weights[i]);
  if (threadIdx.x == 0) s.found = -1;  // nobody has found anything before the sums are there
  const auto [end_sum, all] = block_prefix(mine, s.weights);
  const double target = uniform * all;
  double sum = end_sum - mine;
  // The first chunk that gets beyond the target; rounding may let none of its candidates do so: then its last one.
  if (mine > 0 && end_sum > target) {
    int last = begin;
    for (int i = begin; i < end; ++i) {
      if (r.weights[i] == 0.0f) continue;
      last = i;
      sum += static_cast<double>(r.weights[i]);
      if (sum > target) break;
    }
    atomicMin(reinterpret_cast<unsigned*>(&s.found), static_cast<unsigned>(last));
  }
  __syncthreads();
  return s.found;
}

__global__ void __launch_bounds__(kThreads) draw_kernel(const OryxDraw a) {
  __shared__ Shared s;
  const int n = blockIdx.x;
  const OryxDrawRow row = a.rows[n];
  int32_t* const token = a.likeliest + a.places[n];
  if (row.temperature == 0) return;
  const int likeliest = *token;
  if (likeliest < 0) return;
  Row r{static_cast<const uint16_t*>(a.logits) + n * a.vocab, a.weights + n * a.vocab, a.below[n], 0, row.temperature};
  r.highest = static_cast<double>(logit_of(r.key(likeliest)));
  for (int i = threadIdx.x; i < r.below; i += kThreads) r.weights[i] = static_cast<float>(r.exact(r.key(i)));
  __syncthreads();
  int drawn = 0;
  const bool by_count = row.top_k > 0 && row.top_k < r.below;
  if (!(row.top_k > 0 || row.top_p < 1 || row.min_p > 0)) {
    drawn = draw_of_all(r, row.uniform, s);
  } else {
    Admitted kept{0, 0};  // all
    if (by_count) {
      const int most = static_cast<int>(row.top_k);
      kept.key = border(r, kept, s, [&](const Sum& x) { return x.count >= most; });
      kept.ties = most - at_least(r, kept.key + 1, s).count;
    }
    if (row.top_p < 1) {
      const double target = row.top_p * admitted_from(r, kept, kept.key, s).weight;
      const int key = border(r, kept, s, [&](const Sum& x) { return x.weight >= target; });
      const Sum above = admitted_from(r, kept, key + 1, s);
      const int there = key == kept.key ? kept.ties : at_least(r, key, s).count - above.count;
      kept.ties = min(max(static_cast<int>(ceil((target - above.weight) / r.weight(key))), 1), there);
      kept.key = key;
    }
    if (row.min_p > 0) {
      int low = kMinusInfinity, high = r.key(likeliest);  // too unlikely at low, not at high
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (r.exact(middle) < row.min_p ? low : high) = middle;
      }
      if (high > kept.key) kept = {high, at_least(r, high, s).count - at_least(r, high + 1, s).count};
    }
    const double target = row.uniform * admitted_from(r, kept, kept.key, s).weight;
    const int key = border(r, kept, s, [&](const Sum& x) { return x.weight > target; });
    const Sum above = admitted_from(r, kept, key + 1, s);
    const int there = key == kept.key ? kept.ties : at_least(r, key, s).count - above.count;
    // Without any there the target is what rounding made of the whole sum.
    drawn = there == 0 ? likeliest : id_of(r, key, min(max(static_cast<int>((target - above.weight) / r.weight(key)), 0), there - 1), s);
  }
  if (threadIdx.x == 0) *token = drawn;
}

}  // namespace
}  // namespace oryx::draw_cuda

extern "C" int oryx_draw(const OryxDraw* a, void* stream) {
  if (a->N == 0) return cudaSuccess;
  oryx::draw_cuda::draw_kernel<<<static_cast<unsigned>(a->N), oryx::draw_cuda::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*a);
  return cudaGetLastError();
}
