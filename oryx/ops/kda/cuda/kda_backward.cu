// The backward pass: what is launched (see kda_cuda.h).
#include "kda_walk.cuh"

namespace oryx::kda_cuda {
namespace {

// to[r, h] = sum over `count` consecutive heads of from, [rows, heads * count, D] bfloat16 or float32; 16 bytes a thread, `units` of them a head.
template <typename T>
__global__ void sum_heads_kernel(const uint4* from, uint4* to, int64_t n, int count, int units) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint4* x = from + i / units * count * units + i % units;
  float sum[16 / sizeof(T)] = {};
  for (int c = 0; c < count; ++c) {
    const uint4 y = x[c * units];
    const uint32_t u[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (sizeof(T) == 2) sum[2 * k] += low(u[k]), sum[2 * k + 1] += high(u[k]);
      else sum[k] += __uint_as_float(u[k]);
    }
  }
  if constexpr (sizeof(T) == 2) to[i] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
  else to[i] = make_uint4(__float_as_uint(sum[0]), __float_as_uint(sum[1]), __float_as_uint(sum[2]), __float_as_uint(sum[3]));
}
template <typename T>
cudaError_t sum_heads(const void* from, void* to, int64_t rows, int heads, int count, int D, cudaStream_t stream) {
  const int units = D * static_cast<int>(sizeof(T)) / 16;
  const int64_t n = rows * heads * units, blocks = (n + 255) / 256;
  if (blocks == 0 || from == to) return cudaSuccess;
  sum_heads_kernel<T><<<blocks, 256, 0, stream>>>(static_cast<const uint4*>(from), static_cast<uint4*>(to), n, count, units);
  return cudaGetLastError();
}

}  // namespace
}  // namespace oryx::kda_cuda

using namespace oryx::kda_cuda;

extern "C" size_t oryx_kda_backward_workspace(const OryxKda* p) { return plan(*p).d_bytes; }

extern "C" int oryx_kda_backward(const OryxKda* p, const OryxKdaGradients* d, void* workspace, cudaStream_t stream) {
  Plan r = plan(*p);
  Shape& s = r.shape;
  if (s.N == 0) return cudaSuccess;
  char *const scratch = static_cast<char*>(workspace), *const saved = static_cast<char*>(p->saved);
  int32_t* const offsets = reinterpret_cast<int32_t*>(scratch + r.offsets);
  s.chunk_offsets = p->cu_seqlens == nullptr ? nullptr : offsets;
  const int records = static_cast<int>(r.records);
  const int64_t tokens = static_cast<int64_t>(s.B) * s.T;
  // Gradients of heads that several others read: of each reader first.
  void* const d_q = s.Ho == s.Hq ? d->d_q : scratch + r.d_q;
  void* const d_k = s.Ho == s.Hk ? d->d_k : scratch + r.d_k;
  void* const w = s.Hs == s.Hv ? d->d_v : scratch + r.d_w;
  float* const d_g = s.Ho == s.Hs ? d->d_g : reinterpret_cast<float*>(scratch + r.d_g);
  CUtensorMap o_map{};
  cudaError_t status = cudaSuccess;
  if (tokens > 0 && (status = oryx::gated_delta_cuda::encode(&o_map, d->d_o, tokens, s.Ho, s.D)) != cudaSuccess) return status;
  if ((status = oryx::gated_delta_cuda::launch_offsets(s, offsets, stream)) != cudaSuccess) return status;
  const Records from{saved, saved + r.P, scratch, scratch + r.queries};
  if ((status = launch_prepare(*p, s, records, false, kFloor, from, stream)) != cudaSuccess) return status;
  if ((status = launch_backward_recurrence(*p, *d, s, r.d_rows, o_map, from, scratch + r.d_states, w, stream)) != cudaSuccess) return status;
  status = launch_backward_chunk(*p, *d, s, records, saved + r.states, scratch + r.d_states, saved + r.u, w, d_q, d_k, d_g, stream);
  if (status != cudaSuccess) return status;
  using T = __nv_bfloat16;
  if ((status = sum_heads<T>(d_q, d->d_q, tokens, s.Hq, s.Ho / s.Hq, s.D, stream)) != cudaSuccess) return status;
  if ((status = sum_heads<T>(d_k, d->d_k, tokens, s.Hk, s.Ho / s.Hk, s.D, stream)) != cudaSuccess) return status;
  if ((status = sum_heads<T>(w, d->d_v, tokens, s.Hv, s.Hs / s.Hv, s.D, stream)) != cudaSuccess) return status;
  return sum_heads<float>(d_g, d->d_g, tokens, s.Hs, s.Ho / s.Hs, s.D, stream);
}
