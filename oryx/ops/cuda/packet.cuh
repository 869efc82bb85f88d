// What every memory-bound kernel shares: 16-byte packets of float32 or bfloat16, arithmetic in float32, reductions.
// Launchers are plain C functions (pointers, sizes, dtypes, a stream) that return a cudaError_t, so that a .cu file
// includes no torch header and any program can call them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace oryx::ops::cuda {

// The dtypes that launchers take as an int.
constexpr int kFloat32 = 0, kBfloat16 = 1;

template <typename T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));  // elements of a packet

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Loads of memory that the kernel does not write. nvcc 13.0 makes an __ldg, and an asm that is not volatile, even where the test of its
// index or pointer does not pass, which reads behind the ends of arrays or through null.
__device__ __forceinline__ uint4 load_read_only(const uint4* p) {
  uint4 x;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}
__device__ __forceinline__ uint2 load_read_only(const uint2* p) {
  uint2 x;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
  return x;
}
__device__ __forceinline__ float load_read_only(const float* p) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(p));
  return x;
}
__device__ __forceinline__ __nv_bfloat16 load_read_only(const __nv_bfloat16* p) {
  unsigned short x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(p));
  return __ushort_as_bfloat16(x);
}

// V elements as they lie in memory: V = kLanes<T>, one 16-byte access; half of that, one of 8 bytes; or V = 1.
template <typename T, int V>
struct Packet {
  static_assert(V == 1 || V == kLanes<T>);
  uint4 raw;
  __device__ __forceinline__ void load(const T* p) { raw = load_read_only(reinterpret_cast<const uint4*>(p)); }
  // Of memory that the same kernel writes.
  __device__ __forceinline__ void load_plain(const T* p) { raw = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void zero() { raw = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = raw; }
  __device__ __forceinline__ void store_if(T* p, bool condition) const {
    if (condition) store(p);
  }
  __device__ __forceinline__ void unpack(float (&out)[V]) const {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    }
  }
  __device__ __forceinline__ void pack(const float (&in)[V]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(in[i]);
      } else {
        const __nv_bfloat162 two = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&two);
      }
    }
    raw = make_uint4(words[0], words[1], words[2], words[3]);
  }
};
template <typename T, int V>
  requires(V > 1 && V * sizeof(T) == 8)
struct Packet<T, V> {
  uint2 raw;
  __device__ __forceinline__ void load(const T* p) { raw = load_read_only(reinterpret_cast<const uint2*>(p)); }
  __device__ __forceinline__ void zero() { raw = make_uint2(0, 0); }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint2*>(p) = raw; }
  // Without a branch.
  __device__ __forceinline__ void store_if(T* p, bool condition) const {
    asm volatile("{\n.reg .pred q;\nsetp.ne.b32 q, %3, 0;\n@q st.global.v2.b32 [%0], {%1, %2};\n}" ::"l"(p), "r"(raw.x), "r"(raw.y),
                 "r"(static_cast<int>(condition))
                 : "memory");
  }
  __device__ __forceinline__ void unpack(float (&out)[V]) const {
    if constexpr (sizeof(T) == 4) {
      out[0] = __uint_as_float(raw.x), out[1] = __uint_as_float(raw.y);
    } else {
      out[0] = __uint_as_float(raw.x << 16), out[1] = __uint_as_float(raw.x & 0xffff0000u);
      out[2] = __uint_as_float(raw.y << 16), out[3] = __uint_as_float(raw.y & 0xffff0000u);
    }
  }
  __device__ __forceinline__ void pack(const float (&in)[V]) {
    if constexpr (sizeof(T) == 4) {
      raw = make_uint2(__float_as_uint(in[0]), __float_as_uint(in[1]));
    } else {
      const __nv_bfloat162 low = __floats2bfloat162_rn(in[0], in[1]), high = __floats2bfloat162_rn(in[2], in[3]);
      raw = make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
    }
  }
};
template <typename T>
struct Packet<T, 1> {
  T raw;
  __device__ __forceinline__ void load(const T* p) { raw = load_read_only(p); }
  __device__ __forceinline__ void load_plain(const T* p) { raw = *p; }
  __device__ __forceinline__ void zero() { raw = from_float<T>(0.0f); }
  __device__ __forceinline__ void store(T* p) const { *p = raw; }
  __device__ __forceinline__ void store_if(T* p, bool condition) const {
    if (condition) store(p);
  }
  __device__ __forceinline__ void unpack(float (&out)[1]) const { out[0] = to_float(raw); }
  __device__ __forceinline__ void pack(const float (&in)[1]) { raw = from_float<T>(in[0]); }
};

// Element i of an array whose dtype is known at run time only (small arrays: weights, states).
__device__ __forceinline__ float load_any(const void* p, int dtype, int64_t i) {
  return dtype == kBfloat16 ? to_float(load_read_only(static_cast<const __nv_bfloat16*>(p) + i))
                            : load_read_only(static_cast<const float*>(p) + i);
}
__device__ __forceinline__ void store_any(void* p, int dtype, int64_t i, float x) {
  if (dtype == kBfloat16) {
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
  } else {
    static_cast<float*>(p)[i] = x;
  }
}

// V consecutive elements from i, in 16-byte accesses where the address allows (V = 4 or 8).
template <int V>
__device__ __forceinline__ void load_any(const void* p, int dtype, int64_t i, float (&out)[V]) {
  if constexpr (V == 8 || V == 4) {
    if (dtype == kFloat32) {
      const float* from = static_cast<const float*>(p) + i;
      if ((reinterpret_cast<uintptr_t>(from) & 15) == 0) {
#pragma unroll
        for (int k = 0; k < V / 4; ++k) {
          const uint4 four = load_read_only(reinterpret_cast<const uint4*>(from) + k);
          out[4 * k] = __uint_as_float(four.x), out[4 * k + 1] = __uint_as_float(four.y);
          out[4 * k + 2] = __uint_as_float(four.z), out[4 * k + 3] = __uint_as_float(four.w);
        }
        return;
      }
    } else {
      const __nv_bfloat16* from = static_cast<const __nv_bfloat16*>(p) + i;
      if ((reinterpret_cast<uintptr_t>(from) & (2 * V - 1)) == 0) {
        Packet<__nv_bfloat16, V> packet;
        packet.load(from);
        packet.unpack(out);
        return;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = load_any(p, dtype, i + k);
}

// Calls run(load) with the load(i, out) of V elements from i, a multiple of V, that suits the array: so that the choice is made once, not at
// each load, and the loads of a loop are in flight together.
template <int V, typename Run>
__device__ __forceinline__ void with_weights(const void* p, int dtype, const Run& run) {
  if constexpr (V == 8 || V == 4) {
    if ((reinterpret_cast<uintptr_t>(p) & 15) == 0) {
      if (dtype == kFloat32) {
        run([p](int64_t i, float(&out)[V]) {
#pragma unroll
          for (int k = 0; k < V / 4; ++k) {
            const uint4 four = load_read_only(reinterpret_cast<const uint4*>(static_cast<const float*>(p) + i) + k);
            out[4 * k] = __uint_as_float(four.x), out[4 * k + 1] = __uint_as_float(four.y);
            out[4 * k + 2] = __uint_as_float(four.z), out[4 * k + 3] = __uint_as_float(four.w);
          }
        });
      } else {
        run([p](int64_t i, float(&out)[V]) {
          Packet<__nv_bfloat16, V> packet;
          packet.load(static_cast<const __nv_bfloat16*>(p) + i);
          packet.unpack(out);
        });
      }
      return;
    }
  }
  run([p, dtype](int64_t i, float(&out)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = load_any(p, dtype, i + k);
  });
}

// 2^x and 1 / x within about 2 units in the last place of float32, results below 1e-38 as 0: one instruction each. (__expf and
// __fdividef take four more to treat such results.)
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
constexpr float kLog2E = 1.4426950408889634f;

// 1 / (1 + e^-x), about 2 units in the last place of float32: exact enough for float32 outputs at 1e-6.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-kLog2E * x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// d silu(x) / dx, given s = sigmoid(x)
__device__ __forceinline__ float silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

template <int kThreads>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum of a column of partial [count, width] in a fixed order, by a block of kColumns x kSlices threads: thread i has column i % kColumns of the
// block's and every kSlices-th row; threads below kColumns get the sum. Little work that a whole stream waits for: kDeep loads of a thread in flight.
constexpr int kReduceColumns = 16, kReduceSlices = 32;
template <int kColumns = kReduceColumns, int kSlices = kReduceSlices, int kDeep = 16>
__device__ __forceinline__ float reduce_column(const float* partial, int64_t count, int64_t width, int64_t column) {
  __shared__ float sums[kSlices][kColumns + 1];
  const int index = threadIdx.y * kColumns + threadIdx.x, mine = index % kColumns, slice = index / kColumns;
  float sum = 0.0f;
  const int rows = column < width ? static_cast<int>(count) : 0;
  const float* from = partial + slice * width + column;
  for (int first = slice; first < rows; first += kSlices * kDeep) {
    float values[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      values[k] = first + k * kSlices < rows ? *from : 0.0f;
      from += kSlices * width;
    }
#pragma unroll
    for (int k = 0; k < kDeep; ++k) sum += values[k];
  }
  sums[slice][mine] = sum;
  __syncthreads();
  float total = 0.0f;
  if (slice == 0) {
#pragma unroll
    for (int i = 0; i < kSlices; ++i) total += sums[i][mine];
  }
  return total;
}

inline bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

}  // namespace oryx::ops::cuda
