// Per chunk and head, independent of the state: norms of q and k, T, P and the row factors (see gated_delta_cuda.h).
#include "gated_delta_cuda_internal.cuh"

namespace oryx::gated_delta_cuda {
namespace {

constexpr int kStrideA = 68;  // floats a row; read as the left operand
constexpr int kStrideT = 72;  // floats a row; read as the right operand

struct Shared {
  union {
    struct {
      __nv_bfloat16 k[kC * kD], q[kC * kD];
    };
    struct {
      float a[kC * kStrideA], t[kC * kStrideT];
    };
  };
  alignas(128) char record[kRecordBytes];
  float G[kC], beta[kC], rk[kC], rq[kC];
};

// Number of chunks before each packed sequence.
__global__ void chunk_offsets_kernel(const int32_t* cu_seqlens, int N, int32_t* offsets) {
  const int lane = threadIdx.x;
  int before = 0;
  for (int i = 0; i < N; i += 32) {
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

// d (16 x 16, two n-tiles) += a (16 x 16 at `a`, stride kSa) b (16 x 16 at `b`, stride kSb), tf32.
template <int kSa, int kSb>
__device__ __forceinline__ void block_product(float (&d)[2][4], const float* a, const float* b, int lane) {
  const int r = lane / 4, c = lane % 4;
#pragma unroll
  for (int k = 0; k < 16; k += 8) {
    uint32_t fa[4] = {tf32(a[r * kSa + k + c]), tf32(a[(r + 8) * kSa + k + c]), tf32(a[r * kSa + k + c + 4]),
                      tf32(a[(r + 8) * kSa + k + c + 4])};
#pragma unroll
    for (int n = 0; n < 2; ++n) mma_tf32(d[n], fa, tf32(b[(k + c) * kSb + n * 8 + r]), tf32(b[(k + c + 4) * kSb + n * 8 + r]));
  }
}
__device__ __forceinline__ void store_block(float* p, const float (&d)[2][4], float sign, int lane) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<float2*>(p + (lane / 4 + 8 * h) * kStrideT + n * 8 + 2 * (lane % 4)) =
          make_float2(sign * d[n][2 * h], sign * d[n][2 * h + 1]);
}

// raw[nb] (16 x 16 blocks) = x rows [16 block, +16) times k rows [16 nb, +16), nb <= block; also 1 / norm of the x rows.
__device__ __forceinline__ void gram(float (&raw)[4][2][4], uint32_t x, uint32_t k, int block, float eps, float* norms, int lane) {
  float s0 = 0, s1 = 0;
#pragma unroll
  for (int nb = 0; nb < 4; ++nb)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) raw[nb][n][i] = 0;
  const int ra = 16 * block + lane % 16;                        // row this lane addresses of the left operand
  const int rb = lane % 8 + (lane >= 16 ? 8 : 0);               // and of the right one
  const int ub = (lane / 8) % 2;
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    uint32_t a[4], b[4];
    load_matrix(a, x + ra * 256 + (((2 * s + lane / 16) ^ (ra & 7)) << 4));
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      s0 += low(a[i]) * low(a[i]) + high(a[i]) * high(a[i]);
      s1 += low(a[i + 1]) * low(a[i + 1]) + high(a[i + 1]) * high(a[i + 1]);
    }
#pragma unroll
    for (int nb = 0; nb < 4; ++nb)
      if (nb <= block) {
        const int row = 16 * nb + rb;
        load_matrix(b, k + row * 256 + (((2 * s + ub) ^ (row & 7)) << 4));
        mma_bf16(raw[nb][0], a, b[0], b[1]);
        mma_bf16(raw[nb][1], a, b[2], b[3]);
      }
  }
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    s0 += __shfl_xor_sync(~0u, s0, d);
    s1 += __shfl_xor_sync(~0u, s1, d);
  }
  if (lane % 4 == 0) {
    norms[16 * block + lane / 4] = rsqrtf(s0 + eps);
    norms[16 * block + lane / 4 + 8] = rsqrtf(s1 + eps);
  }
}

__global__ void __launch_bounds__(128, 4)
    prepare_kernel(Shape s, const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k, const float* __restrict__ g,
                   const float* __restrict__ beta, char* __restrict__ record) {
  extern __shared__ __align__(128) char raw_shared[];
  Shared& sh = *reinterpret_cast<Shared*>(raw_shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int ho = blockIdx.x % s.Ho, chunk = blockIdx.x / s.Ho;
  const int hs = ho / (s.Ho / s.Hs), hk = hs / (s.Hs / s.Hk), hq = ho / (s.Ho / s.Hq);

  int token, count;  // first token of the chunk and how many it has
  if (s.cu_seqlens == nullptr) {
    const int n = chunk / s.chunks, c = chunk % s.chunks;
    token = n * s.T + c * kC;
    count = min(kC, s.T - c * kC);
  } else {
    if (chunk >= s.chunk_offsets[s.N]) return;
    int lo = 0, hi = s.N;  // the last sequence whose first chunk is at or before this one
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (s.chunk_offsets[mid] <= chunk ? lo : hi) = mid;
    }
    const int c = chunk - s.chunk_offsets[lo];
    token = s.cu_seqlens[lo] + c * kC;
    count = min(kC, s.cu_seqlens[lo + 1] - token);
  }

  const uint32_t ks = smem_address(sh.k), qs = smem_address(sh.q);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = i * 8 + thread / 16, unit = thread % 16;
    const bool valid = row < count;
    const size_t t = token + (valid ? row : 0);
    const uint32_t at = row * 256 + ((unit ^ (row & 7)) << 4);
    copy16(ks + at, k + (t * s.Hk + hk) * kD + unit * 8, valid);
    copy16(qs + at, q + (t * s.Hq + hq) * kD + unit * 8, valid);
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
    sh.G[2 * lane] = sum - x1 + x0;
    sh.G[2 * lane + 1] = sum;
  } else if (warp < 3) {
    const int t = (warp - 1) * 32 + lane;
    sh.beta[t] = t < count ? beta[static_cast<size_t>(token + t) * s.Hs + hs] : 0.f;
  }
  copy_wait();
  __syncthreads();

  float kk[4][2][4], qk[4][2][4];
  gram(kk, ks, ks, warp, s.l2_eps, sh.rk, lane);
  gram(qk, qs, ks, 3 - warp, s.l2_eps, sh.rq, lane);
  __syncthreads();

  // A into float32 shared memory (over k and q, which nobody reads any more), P into the record.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = 16 * warp + lane / 4 + 8 * h, tp = 16 * (3 - warp) + lane / 4 + 8 * h;
    const float G = sh.G[t], Gp = sh.G[tp], f = sh.beta[t] * sh.rk[t], fp = s.scale * sh.rq[tp];
#pragma unroll
    for (int nb = 0; nb < 4; ++nb)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int j = 16 * nb + 8 * n + 2 * (lane % 4);
        const float g0 = sh.G[j], g1 = sh.G[j + 1], r0 = sh.rk[j], r1 = sh.rk[j + 1];
        if (nb <= warp) {
          const float a0 = j < t ? f * r0 * __expf(G - g0) * kk[nb][n][2 * h] : 0.f;
          const float a1 = j + 1 < t ? f * r1 * __expf(G - g1) * kk[nb][n][2 * h + 1] : 0.f;
          *reinterpret_cast<float2*>(&sh.a[t * kStrideA + j]) = make_float2(a0, a1);
        }
        const float p0 = j <= tp ? fp * r0 * __expf(Gp - g0) * qk[nb][n][2 * h] : 0.f;
        const float p1 = j + 1 <= tp ? fp * r1 * __expf(Gp - g1) * qk[nb][n][2 * h + 1] : 0.f;
        *reinterpret_cast<uint32_t*>(sh.record + kRecordP + tp * 128 + (((2 * nb + n) ^ (tp & 7)) << 4) + (lane % 4) * 4) = pack(p0, p1);
      }
  }
  if (thread < kC) {
    float* rows = reinterpret_cast<float*>(sh.record + kRecordRows);
    const float G = sh.G[thread], e = __expf(G), last = sh.G[kC - 1];
    rows[thread] = e * sh.rk[thread];
    rows[64 + thread] = s.scale * e * sh.rq[thread];
    rows[128 + thread] = thread < count ? __expf(last - G) * sh.rk[thread] : 0.f;
    if (thread == 0) rows[192] = __expf(last);
  }
  __syncwarp();

  // Inverse of the warp's own 16 x 16 block of I + A, a column a lane, by forward substitution.
  {
    const float* a = sh.a + 16 * warp * kStrideA + 16 * warp;
    const int col = lane % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum[4] = {i == col ? 1.f : 0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int l = 0; l < i; l += 4) {
        const float4 r = *reinterpret_cast<const float4*>(a + i * kStrideA + l);
        sum[0] -= r.x * x[l];
        if (l + 1 < i) sum[1] -= r.y * x[l + 1];
        if (l + 2 < i) sum[2] -= r.z * x[l + 2];
        if (l + 3 < i) sum[3] -= r.w * x[l + 3];
      }
      x[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    if (lane < 16)
#pragma unroll
      for (int i = 0; i < 16; ++i) sh.t[(16 * warp + i) * kStrideT + 16 * warp + col] = x[i];
  }
  __syncthreads();

  // The blocks below it, a block column a warp: X_ij = -X_ii sum_l A_il X_lj.
  for (int i = warp + 1; i < 4; ++i) {
    float y[2][4] = {}, x[2][4] = {};
    for (int l = warp; l < i; ++l)
      block_product<kStrideA, kStrideT>(y, sh.a + 16 * i * kStrideA + 16 * l, sh.t + 16 * l * kStrideT + 16 * warp, lane);
    float* at = sh.t + 16 * i * kStrideT + 16 * warp;
    store_block(at, y, 1.f, lane);
    __syncwarp();
    block_product<kStrideT, kStrideT>(x, sh.t + 16 * i * kStrideT + 16 * i, at, lane);
    __syncwarp();
    store_block(at, x, -1.f, lane);
    __syncwarp();
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i * 16 + thread / 8, unit = thread % 8;
    uint4 out = make_uint4(0, 0, 0, 0);
    if (unit / 2 <= row / 16) {
      const float4 a = *reinterpret_cast<const float4*>(&sh.t[row * kStrideT + unit * 8]);
      const float4 b = *reinterpret_cast<const float4*>(&sh.t[row * kStrideT + unit * 8 + 4]);
      const float* w = sh.beta + unit * 8;
      out = make_uint4(pack(a.x * w[0], a.y * w[1]), pack(a.z * w[2], a.w * w[3]), pack(b.x * w[4], b.y * w[5]),
                       pack(b.z * w[6], b.w * w[7]));
    }
    *reinterpret_cast<uint4*>(sh.record + kRecordT + row * 128 + ((unit ^ (row & 7)) << 4)) = out;
  }
  fence_async_proxy();
  __syncthreads();
  if (thread == 0) {
    bulk_store(record + (static_cast<size_t>(chunk) * s.Ho + ho) * kRecordBytes, smem_address(sh.record), kRecordBytes);
    bulk_commit();
    bulk_wait_read();
  }
}

}  // namespace

cudaError_t launch_prepare(const OryxGatedDelta& p, const Shape& s, int records, char* record, int32_t* chunk_offsets, cudaStream_t stream) {
  if (s.cu_seqlens != nullptr) chunk_offsets_kernel<<<1, 32, 0, stream>>>(s.cu_seqlens, s.N, chunk_offsets);
  if (records > 0) {
    const cudaError_t status = cudaFuncSetAttribute(prepare_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (status != cudaSuccess) return status;
    prepare_kernel<<<s.Ho * records, 128, sizeof(Shared), stream>>>(s, static_cast<const __nv_bfloat16*>(p.q),
                                                                        static_cast<const __nv_bfloat16*>(p.k), p.g, p.beta, record);
  }
  return cudaGetLastError();
}

}  // namespace oryx::gated_delta_cuda
