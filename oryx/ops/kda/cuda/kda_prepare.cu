// Per chunk and output head, independent of the state: T, P, the decayed keys and queries (see kda_cuda.h). A warp has a leaf, eight tokens, and a lane D / 32
// channels of them; then the warps share the products across the cuts, and half of them invert.
#include "kda_block.cuh"

namespace oryx::kda_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStrideA = 72;  // floats a row of A: the left operand's reads, and A's writes, meet no bank twice

template <int D, bool kTriangles>
struct Shared {
  float decay[8 * D];  // over each block of eight tokens
  float rk[kC], rq[kC];
};
template <int D>
struct Shared<D, true> {
  alignas(128) char operands[Operands<D>::kBytes];
  float a[kC * kStrideA];
  float decay[8 * D];
  float rk[kC], rq[kC], beta[kC];
};

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

// (I + A)^-1 in the place of A, by 128 threads: A's off-diagonal 16 x 16 blocks hold what tf32 has, those on the diagonal have zeros above it. Blocks (1, 0) and
// (3, 2) of the inverse come to lie at (0, 1) and (2, 3). As in gated_delta_prepare.cu.
__device__ __forceinline__ float* inverse_block(float* A, int i, int j) { return A + 16 * i * kStrideA + 16 * j; }
__device__ __forceinline__ void invert(float* A, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  // Of the warp's own 16 x 16 block: of its 8 x 8 ones, a column a lane, by forward substitution; then X10 = -X1 A10 X0, eight rows of the instruction's sixteen.
  {
    float* const a = inverse_block(A, warp, warp);
    const int col = lane % 8, which = lane / 8 % 2;
    float* const own = a + which * 8 * (kStrideA + 1);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float sum[2] = {i == col ? 1.f : 0.f, 0.f};
#pragma unroll
      for (int l = 0; l < i; l += 4) {
        const float4 r = *reinterpret_cast<const float4*>(own + i * kStrideA + l);
        sum[0] -= r.x * x[l];
        if (l + 1 < i) sum[1] -= r.y * x[l + 1];
        if (l + 2 < i) sum[0] -= r.z * x[l + 2];
        if (l + 3 < i) sum[1] -= r.w * x[l + 3];
      }
      x[i] = sum[0] + sum[1];
    }
    __syncwarp();
    if (lane < 16)
#pragma unroll
      for (int i = 0; i < 8; ++i) own[i * kStrideA + col] = rounded(x[i]);
    __syncwarp();
    const int r = lane / 4, c = 2 * (lane % 4);
    const float* const lower = a + 8 * kStrideA;
    const float2 a10 = *reinterpret_cast<const float2*>(lower + r * kStrideA + c);
    const float2 x1 = *reinterpret_cast<const float2*>(lower + r * kStrideA + 8 + c);
    float y[4] = {}, z[4] = {};
    {
      const uint32_t fa[4] = {tf32(a10.x), 0, tf32(a10.y), 0};
      mma_tf32(y, fa, __float_as_uint(a[c * kStrideA + r]), __float_as_uint(a[(c + 1) * kStrideA + r]));
    }
    // As a right operand a thread needs rows c and c + 1 of column r.
    const auto turned = [&](int row) {
      const float even = __shfl_sync(~0u, y[0], 4 * row + r / 2), odd = __shfl_sync(~0u, y[1], 4 * row + r / 2);
      return tf32(r % 2 == 0 ? even : odd);
    };
    const uint32_t b0 = turned(c), b1 = turned(c + 1), fa[4] = {__float_as_uint(x1.x), 0, __float_as_uint(x1.y), 0};
    mma_tf32(z, fa, b0, b1);
    *reinterpret_cast<float2*>(a + (8 + r) * kStrideA + c) = make_float2(rounded(-z[0]), rounded(-z[1]));
  }
  named_barrier(1, 128);

  // The rest in two steps of [[X0, 0], [-X1 A10 X0, X1]]. The blocks above the diagonal are free: X_10 and X_32 are kept at (0, 1) and (2, 3), the first
  // products of the second step at (j, i) for (i, j).
  const auto block = [&](int i, int j) { return inverse_block(A, i, j); };
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
  named_barrier(1, 128);
  const int i = 2 + warp / 2, j = warp % 2;
  {
    float y[2][4] = {};
    block_product(y, block(i, 1), j == 0 ? block(0, 1) : block(1, 1), lane);
    if (j == 0) block_product(y, block(i, 0), block(0, 0), lane);
    store_block(block(j, i), y, 1.f, lane);
  }
  named_barrier(1, 128);
  {
    float x[2][4] = {};
    block_product(x, i == 2 ? block(2, 2) : block(2, 3), block(j, 2), lane);
    if (i == 3) block_product(x, block(3, 3), block(j, 3), lane);
    store_block(block(i, j), x, -1.f, lane);
  }
  named_barrier(1, 128);
}

struct Arguments {
  const __nv_bfloat16 *q, *k;
  const float *g, *beta;
  float floor;
  Records to;
};

// T and P of a chunk, by the whole block.
template <int D>
__device__ __forceinline__ void triangles(Shared<D, true>& sh, const TokenBlock<D>& x, char* T, char* P, bool first, int b, int lane) {
  using O = Operands<D>;
  constexpr int N = D / 32;
  const int thread = 32 * b + lane;
  // The leaf, as an 8 x 8 matrix: P on and under its diagonal, at (r, c) above it the product of keys c and r.
  float kf[8][N];
#pragma unroll
  for (int i = 0; i < 8; ++i) unpack(kf[i], x.k[i]);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float v[16];
#pragma unroll
    for (int r = 2 * pair; r < 2 * pair + 2; ++r) {
      float row[N], up[N];
      unpack(row, x.q[r]);
#pragma unroll
      for (int n = 0; n < N; ++n) up[n] = kf[r][n];
#pragma unroll
      for (int c = 7; c >= 0; --c) {
        if (c > r) continue;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          sum = fmaf(row[n], kf[c][n], sum);
          if (c > 0) row[n] *= x.a[c][n];
        }
        v[(r - 2 * pair) * 8 + c] = sum;
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (c <= r) continue;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < N; ++n) up[n] *= x.a[c][n], sum = fmaf(up[n], kf[c][n], sum);
        v[(r - 2 * pair) * 8 + c] = sum;
      }
    }
    const float sum = warp_sums(v, lane);
    const int r = 2 * pair + lane / 16, c = lane / 2 % 8, j = 8 * b + c;
    if (lane % 2 == 0)
      *reinterpret_cast<__nv_bfloat16*>(P + record_tile(b, b) + r * 16 + c * 2) = __float2bfloat16_rn(c <= r ? sum : 0.f);
    else if (c > r)
      sh.a[j * kStrideA + 8 * b + r] = sum * sh.beta[j];
  }
  if (b % 2 == 0)  // above the diagonal of the 16 x 16 block; of the leaf itself only what is under its diagonal is read
#pragma unroll
    for (int i = 0; i < 2; ++i) sh.a[(8 * b + lane / 4) * kStrideA + 8 * b + 8 + 2 * (lane % 4) + i] = 0.f;
  __syncthreads();

  // Across the cuts: rows of queries give P, rows of keys A.
  const uint32_t operands = smem_address(sh.operands);
  const auto tile_of_P = [&](int i, int j, float x, float y) { *reinterpret_cast<uint32_t*>(P + record_tile(i, j) + lane * 4) = pack(x, y); };
  const auto tile_of_A = [&](int i, int j, float x, float y, bool round) {
    const int t = 8 * i + lane / 4;
    const float f = sh.beta[t];
    x *= f, y *= f;
    *reinterpret_cast<float2*>(sh.a + t * kStrideA + 8 * j + 2 * (lane % 4)) = round ? make_float2(rounded(x), rounded(y)) : make_float2(x, y);
  };
  if (b < 4) {
    const bool keys = b >= 2;
    const int half = b % 2;
    const uint32_t rows = operands + (keys ? O::keys(2) + (32 + 16 * half) * O::kRow : O::queries(2) + 16 * half * O::kRow) + lane % 16 * O::kRow;
    const uint32_t columns = operands + O::keys(2) + (lane % 8 + (lane >= 16 ? 8 : 0)) * O::kRow;
    float d[4][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t x[4], y[4];
      load_matrix(x, rows + (((2 * step + lane / 16) ^ (lane & 7)) << 4));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_matrix(y, columns + n * 16 * O::kRow + (((2 * step + lane / 8 % 2) ^ (lane & 7)) << 4));
        mma_bf16(d[2 * n], x, y[0], y[1]);
        mma_bf16(d[2 * n + 1], x, y[2], y[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 4 + 2 * half + h;
        if (keys) tile_of_A(i, n, d[n][2 * h], d[n][2 * h + 1], true);
        else tile_of_P(i, n, d[n][2 * h], d[n][2 * h + 1]);
      }
  } else {
    const int u = b - 4, half = u / 2;
    const bool keys = u % 2 == 1;
    {
      const uint32_t rows = operands + (keys ? O::keys(1) + (32 * half + 16) * O::kRow : O::queries(1) + 16 * half * O::kRow) + lane % 16 * O::kRow;
      const uint32_t columns = operands + O::keys(1) + (32 * half + lane % 8 + (lane >= 16 ? 8 : 0)) * O::kRow;
      float d[2][4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t x[4], y[4];
        load_matrix(x, rows + (((2 * step + lane / 16) ^ (lane & 7)) << 4));
        load_matrix(y, columns + (((2 * step + lane / 8 % 2) ^ (lane & 7)) << 4));
        mma_bf16(d[0], x, y[0], y[1]);
        mma_bf16(d[1], x, y[2], y[3]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 4 * half + 2 + h, j = 4 * half + n;
          if (keys) tile_of_A(i, j, d[n][2 * h], d[n][2 * h + 1], true);
          else tile_of_P(i, j, d[n][2 * h], d[n][2 * h + 1]);
        }
    }
    {  // the cut of 16 tokens: eight rows of queries and eight of keys in one product
      const int r = lane % 8;
      const uint32_t rows = operands + (lane % 16 < 8 ? O::queries(0) + 8 * u * O::kRow : O::keys(0) + (16 * u + 8) * O::kRow) + r * O::kRow;
      const uint32_t columns = operands + O::keys(0) + (16 * u + r) * O::kRow;
      float d[4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; step += 2) {
        uint32_t x[4], y[4];
        load_matrix(y, columns + (((2 * step + lane / 8) ^ r) << 4));
        load_matrix(x, rows + (((2 * step + lane / 16) ^ r) << 4));
        mma_bf16(d, x, y[0], y[1]);
        load_matrix(x, rows + (((2 * step + 2 + lane / 16) ^ r) << 4));
        mma_bf16(d, x, y[2], y[3]);
      }
      tile_of_P(2 * u + 1, 2 * u, d[0], d[1]);
      tile_of_A(2 * u + 1, 2 * u, d[2], d[3], false);
    }
  }
  if (!first) return;
  __syncthreads();
  if (thread >= 128) return;
  invert(sh.a, thread);

  // T. A half-warp has a column of tiles.
  const int unit = thread / 16;
  const float4 w0 = *reinterpret_cast<const float4*>(sh.beta + unit * 8), w1 = *reinterpret_cast<const float4*>(sh.beta + unit * 8 + 4);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int i_tile = 2 * m + thread / 8 % 2;
    if (unit > i_tile) continue;
    const float* from = (m % 2 == 1 && unit / 2 == m - 1 ? inverse_block(sh.a, m - 1, m) : inverse_block(sh.a, m, unit / 2)) + thread % 16 * kStrideA + unit % 2 * 8;
    const float4 x = *reinterpret_cast<const float4*>(from);
    const float4 y = *reinterpret_cast<const float4*>(from + 4);
    *reinterpret_cast<uint4*>(T + record_tile(i_tile, unit) + thread % 8 * 16) =
        make_uint4(pack(x.x * w0.x, x.y * w0.y), pack(x.z * w0.z, x.w * w0.w), pack(y.x * w1.x, y.y * w1.y), pack(y.z * w1.z, y.w * w1.w));
  }
}

template <int D, bool kTriangles>
__global__ void __launch_bounds__(kThreads, 2) prepare_kernel(const Shape s, const Arguments p) {
  constexpr int N = D / 32;
  extern __shared__ __align__(128) char raw_shared[];
  Shared<D, kTriangles>& sh = *reinterpret_cast<Shared<D, kTriangles>*>(raw_shared);
  const int thread = threadIdx.x, lane = thread % 32, b = __shfl_sync(~0u, thread / 32, 0);  // b: the block of eight tokens
  const Work w(s);
  if (w.at.count == 0) return;
  const size_t by_state = static_cast<size_t>(w.chunk) * s.Hs + w.hs, by_output = static_cast<size_t>(w.chunk) * s.Ho + w.ho;

  TokenBlock<D> x;
  x.load(s, w, p.k, p.q, p.g, b, lane);
  if constexpr (kTriangles) {
    if (lane < 8) {
      const int t = 8 * b + lane;
      const float beta = t < w.at.count ? p.beta[static_cast<size_t>(w.at.token + t) * s.Hs + w.hs] : 0.f;
      sh.beta[t] = fabsf(beta) < p.floor && t < w.at.count ? p.floor : beta;
    }
  }
  x.norms_and_decay(s, sh.rk, sh.rq, sh.decay, b, lane);
  __syncthreads();
  x.normalise(sh.rk, sh.rq, b);
  {
    const BlockDecays<N> blocks(sh.decay + N * lane, D, b);
    if constexpr (kTriangles) x.levels(smem_address(sh.operands), blocks, b, lane);
    x.records(p.to.keys + by_state * keys_bytes(D), p.to.queries + by_output * image_bytes(D), w.first, blocks, b, lane);
  }
  if constexpr (kTriangles) triangles<D>(sh, x, p.to.T + by_state * kTriangle, p.to.P + by_output * kTriangle, w.first, b, lane);
}
template <int D, bool kTriangles>
cudaError_t launch(const Shape& s, dim3 grid, const Arguments& a, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<D, kTriangles>);
  const cudaError_t status = cudaFuncSetAttribute(prepare_kernel<D, kTriangles>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  prepare_kernel<D, kTriangles><<<grid, kThreads, kBytes, stream>>>(s, a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_prepare(const OryxKda& p, const Shape& s, int records, bool triangles, float floor, const Records& to, cudaStream_t stream) {
  if (records == 0) return cudaSuccess;
  const dim3 grid = work_grid(s, records);
  const Arguments a{static_cast<const __nv_bfloat16*>(p.q), static_cast<const __nv_bfloat16*>(p.k), p.g, p.beta, floor, to};
  if (s.D == 64) return triangles ? launch<64, true>(s, grid, a, stream) : launch<64, false>(s, grid, a, stream);
  return triangles ? launch<128, true>(s, grid, a, stream) : launch<128, false>(s, grid, a, stream);
}

}  // namespace oryx::kda_cuda
