// Per chunk and head, independent of the state: norms of k, T and the row factors (see gated_delta_cuda.h).
#include <cstdio>

#include "gated_delta_walk.cuh"
#include "oryx/ops/cuda/dependent_launch.cuh"

namespace oryx::gated_delta_cuda {
namespace {

constexpr int kStrideA = 68;  // floats a row of A: what the block products read as right operands meets no bank twice

struct Shared {
  union {
    char k[2 * kPanel];      // as copied in, swizzled
    float a[kC * kStrideA];  // once K is not read any more; its off-diagonal blocks hold what tf32 has
  };
  float G[kC], beta[kC], rk[kC];  // G in powers of two
  float columns[3][kC];           // of warps 1 to 3: rk_j exp(what decays from j to the last token before the warp's)
  uint64_t full;
};
constexpr int kBytes = sizeof(Shared) + 1024;  // and what aligning the start to 1024 may take

// Number of chunks before each packed sequence.
__global__ void chunk_offsets_kernel(const int32_t* cu_seqlens, int N, int T, int32_t* offsets) {
  const int lane = threadIdx.x;
  if (lane == 0 && (cu_seqlens[0] != 0 || cu_seqlens[N] != T)) {
    printf("gated_delta_rule: cu_seqlens runs from %d to %d, expected 0 to %d\n", cu_seqlens[0], cu_seqlens[N], T);
    __trap();
  }
  int before = 0;
  for (int i = 0; i < N; i += 32) {
    if (i + lane < N && cu_seqlens[i + lane] > cu_seqlens[i + lane + 1]) {
      printf("gated_delta_rule: cu_seqlens falls from %d to %d at index %d\n", cu_seqlens[i + lane], cu_seqlens[i + lane + 1], i + lane + 1);
      __trap();
    }
    int c = i + lane < N ? (cu_seqlens[i + lane + 1] - cu_seqlens[i + lane] + kC - 1) / kC : 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, c, d);
      if (lane >= d) c += other;
    }
    if (i + lane < N) offsets[i + lane + 1] = before + c;
    before += __shfl_sync(~0u, c, 31);
  }
  if (lane == 0) offsets[0] = 0;
}

// One thread a chunk: its place is the number of chunks that are taken up before it. `together` walks take their steps side by side; of these every
// kSoon-th comes first, since backward_chunk is slower than they are: what it takes up has then just been written.
__global__ void order_kernel(const Shape s, int records, int merged, int together, int32_t* order, uint32_t* done) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int64_t k = i; k < static_cast<int64_t>(records) * s.Hs + 1; k += gridDim.x * blockDim.x) done[k] = 0;
  if (i >= (s.cu_seqlens == nullptr ? records : s.chunk_offsets[s.N])) return;
  const auto chunks_of = [&](int n) { return s.cu_seqlens == nullptr ? s.chunks : s.chunk_offsets[n + 1] - s.chunk_offsets[n]; };
  const auto bound = [&](int chunks, int walk) {  // the first chunk of a walk
    return static_cast<int>(static_cast<int64_t>(chunks) * min(walk * merged, s.segments) / s.segments);
  };
  const int walks = (s.segments + merged - 1) / merged;
  int n = 0, c = i;  // the sequence and the chunk within it
  while (c >= chunks_of(n)) c -= chunks_of(n++);
  int walk = 0;
  while (c >= bound(chunks_of(n), walk + 1)) ++walk;
  const int step = bound(chunks_of(n), walk + 1) - 1 - c;
  const int own = (n * walks + walk) / together;
  int before = 0;
  for (int m = 0; m < s.N; ++m) {
    const int chunks = chunks_of(m);
    for (int w = 0; w < walks; ++w) {
      const int length = bound(chunks, w + 1) - bound(chunks, w);
      const int round = (m * walks + w) / together;
      if (round < own) before += length;
      if (round != own) continue;
      const auto soon = [&](int steps) { return (steps + kSoon - 1) / kSoon; };  // of the first `steps` steps
      const int passed = min(length, step);
      before += step % kSoon == 0 ? soon(passed) : soon(length) + passed - soon(passed);
      before += length > step && (m < n || (m == n && w < walk)) ? 1 : 0;
    }
  }
  order[before] = i;
}

__global__ void wanted_kernel(const int32_t* spans, int B, int T, uint8_t* wanted) {
  const int row = spans[3 * blockIdx.x], begin = spans[3 * blockIdx.x + 1], end = spans[3 * blockIdx.x + 2];
  if (row < 0 || row >= B || begin < 0 || begin > end || end > T) {
    if (threadIdx.x == 0)
      printf("gated_delta_rule: span %d is (row %d, %d to %d), outside of %d rows of %d tokens\n", blockIdx.x, row, begin, end, B, T);
    __trap();
  }
  for (int t = begin + threadIdx.x; t < end; t += blockDim.x) wanted[static_cast<int64_t>(row) * T + t] = 1;
}

// What the products read is rounded once, where it is written.
__device__ __forceinline__ float rounded(float x) { return __uint_as_float(tf32(x)); }

// d (16 x 8 n) += a (16 x 16 at `a`) b (16 x 8 n at `b`), of tf32. A thread has two neighbouring summed indices, 2 c and 2 c + 1, where the
// instruction's own order has c and c + 4: the sum is the same.
template <int kN>
__device__ __forceinline__ void block_product(float (&d)[kN][4], const float* a, const float* b, int lane) {
  const int r = lane / 4, c = 2 * (lane % 4);
#pragma unroll
  for (int k = 0; k < 16; k += 8) {
    const uint2 x = *reinterpret_cast<const uint2*>(a + r * kStrideA + k + c), y = *reinterpret_cast<const uint2*>(a + (r + 8) * kStrideA + k + c);
    const uint32_t fa[4] = {x.x, y.x, x.y, y.y};
#pragma unroll
    for (int n = 0; n < kN; ++n)
      mma_tf32(d[n], fa, __float_as_uint(b[(k + c) * kStrideA + n * 8 + r]), __float_as_uint(b[(k + c + 1) * kStrideA + n * 8 + r]));
  }
}
template <int kN>
__device__ __forceinline__ void store_block(float* p, const float (&d)[kN][4], float sign, int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<float2*>(p + (lane / 4 + 8 * h) * kStrideA + n * 8 + 2 * (lane % 4)) =
          make_float2(rounded(sign * d[n][2 * h]), rounded(sign * d[n][2 * h + 1]));
}

// The chunk of a block, by its number among the records and its place. Blocks are [Hs, chunks, sequences], packed [Hs, chunks, 1 or more], with
// segments [Hs, sequences and their segments, steps], so that the last chunks of the segments, which the next kernel begins with, come last and
// are in the L2 cache.
__device__ __forceinline__ Place place_of_block(const Shape& s, int& chunk) {
  if (s.cu_seqlens != nullptr) {
    chunk = blockIdx.z * gridDim.y + blockIdx.y;
    return place(s, chunk);
  }
  int n = blockIdx.z, c = blockIdx.y;
  if (s.segments > 1) {
    n = blockIdx.y / s.segments;
    const uint32_t segment = blockIdx.y - n * s.segments, chunks = s.chunks, segments = s.segments;
    c = chunks * segment / segments + blockIdx.z;
    if (c >= static_cast<int>(chunks * (segment + 1) / segments)) return {0, 0};
  }
  chunk = n * s.chunks + c;
  return {n * s.T + c * kC, min(kC, s.T - c * kC)};
}

__global__ void __launch_bounds__(128, 8) prepare_kernel(const __grid_constant__ CUtensorMap k_map, Shape s, int group, const float* __restrict__ g,
                                                         const float* __restrict__ beta, float floor, char* __restrict__ record) {
  extern __shared__ char raw_shared[];
  Shared& sh = *reinterpret_cast<Shared*>(raw_shared + (-smem_address(raw_shared) & 1023));
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, r = lane / 4, c2 = 2 * (lane % 4);
  ops::cuda::launch_dependents();
  const int hs = blockIdx.x, hk = hs / group;
  int chunk = 0;
  const auto [token, count] = place_of_block(s, chunk);
  if (count == 0) return;

  const uint32_t k = smem_address(sh.k), full = smem_address(&sh.full);
  if (thread == 96) {
    barrier_init(full, 1);
    barrier_init_fence();
    barrier_expect(full, 2 * kPanel);
    tensor_load(k, &k_map, full, 0, hk, token, 0);
    tensor_load(k + kPanel, &k_map, full, 0, hk, token, 1);
  }
  if (warp == 0) {
    // exp(-100) is 0 in float32: what lies below says the same and would only cost the sums their digits. NaN stays.
    float x0 = 2 * lane < count ? g[static_cast<size_t>(token + 2 * lane) * s.Hs + hs] : 0.f;
    float x1 = 2 * lane + 1 < count ? g[static_cast<size_t>(token + 2 * lane + 1) * s.Hs + hs] : 0.f;
    x0 = x0 < -100.f ? -100.f : x0;
    x1 = x1 < -100.f ? -100.f : x1;
    x1 += x0;
    float sum = x1;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    sh.G[2 * lane] = (sum - x1 + x0) * kLog2e;
    sh.G[2 * lane + 1] = sum * kLog2e;
  } else if (warp < 3) {
    const int t = (warp - 1) * 32 + lane;
    const float b = t < count ? beta[static_cast<size_t>(token + t) * s.Hs + hs] : 0.f;
    sh.beta[t] = fabsf(b) < floor && t < count ? floor : b;
  }
  __syncthreads();
  barrier_wait(full, 0);

  {
    float d[32];  // K K^T, this warp's 16 rows
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 8; ++kk) wgmma_64x64_shared(d, descriptor_nk(k, kk, kPanel), descriptor_nk(k, kk, kPanel), kk > 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(d);
    if (count < kC) {  // what follows the sequence in memory
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (16 * warp + r + 8 * (i / 2 % 2) >= count) d[i] = 0.f;
    }
#pragma unroll
    for (int b = 0; b < 4; ++b)
      if (b == warp && lane % 4 == r / 2) {  // the norms, from the diagonal
        sh.rk[16 * b + r] = rsqrtf((r % 2 == 0 ? d[8 * b] : d[8 * b + 1]) + s.l2_eps);
        sh.rk[16 * b + r + 8] = rsqrtf((r % 2 == 0 ? d[8 * b + 6] : d[8 * b + 7]) + s.l2_eps);
      }
    __syncthreads();

    // Off the diagonal exp(G_t - G_j) = exp(G_t - G_b) exp(G_b - G_j), b the last token before the warp's: neither is over 1.
    const float before = sh.G[max(16 * warp - 1, 0)];
    float* const columns = sh.columns[max(warp - 1, 0)];
#pragma unroll
    for (int m = 0; m < 2; ++m)
      if (const int j = 32 * m + lane; j < 16 * warp) columns[j] = sh.rk[j] * power2(before - sh.G[j]);
    float Gt[2], f[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = 16 * warp + r + 8 * h;
      Gt[h] = sh.G[t], f[h] = sh.beta[t] * sh.rk[t];
    }
#pragma unroll
    for (int nb = 0; nb < 4; ++nb)
      if (nb == warp) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int j = 8 * n + c2;  // and the row r + 8 h, from the block's first
          const float2 gj = *reinterpret_cast<const float2*>(sh.G + 16 * nb + j), rj = *reinterpret_cast<const float2*>(sh.rk + 16 * nb + j);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (h < n) continue;  // above the diagonal nothing is read
            const float a0 = f[h] * rj.x * power2(Gt[h] - gj.x) * d[8 * nb + 4 * n + 2 * h];
            const float a1 = f[h] * rj.y * power2(Gt[h] - gj.y) * d[8 * nb + 4 * n + 2 * h + 1];
            *reinterpret_cast<float2*>(sh.a + (16 * nb + r + 8 * h) * kStrideA + 16 * nb + j) =
                make_float2(n < h || j < r + 8 * h ? a0 : 0.f, n < h || j + 1 < r + 8 * h ? a1 : 0.f);
          }
        }
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) f[h] *= power2(Gt[h] - before);
    __syncwarp();
#pragma unroll
    for (int nb = 0; nb < 3; ++nb)
      if (nb < warp) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int j = 16 * nb + 8 * n + c2;
          const float2 cj = *reinterpret_cast<const float2*>(columns + j);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            *reinterpret_cast<float2*>(sh.a + (16 * warp + r + 8 * h) * kStrideA + j) =
                make_float2(rounded(f[h] * cj.x * d[8 * nb + 4 * n + 2 * h]), rounded(f[h] * cj.y * d[8 * nb + 4 * n + 2 * h + 1]));
        }
      }
  }
  __syncwarp();

  // Inverse of the warp's own 16 x 16 block of I + A, a column a lane (lane + 16 has the same), by forward substitution.
  {
    float* const mine = sh.a + 16 * warp * (kStrideA + 1);
    const int col = lane % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum[4] = {i == col ? 1.f : 0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int l = 0; l < i; l += 4) {
        const float4 m = *reinterpret_cast<const float4*>(mine + i * kStrideA + l);
        sum[0] -= m.x * x[l];
        if (l + 1 < i) sum[1] -= m.y * x[l + 1];
        if (l + 2 < i) sum[2] -= m.z * x[l + 2];
        if (l + 3 < i) sum[3] -= m.w * x[l + 3];
      }
      x[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    __syncwarp();
    if (lane < 16)
#pragma unroll
      for (int i = 0; i < 16; ++i) mine[i * kStrideA + col] = rounded(x[i]);
  }
  char* const out = record + (static_cast<size_t>(chunk) * s.Hs + hs) * kRecordBytes;
  if (thread < kC) {
    float* rows = reinterpret_cast<float*>(out + kRecordRows);
    const float G = sh.G[thread], rk = sh.rk[thread];
    rows[thread] = power2(G) * rk;
    rows[64 + thread] = thread < count ? power2(sh.G[kC - 1] - G) * rk : 0.f;
    rows[128 + thread] = G;
    rows[192 + thread] = rk;
  }
  __syncthreads();

  // The rest of X = (I + A)^-1 in two steps of [[X0, 0], [-X1 A10 X0, X1]]. The blocks above the diagonal are free: X_10 and X_32 are
  // kept at (0, 1) and (2, 3), the first products of the second step at (j, i) for (i, j).
  const auto block = [&](int i, int j) { return sh.a + 16 * i * kStrideA + 16 * j; };
  {
    const int i = warp / 2 * 2 + 1, j = i - 1, half = warp % 2 * 8;
    float y[1][4] = {}, x[1][4] = {};
    block_product(y, block(i, j), block(j, j) + half, lane);
    store_block(block(j, i) + half, y, 1.f, lane);
    __syncwarp();
    block_product(x, block(i, i), block(j, i) + half, lane);
    __syncwarp();
    store_block(block(j, i) + half, x, -1.f, lane);
  }
  __syncthreads();
  const int i = 2 + warp / 2, j = warp % 2;
  {
    float y[2][4] = {};
    block_product(y, block(i, 1), j == 0 ? block(0, 1) : block(1, 1), lane);
    if (j == 0) block_product(y, block(i, 0), block(0, 0), lane);
    store_block(block(j, i), y, 1.f, lane);
  }
  __syncthreads();
  {
    float x[2][4] = {};
    block_product(x, i == 2 ? block(2, 2) : block(2, 3), block(j, 2), lane);
    if (i == 3) block_product(x, block(3, 3), block(j, 3), lane);
    store_block(block(i, j), x, -1.f, lane);
  }
  __syncthreads();

  // A half-warp has a column of tiles.
  const int unit = thread / 16;
  const float4 w0 = *reinterpret_cast<const float4*>(sh.beta + unit * 8), w1 = *reinterpret_cast<const float4*>(sh.beta + unit * 8 + 4);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int i_tile = 2 * m + thread / 8 % 2;
    if (unit > i_tile) continue;
    const float* from = (m % 2 == 1 && unit / 2 == m - 1 ? block(m - 1, m) : block(m, unit / 2)) + thread % 16 * kStrideA + unit % 2 * 8;
    const float4 a = *reinterpret_cast<const float4*>(from);
    const float4 b = *reinterpret_cast<const float4*>(from + 4);
    *reinterpret_cast<uint4*>(out + record_tile(i_tile, unit) + thread % 8 * 16) =
        make_uint4(pack(a.x * w0.x, a.y * w0.y), pack(a.z * w0.z, a.w * w0.w), pack(b.x * w1.x, b.y * w1.y), pack(b.z * w1.z, b.w * w1.w));
  }
}

}  // namespace

cudaError_t launch_offsets(const Shape& s, int32_t* chunk_offsets, cudaStream_t stream) {
  if (s.cu_seqlens != nullptr) chunk_offsets_kernel<<<1, 32, 0, stream>>>(s.cu_seqlens, s.N, s.T, chunk_offsets);
  return cudaGetLastError();
}

cudaError_t launch_order(const Shape& s, int records, int merged, int together, int32_t* order, uint32_t* done, cudaStream_t stream) {
  order_kernel<<<(records + 127) / 128 + 1, 128, 0, stream>>>(s, records, merged, together > 0 ? together : 1, order, done);
  return cudaGetLastError();
}

cudaError_t launch_prepare(const OryxGatedDelta& p, const Shape& s, int records, const CUtensorMap& k, float floor, char* record, cudaStream_t stream) {
  if (records == 0) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(prepare_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const int columns = records < 32768 ? records : 32768;
  const dim3 grid = s.cu_seqlens != nullptr ? dim3(s.Hs, columns, (records + columns - 1) / columns)
                    : s.segments == 1       ? dim3(s.Hs, s.chunks, s.N)
                                            : dim3(s.Hs, s.N * s.segments, (s.chunks + s.segments - 1) / s.segments);
  prepare_kernel<<<grid, 128, kBytes, stream>>>(k, s, s.Hs / s.Hk, p.g, p.beta, floor, record);
  return cudaGetLastError();
}

}  // namespace oryx::gated_delta_cuda

extern "C" int oryx_gated_delta_wanted(const int32_t* spans, int32_t n, int32_t B, int32_t T, uint8_t* wanted, cudaStream_t stream) {
  const cudaError_t status = cudaMemsetAsync(wanted, 0, static_cast<size_t>(B) * T, stream);
  if (status != cudaSuccess || n == 0) return status;
  oryx::gated_delta_cuda::wanted_kernel<<<n, 256, 0, stream>>>(spans, B, T, wanted);
  return cudaGetLastError();
}
