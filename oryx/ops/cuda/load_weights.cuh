// Weights whose dtype is known when a kernel is compiled: its code is then a fraction of that of one that chooses, and code comes from device memory
// too. (load_any and with_weights of packet.cuh choose.)
#pragma once

#include "oryx/ops/cuda/packet.cuh"

namespace oryx::ops::cuda {

// V weights from p, a multiple of their bytes, which is at least 8.
template <typename W, int V>
__device__ __forceinline__ void load_weights(const W* p, float (&out)[V]) {
  constexpr int kEach = V < kLanes<W> ? V : kLanes<W>;
#pragma unroll
  for (int first = 0; first < V; first += kEach) {
    Packet<W, kEach> packet;
    float part[kEach];
    packet.load(p + first);
    packet.unpack(part);
#pragma unroll
    for (int e = 0; e < kEach; ++e) out[first + e] = part[e];
  }
}

}  // namespace oryx::ops::cuda
