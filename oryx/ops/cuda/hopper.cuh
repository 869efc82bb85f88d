// The PTX of sm_90a that the Hopper kernels share: mbarriers, bulk and tensor copies, wgmma, ldmatrix and stmatrix.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace oryx::hopper {

__device__ __forceinline__ uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarriers
__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// compute-sanitizer's racecheck orders at an mbarrier what the arriving thread itself did, and not what the other lanes of its warp did before __syncwarp; its initcheck does not
// see what bulk copies write to device memory. A build for these tools (ORYX_COMPUTE_SANITIZER) has every lane arrive and makes plain stores of the bulk ones; in every other
// build one lane arrives for its warp. A barrier that waits for N warps is made with N * kWarpArrivals arrivals.
#ifdef ORYX_COMPUTE_SANITIZER
constexpr bool kForSanitizer = true;
#else
constexpr bool kForSanitizer = false;
#endif
constexpr int kWarpArrivals = kForSanitizer ? 32 : 1;
// By all lanes of a warp, behind __syncwarp or an instruction that the warp executes as one (a wait for wgmma, a shuffle): lane 0 speaks for what the others did before it.
__device__ __forceinline__ void barrier_arrive_warp(uint32_t bar, int lane) {
  if (kForSanitizer || lane == 0) barrier_arrive(bar);
}
// The other lanes of a warp whose lane 0 has arrived by barrier_expect.
__device__ __forceinline__ void barrier_arrive_others(uint32_t bar, int lane) {
  if (kForSanitizer && lane != 0) barrier_arrive(bar);
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- copies
__device__ __forceinline__ void tensor_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, int bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
               "r"(bytes), "r"(bar)
               : "memory");
}
// By one thread, bytes / 4 words in turn, what bulk stores and sums do: for the sanitizer alone.
template <bool kAdd>
__device__ __noinline__ void plain_store(float* dst, uint32_t src, int bytes) {
  for (int i = 0; i < bytes / 4; ++i) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(src + 4 * i) : "memory");
    dst[i] = kAdd ? dst[i] + x : x;
  }
  asm volatile("fence.proxy.async;" ::: "memory");  // copies may read it
}
__device__ __forceinline__ void bulk_store(void* dst, uint32_t src, int bytes) {
  if constexpr (kForSanitizer)
    plain_store<false>(static_cast<float*>(dst), src, bytes);
  else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
// The same with a hint to the L2 cache (PTX: createpolicy).
__device__ __forceinline__ void bulk_store(void* dst, uint32_t src, int bytes, uint64_t hint) {
  if constexpr (kForSanitizer)
    plain_store<false>(static_cast<float*>(dst), src, bytes);
  else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(dst), "r"(src), "r"(bytes), "l"(hint) : "memory");
}
__device__ __forceinline__ void bulk_add(float* dst, uint32_t src, int bytes) {
  if constexpr (kForSanitizer)
    plain_store<true>(dst, src, bytes);
  else
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// 16 bytes, or 16 zero bytes when !valid (nothing is read then).
__device__ __forceinline__ void copy16(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- matrix fragments
__device__ __forceinline__ void load_matrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_matrix_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_matrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ float low(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Shared memory that the copy engine or another warp wrote before a barrier; without a clobber, so that the compiler may keep several under way.
__device__ __forceinline__ uint4 lds128(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
__device__ __forceinline__ uint2 lds64(uint32_t a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a));
  return v;
}

// ---- wgmma: B, and A where it is not in registers, in shared memory with the 128-byte swizzle
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of an accumulator across a wait.
template <int N>
__device__ __forceinline__ void keep(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void keep(uint32_t (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
// Rows of 128 bytes in groups of eight, `group` bytes from group to group; `repeat` bytes between 64-element panels (MN-major B only).
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int repeat, int group) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(group >> 4) << 32) | (static_cast<uint64_t>(repeat >> 4) << 16) |
         ((address & 0x3ffff) >> 4);
}
// The accumulators of a product in its instruction, %0 and on, and as operands.
#define ORYX_WGMMA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ORYX_WGMMA_NAMES_32 ORYX_WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ORYX_WGMMA_NAMES_64                                                                                            \
  ORYX_WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
                      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ORYX_WGMMA_OUT_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define ORYX_WGMMA_OUT_16_FROM(c, d, i) ORYX_WGMMA_OUT_4(c, d, i), ORYX_WGMMA_OUT_4(c, d, i + 4), ORYX_WGMMA_OUT_4(c, d, i + 8), ORYX_WGMMA_OUT_4(c, d, i + 12)
#define ORYX_WGMMA_OUT_16(c, d) ORYX_WGMMA_OUT_16_FROM(c, d, 0)
#define ORYX_WGMMA_OUT_32(c, d) ORYX_WGMMA_OUT_16(c, d), ORYX_WGMMA_OUT_16_FROM(c, d, 16)
#define ORYX_WGMMA_OUT_64(c, d) ORYX_WGMMA_OUT_32(c, d), ORYX_WGMMA_OUT_16_FROM(c, d, 32), ORYX_WGMMA_OUT_16_FROM(c, d, 48)
// d (64 x N, N twice a thread's accumulators) = a (64 x 16) b + (accumulate ? d : 0). a: registers, or the descriptor of shared memory, m x k; b stored n x k or, kKn, k x n.
template <bool kKn = false>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ORYX_WGMMA_NAMES_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
      : ORYX_WGMMA_OUT_32("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kKn ? 1 : 0));
}
template <bool kKn = false>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ORYX_WGMMA_NAMES_32 "}, %32, %33, p, 1, 1, 0, %35;\n}\n"
      : ORYX_WGMMA_OUT_32("+f", d)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kKn ? 1 : 0));
}
template <bool kKn = false>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t* a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ORYX_WGMMA_NAMES_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"
      : ORYX_WGMMA_OUT_64("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kKn ? 1 : 0));
}
template <bool kKn = false>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ORYX_WGMMA_NAMES_64 "}, %64, %65, p, 1, 1, 0, %67;\n}\n"
      : ORYX_WGMMA_OUT_64("+f", d)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kKn ? 1 : 0));
}
template <bool kKn = false>
__device__ __forceinline__ void wgmma(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" ORYX_WGMMA_NAMES_16 "}, %16, %17, p, 1, 1, 0, %19;\n}\n"
      : ORYX_WGMMA_OUT_16("+f", d)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kKn ? 1 : 0));
}
// 64 x 64 = a b, both in shared memory, b n x k: what d held before is no input, which spares the compiler copies.
__device__ __forceinline__ void wgmma_start(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ORYX_WGMMA_NAMES_32 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
      : ORYX_WGMMA_OUT_32("=f", d)
      : "l"(a), "l"(b));
}
#undef ORYX_WGMMA_NAMES_16
#undef ORYX_WGMMA_NAMES_32
#undef ORYX_WGMMA_NAMES_64
#undef ORYX_WGMMA_OUT_4
#undef ORYX_WGMMA_OUT_16_FROM
#undef ORYX_WGMMA_OUT_16
#undef ORYX_WGMMA_OUT_32
#undef ORYX_WGMMA_OUT_64
// By size, a's place and b's order.
__device__ __forceinline__ void wgmma_64x64(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) { wgmma(d, a, b, accumulate); }
__device__ __forceinline__ void wgmma_64x64_shared(float (&d)[32], uint64_t a, uint64_t b, int accumulate) { wgmma(d, a, b, accumulate); }
__device__ __forceinline__ void wgmma_64x64_kn(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) { wgmma<true>(d, a, b, accumulate); }
__device__ __forceinline__ void wgmma_64x64_shared_kn(float (&d)[32], uint64_t a, uint64_t b, int accumulate) { wgmma<true>(d, a, b, accumulate); }
__device__ __forceinline__ void wgmma_64x128_kn(float (&d)[64], const uint32_t* a, uint64_t b, int accumulate) { wgmma<true>(d, a, b, accumulate); }

}  // namespace oryx::hopper
