// Activations as the tensor cores' fragments (oryx/generate/cuda/decode_product.h): what a kernel in front of a product writes.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace oryx::ops::cuda {

// Activations [N, K] bfloat16 as [K / 32][tiles][lane][8 values]: tiles of eight sequences, lane 4 (n % 8) + t with columns 2 t, 2 t + 8, 2 t + 16, 2 t + 24 of sequence n, two each.
// Where columns k and k + 1 (k even) of sequence n lie:
__device__ __forceinline__ uint32_t* activation_pair(void* packed, int tiles, int n, int k) {
  return static_cast<uint32_t*>(packed) + ((static_cast<int64_t>(k / 32) * tiles + n / 8) * 32 + n % 8 * 4 + k % 8 / 2) * 4 + k % 32 / 16 * 2 + k % 16 / 8;
}
__device__ __forceinline__ __nv_bfloat16* activation(void* packed, int tiles, int n, int k) { return reinterpret_cast<__nv_bfloat16*>(activation_pair(packed, tiles, n, k & ~1)) + (k & 1); }

}  // namespace oryx::ops::cuda
