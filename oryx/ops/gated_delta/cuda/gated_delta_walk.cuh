// Pieces of the kernels that walk the chunks: forward and backward.
#pragma once

#include "gated_delta_cuda_internal.cuh"

namespace oryx::gated_delta_cuda {

// ---- copies with a hint to the L2 cache: what is not read again soon makes room first (PTX: createpolicy)
using hopper::bulk_load, hopper::tensor_load;
constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictNormal = 0x1000000000000000;
__device__ __forceinline__ void tensor_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2, int c3, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint)
      : "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, int bytes, uint32_t bar, uint64_t hint) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(dst), "l"(src),
               "r"(bytes), "r"(bar), "l"(hint)
               : "memory");
}

__device__ __forceinline__ void tensor_store(const CUtensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// ---- T in shared memory (see kSharedT): what lies above the diagonal is made zero once for every stage, the rest is copied in
__device__ __forceinline__ void clear_T(uint32_t record, int thread, int threads) {
  for (int i = thread; i < kSharedRows / 16; i += threads)
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(record + 16 * i), "r"(0) : "memory");
  fence_async_proxy();
}
__device__ __forceinline__ void load_record(uint32_t to, const char* record, uint32_t bar, uint64_t hint) {
#pragma unroll
  for (int i = 0; i < 8; ++i) bulk_load(to + kSharedT + 8 * kTile * i, record + record_tile(i, 0), (i + 1) * kTile, bar, hint);
  bulk_load(to + kSharedRows, record + kRecordRows, 1024, bar, hint);
}
// As right operand from k-step kk on, not swizzled: T^T (its columns are summed), and T (its rows are).
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, int leading, int stride) {
  return (static_cast<uint64_t>(stride >> 4) << 32) | (static_cast<uint64_t>(leading >> 4) << 16) | ((address & 0x3ffff) >> 4);
}
__device__ __forceinline__ uint64_t descriptor_T_transposed(uint32_t record, int kk) {
  return tile_descriptor(record + kSharedT + 2 * kTile * kk, kTile, 8 * kTile);
}
__device__ __forceinline__ uint64_t descriptor_T(uint32_t record, int kk) {
  return tile_descriptor(record + kSharedT + 16 * kTile * kk, 8 * kTile, kTile);
}

// d (64 x 64) = a (64 x 16) b + (accumulate ? d : 0), a from shared memory m x k (kTransposedA: k x m), b n x k (kTransposedB: k x n).
template <int kTransposedA, int kTransposedB>
__device__ __forceinline__ void wgmma_ss(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p, 1, 1, %35, %36;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposedA), "n"(kTransposedB));
}
// Right operands (and transposed left ones) whose rows of 128 bytes are the summed index: 64 and 128 columns from k-step kk on.
__device__ __forceinline__ uint64_t descriptor_kn(uint32_t panel, int kk) { return descriptor(panel + kk * 2048, 16, 1024); }
// Operands stored n x k (or m x k) in panels of 64 k, `bytes` each.
__device__ __forceinline__ uint64_t descriptor_nk(uint32_t panel, int kk, int bytes) {
  return descriptor(panel + kk / 4 * bytes + kk % 4 * 32, 16, 1024);
}

// A warp's 16 rows of a state (fragments of 16 x 16: `sb`) to its image in device memory, whose first of these rows is at `to`; `staging`:
// 4 KiB of shared memory of the warp's own. Returns before the bytes have left: bulk_wait at the end.
__device__ __forceinline__ void store_state(const uint32_t (&sb)[32], uint32_t staging, char* to, int D, int lane, uint64_t hint) {
  if (lane == 0) bulk_wait_read();
  __syncwarp();
  const int r = lane % 16;
#pragma unroll
  for (int kk = 0; kk < 8; ++kk)
    store_matrix(staging + kk / 4 * 2048 + r * 128 + (((kk % 4 * 2 + lane / 16) ^ (r & 7)) << 4), sb[4 * kk], sb[4 * kk + 1], sb[4 * kk + 2],
                 sb[4 * kk + 3]);
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) {
    bulk_store(to, staging, 2048, hint);
    if (D == kD) bulk_store(to + kStatePanel, staging + 2048, 2048, hint);
    bulk_commit();
  }
}

// Rows t >= count of `panels` panels become zero, so that what follows the sequence in memory (whatever it is) counts for nothing.
__device__ __forceinline__ void clear_rows(uint32_t at, int panels, int count, int thread, int threads) {
  for (int i = thread; i < panels * (kC - count) * 8; i += threads) {
    const int unit = i % 8, row = count + i / 8 % (kC - count), panel = i / 8 / (kC - count);
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at + panel * kPanel + row * 128 + unit * 16), "r"(0) : "memory");
  }
}

__device__ __forceinline__ float2 load_shared2(uint32_t at) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(at) : "memory");
  return r;
}
__device__ __forceinline__ float load_shared(uint32_t at) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(at) : "memory");
  return r;
}

// 16 bytes at once: left to itself the compiler makes four stores of it.
__device__ __forceinline__ void store_global(void* to, const uint4& x, uint64_t hint) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "l"(hint) : "memory");
}

// A warp's 64 tokens of 16 columns of O (or dV) into shared memory: 32 bytes a token, with the 32-byte swizzle.
__device__ __forceinline__ void stage_out(const uint32_t (&ob)[16], uint32_t staging, int lane) {
  __syncwarp();
#pragma unroll
  for (int nn = 0; nn < 4; ++nn) {
    const int t = 8 * (2 * nn + lane / 16) + lane % 8, h = lane / 8 % 2;
    store_matrix_transposed(staging + t * 32 + ((h ^ (t >> 2 & 1)) << 4), ob[4 * nn], ob[4 * nn + 1], ob[4 * nn + 2], ob[4 * nn + 3]);
  }
}
// And from there, so that a token's 32 bytes leave together.
__device__ __forceinline__ void store_out(const uint32_t (&ob)[16], uint32_t staging, __nv_bfloat16* out, const uint8_t* wanted, int token, int count,
                                          size_t stride, int column, int lane, uint64_t hint) {
  stage_out(ob, staging, lane);
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int t = 16 * j + lane / 2, unit = lane % 2;
    if (t < count) {
      uint4 x;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(staging + t * 32 + ((unit ^ (t >> 2 & 1)) << 4))
                   : "memory");
      if (wanted != nullptr && wanted[token + t] == 0) x = make_uint4(0, 0, 0, 0);
      store_global(out + (token + t) * stride + column + 8 * unit, x, hint);
    }
  }
}

// By a warpgroup: P_tj = scale exp(G_t - G_j) q_t.k_j / (|q_t| |k_j|), j <= t, and scale exp(G_t) / |q_t|, both into the stage at `at`.
template <int kQ, int kK, int kRecordAt, int kP>
__device__ __forceinline__ void queries(uint32_t at, float scale, float eps, int warp, int lane) {
  float d[32];
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 8; ++kk)
    wgmma_64x64_shared(d, descriptor(at + kQ + kk / 4 * kPanel + kk % 4 * 32, 16, 1024),
                       descriptor(at + kK + kk / 4 * kPanel + kk % 4 * 32, 16, 1024), kk > 0);
  wgmma_commit();

  float sum = 0.f;  // of half a row of q squared: lanes 2 r and 2 r + 1 have row r of the warp's 16
  const uint32_t half = at + kQ + lane % 2 * kPanel + (16 * warp + lane / 2) * 128;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t x[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(half + ((i + lane) % 8) * 16)
                 : "memory");
#pragma unroll
    for (int m = 0; m < 4; ++m) sum += low(x[m]) * low(x[m]) + high(x[m]) * high(x[m]);
  }
  // Both lanes of a row add the same two numbers in the same order.
  const float other = __shfl_xor_sync(~0u, sum, 1);
  const float inverse = scale * rsqrtf((lane % 2 == 0 ? sum + other : other + sum) + eps);
  float f[2], G[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = 16 * warp + lane / 4 + 8 * h;
    f[h] = __shfl_sync(~0u, inverse, 2 * (lane / 4 + 8 * h));
    G[h] = load_shared(at + kRecordAt + 4 * (128 + t));
    if (lane % 4 == 0) asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + kP + kPanel + 4 * t), "f"(f[h] * power2(G[h])) : "memory");
  }
  wgmma_wait<0>();
  keep(d);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int j = 8 * n + 2 * (lane % 4);
    const float2 g = load_shared2(at + kRecordAt + 4 * (128 + j)), r = load_shared2(at + kRecordAt + 4 * (192 + j));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = 16 * warp + lane / 4 + 8 * h;
      const float p0 = j <= t ? f[h] * r.x * power2(G[h] - g.x) * d[4 * n + 2 * h] : 0.f;
      const float p1 = j + 1 <= t ? f[h] * r.y * power2(G[h] - g.y) * d[4 * n + 2 * h + 1] : 0.f;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + kP + t * 128 + ((n ^ (t & 7)) << 4) + lane % 4 * 4), "r"(pack(p0, p1)) : "memory");
    }
  }
}

}  // namespace oryx::gated_delta_cuda
