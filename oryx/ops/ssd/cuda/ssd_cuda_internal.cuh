// What the SSD kernels share: shapes, sequences, the scalars of a chunk, and one step of the state.
#pragma once

#include "oryx/ops/cuda/dependent_launch.cuh"
#include "oryx/ops/cuda/hopper.cuh"
#include "oryx/ops/ssd/cuda/ssd_cuda.h"

namespace oryx::ssd_cuda {

using namespace oryx::hopper;
using ops::cuda::launch_after, ops::cuda::launch_clusters_after, ops::cuda::launch_dependents, ops::cuda::wait_for_previous;

constexpr int kC = 64;            // tokens of a chunk
constexpr int kPanel = kC * 128;  // bytes of 64 rows of 64 bfloat16, swizzled
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kProcessors = 132;  // of the H100 and H200: only choices of speed read it

// The scalars of a chunk, 64 floats each: G log2(e), dt, exp(G_C - G) dt, exp(G). Bytes from the start.
constexpr int kG = 0, kDt = 256, kTail = 512, kGamma = 768, kShifted = 768, kScalarBytes = 1024;

struct Shape {
  int B, T, N, Hq, Hk, Hv, Hs, Ho, K, V;
  int segments;  // of a sequence
  int pieces;    // of a segment, in the pass that finds what segments start from
  const int32_t* cu_seqlens;
};

inline Shape make_shape(const OryxSsd& p) {
  Shape s{};
  s.B = p.B, s.T = p.T, s.N = p.cu_seqlens == nullptr ? p.B : p.N;
  s.Hq = p.Hq, s.Hk = p.Hk, s.Hv = p.Hv, s.K = p.K, s.V = p.V;
  s.Hs = p.Hk > p.Hv ? p.Hk : p.Hv;
  s.Ho = p.Hq > s.Hs ? p.Hq : s.Hs;
  s.cu_seqlens = p.cu_seqlens;
  s.segments = s.pieces = 1;
  return s;
}

struct Sequence {
  int begin, length;  // first token, in [0, B T)
};

__device__ __forceinline__ Sequence sequence(const Shape& s, int n) {
  if (s.cu_seqlens == nullptr) return {n * s.T, s.T};
  const int begin = min(max(s.cu_seqlens[n], 0), s.T), end = min(max(s.cu_seqlens[n + 1], begin), s.T);
  return {begin, end - begin};
}

// Chunks [first, last) of a segment.
struct Range {
  int first, last;
};
__device__ __forceinline__ Range segment_chunks(int length, int segment, int segments) {
  const int chunks = (length + kC - 1) / kC;
  return {static_cast<int>(static_cast<int64_t>(chunks) * segment / segments),
          static_cast<int>(static_cast<int64_t>(chunks) * (segment + 1) / segments)};
}

__device__ __forceinline__ float power2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(__expf(-fabsf(x))); }
// A log2(e), kept finite so that 0 A is 0.
__device__ __forceinline__ float log2_rate(float A_log) {
  const float A = -__expf(A_log) * kLog2e;
  return A < -1e30f ? -1e30f : A;
}

__device__ __forceinline__ float load_shared(uint32_t at) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(at) : "memory");
  return r;
}
__device__ __forceinline__ float2 load_shared2(uint32_t at) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(at) : "memory");
  return r;
}
__device__ __forceinline__ void store_shared(uint32_t at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
__device__ __forceinline__ void store_shared2(uint32_t at, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}

// Rows of `panels` panels that `keep` (a bit a row) does not name become zero, by one warp.
__device__ __forceinline__ void clear_rows(uint32_t at, int panels, uint64_t keep, int lane) {
  for (int i = lane; i < panels * kC; i += 32) {
    if (keep >> (i % kC) & 1) continue;
#pragma unroll
    for (int unit = 0; unit < 8; ++unit)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at + i * 128 + ((unit + lane) % 8) * 16), "r"(0)
                   : "memory");
  }
}
__device__ __forceinline__ uint64_t first_rows(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// Bit t: token + t (t < count) is wanted. By a warp; `wanted` may be null.
__device__ __forceinline__ uint64_t wanted_rows(const uint8_t* wanted, int token, int count, int lane) {
  if (wanted == nullptr) return first_rows(count);
  const unsigned lo = __ballot_sync(~0u, lane < count && wanted[token + lane] != 0);
  const unsigned hi = __ballot_sync(~0u, 32 + lane < count && wanted[token + 32 + lane] != 0);
  return static_cast<uint64_t>(hi) << 32 | lo;
}

// dt_raw of the two tokens that lane has of a chunk.
__device__ __forceinline__ float2 load_steps(const float* dt_raw, int Hs, int hs, int token, int count, int lane) {
  float2 x = make_float2(0.f, 0.f);
  if (2 * lane < count) x.x = dt_raw[static_cast<size_t>(token + 2 * lane) * Hs + hs];
  if (2 * lane + 1 < count) x.y = dt_raw[static_cast<size_t>(token + 2 * lane + 1) * Hs + hs];
  return x;
}
// ---- small values that a warp reads ahead of their use, past registers: a load into one would be waited for together
// with the latest of its kind. Each lane copies into its own kBytes of a slot in shared memory and reads them back.
template <int kBytes>
struct Ahead {
  static constexpr int kSlots = 8, kSize = kSlots * 32 * kBytes;
  // use(i, slot) for i < items; issue(i, slot) kSlots - 1 uses before.
  template <typename Issue, typename Use>
  static __device__ __forceinline__ void run(uint32_t at, int items, int lane, Issue issue, Use use) {
    const auto slot = [&](int i) { return at + (i % kSlots * 32 + lane) * kBytes; };
    for (int i = 0; i < kSlots - 1; ++i) {
      if (i < items) issue(i, slot(i));
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int i = 0; i < items; ++i) {
      if (i + kSlots - 1 < items) issue(i + kSlots - 1, slot(i + kSlots - 1));
      asm volatile("cp.async.commit_group;" ::: "memory");
      asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 1) : "memory");
      use(i, slot(i));
    }
  }
};
// 4 bytes, or zeros when !valid (nothing is read then).
__device__ __forceinline__ void copy4(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
// dt_raw of the two tokens that lane has of a chunk.
__device__ __forceinline__ void copy_steps(uint32_t dst, const float* dt_raw, int Hs, int hs, int token, int count,
                                           int lane) {
  const float* from = dt_raw + static_cast<size_t>(token) * Hs + hs;
  copy4(dst, 2 * lane < count ? from + 2 * lane * Hs : dt_raw, 2 * lane < count);
  copy4(dst + 4, 2 * lane + 1 < count ? from + (2 * lane + 1) * Hs : dt_raw, 2 * lane + 1 < count);
}
// The scalars of a chunk from them, by a warp, to shared memory. Returns G_C log2(e). Tokens from `count` on have dt 0.
// kShift: the last array is not exp(G) but G log2(e) - log2(dt), infinite where dt is 0.
template <bool kShift = false>
__device__ __forceinline__ float chunk_scalars(uint32_t at, float2 raw, float bias, float rate, int count, int lane) {
  const float d0 = 2 * lane < count ? softplus(raw.x + bias) : 0.f,
              d1 = 2 * lane + 1 < count ? softplus(raw.y + bias) : 0.f;
  // 2^-150 is 0 in float32: what lies below says the same and would only cost the sums their digits. NaN stays.
  float g0 = d0 * rate, g1 = d1 * rate;
  g0 = g0 < -150.f ? -150.f : g0;
  g1 = g1 < -150.f ? -150.f : g1;
  float sum = g0 + g1;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  const float end = __shfl_sync(~0u, sum, 31), first = sum - g1;
  store_shared2(at + kG + 8 * lane, first, sum);
  store_shared2(at + kDt + 8 * lane, d0, d1);
  store_shared2(at + kTail + 8 * lane, power2(end - first) * d0, power2(end - sum) * d1);
  if constexpr (kShift)
    store_shared2(at + kGamma + 8 * lane, first - __log2f(d0), sum - __log2f(d1));
  else
    store_shared2(at + kGamma + 8 * lane, power2(first), power2(sum));
  return end;
}

// ---- a warpgroup's 64 rows of S (K columns): row 16 warp + lane / 4 (+ 8 h), column 8 j + 2 (lane % 4) + e at S[4 j +
// 2 h + e]
template <int kK>
struct State {
  static constexpr int kN = kK / 2;
  float x[kN];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kN; ++i) x[i] = 0.f;
  }
  // += f * the 64 x K floats at `from`
  __device__ __forceinline__ void add(const float* from, float f, int warp, int lane) {
#pragma unroll
    for (int j = 0; j < kK / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 y =
            *reinterpret_cast<const float2*>(from + (16 * warp + lane / 4 + 8 * h) * kK + 8 * j + 2 * (lane % 4));
        x[4 * j + 2 * h] += f * y.x;
        x[4 * j + 2 * h + 1] += f * y.y;
      }
  }
  __device__ __forceinline__ void write(float* to, int warp, int lane) const {
#pragma unroll
    for (int j = 0; j < kK / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(to + (16 * warp + lane / 4 + 8 * h) * kK + 8 * j + 2 * (lane % 4)) =
            make_float2(x[4 * j + 2 * h], x[4 * j + 2 * h + 1]);
  }
  // In bfloat16 as panels of 64 columns in shared memory.
  __device__ __forceinline__ void stage(uint32_t at, int warp, int lane) const {
    const int row = 16 * warp + lane % 16;
#pragma unroll
    for (int j = 0; j < kK / 8; j += 2)
      store_matrix(at + j / 8 * kPanel + row * 128 + (((j % 8 + lane / 16) ^ (row & 7)) << 4),
                   pack(x[4 * j], x[4 * j + 1]), pack(x[4 * j + 2], x[4 * j + 3]), pack(x[4 * j + 4], x[4 * j + 5]),
                   pack(x[4 * j + 6], x[4 * j + 7]));
  }
  // The left operand of `advance`: (diag(weight) rows)^T, of `rows` [64 tokens][64] panels and `weight` 64 floats.
  static __device__ __forceinline__ void load_rows(uint32_t (&a)[16], uint32_t rows, uint32_t weight, int warp,
                                                   int lane) {
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      const int t = 16 * kk + lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
      uint32_t r[4];
      load_matrix_transposed(r, rows + t * 128 + ((unit ^ (t & 7)) << 4));
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float2 w = load_shared2(weight + 4 * (16 * kk + 4 * j + 2 * (lane % 4)));
#pragma unroll
        for (int h = 0; h < 2; ++h) a[4 * kk + j + h] = pack(low(r[j + h]) * w.x, high(r[j + h]) * w.y);
      }
    }
  }
  // Starts S = decay S + a columns, `columns` [64 tokens][K] panels; `settle` waits for it.
  __device__ __forceinline__ void advance(uint32_t (&a)[16], uint32_t columns, float decay) {
#pragma unroll
    for (int i = 0; i < kN; ++i) x[i] *= decay;
    keep(x);
    keep(a);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      if constexpr (kK == 128)
        wgmma_64x128_kn(x, a + 4 * kk, descriptor(columns + kk * 2048, kPanel, 1024), 1);
      else
        wgmma_64x64_kn(x, a + 4 * kk, descriptor(columns + kk * 2048, kPanel, 1024), 1);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void settle(uint32_t (&a)[16]) {
    wgmma_wait<0>();
    keep(x);
    keep(a);
  }
};

// A warp's 16 tokens of 64 elements, through shared memory, so that a token's 128 bytes leave together.
__device__ __forceinline__ void store_out(const uint32_t (&ob)[16], uint32_t staging, __nv_bfloat16* o, size_t stride,
                                          uint64_t keep, int count, int warp, int lane) {
  const int row = lane % 16;
  __syncwarp();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk)
    store_matrix(staging + row * 128 + (((2 * kk + lane / 16) ^ (row & 7)) << 4), ob[4 * kk], ob[4 * kk + 1],
                 ob[4 * kk + 2], ob[4 * kk + 3]);
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int r = 4 * j + lane / 8, t = 16 * warp + r, unit = lane % 8;
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(staging + r * 128 + ((unit ^ (r & 7)) << 4))
                 : "memory");
    if ((keep >> t & 1) == 0) x = make_uint4(0, 0, 0, 0);
    // Left to itself the compiler makes four stores of it.
    if (t < count)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(o + t * stride + 8 * unit), "r"(x.x), "r"(x.y),
                   "r"(x.z), "r"(x.w)
                   : "memory");
  }
}

// What segments of a sequence start from, by pieces: (n, state head, 64 rows of S, piece).
struct Segments {
  float* own;    // [.., 64, K] what the piece adds to the state
  float* decay;  // [..] log2 of its decay
};

// The state that the piece `piece` starts from; first is the index of the sequence's piece 0 (of these rows).
template <int kK>
__device__ __forceinline__ void segment_start(State<kK>& S, const Segments& g, size_t first, int piece, int warp,
                                              int lane) {
  float f = 0.f;  // log2 of the decay of the pieces between
  for (int i = piece - 1; i >= 0; --i) {
    S.add(g.own + (first + i) * kC * kK, power2(f), warp, lane);
    f += g.decay[first + i];
  }
}

// [tokens, heads, dim] bfloat16 as boxes of 64 tokens of one head, panels of 64 elements, rows of 128 bytes, swizzled.
cudaError_t encode(CUtensorMap* map, const void* data, int64_t tokens, int heads, int dim);

// Walks without outputs. Direction 0: S, of k and v, from the first chunk to the last. Direction 1: its gradient, of q
// and d_o, from the last chunk to the first; "segment 0" is where a walk starts.
struct Walk {
  int direction, directions;  // the first, and how many (both: 0, 2)
  const float* dt_raw;
  const float* dt_bias;
  const float* A_log;
  const float* start[2];     // [N, Hs, V, K] or null: zeros
  float* end[2];             // [N, Hs, V, K] or null
  const uint8_t* wanted;     // of d_o, or null
  __nv_bfloat16* states[2];  // [records, Hs, V / 64, 64, K] the state before each chunk in walking order, panels as in
                             // shared memory
  const int32_t* chunk_offsets;  // [N + 1], packed only: chunks before each sequence
  Segments segments[2];
};

// `only_segments`: a pass that fills `segments` for all pieces but those of the last segment. Maps: k, v, q, d_o.
cudaError_t launch_walk(const Shape& s, const Walk& w, bool only_segments, const CUtensorMap* maps,
                        cudaStream_t stream);
// Number of chunks before each packed sequence, [N + 1].
cudaError_t launch_chunk_offsets(const Shape& s, int32_t* offsets, cudaStream_t stream);

// Segments that fill the chip when there are so many walks of 64 rows, of so many chunks on average.
inline int choose_segments(int64_t walks, int64_t chunks) {
  if (walks == 0 || walks * 4 > kProcessors * 3) return 1;
  const int64_t most = chunks / 8, fit = kProcessors / walks;
  const int64_t n = fit < most ? fit : most;
  return n < 2 ? 1 : static_cast<int>(n);
}

// Pieces of each of these segments, so that the pass before (walks, directions) fills the chip too, two blocks a
// processor.
inline int choose_pieces(int64_t walks, int directions, int segments, int64_t chunks) {
  if (segments < 2) return 1;
  const int64_t fit = 2 * kProcessors / (walks * directions * (segments - 1)), most = chunks / segments / 4;
  const int64_t n = fit < most ? fit : most;
  return n < 2 ? 1 : n > 4 ? 4 : static_cast<int>(n);
}

}  // namespace oryx::ssd_cuda
