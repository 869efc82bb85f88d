// The backward pass: what is launched (see gated_delta_cuda.h).
#include "gated_delta_cuda_internal.cuh"

namespace oryx::gated_delta_cuda {
namespace {

// to[r, h] = sum over `count` consecutive heads of from, [rows, heads * count, D] bfloat16, or [rows, heads * count] float32.
// 8 bfloat16 a thread.
__global__ void sum_heads_kernel(const uint4* from, uint4* to, int64_t n, int heads, int count, int units) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int64_t unit = i % units, head = i / units % heads, row = i / units / heads;
  float sum[8] = {};
  for (int c = 0; c < count; ++c) {
    const uint4 x = from[((row * heads + head) * count + c) * units + unit];
    const uint32_t u[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[2 * k] += low(u[k]), sum[2 * k + 1] += high(u[k]);
  }
  to[i] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
}
__global__ void sum_heads_kernel(const float* from, float* to, int64_t n, int count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int c = 0; c < count; ++c) sum += from[i * count + c];
  to[i] = sum;
}

// D = 0: float32
cudaError_t sum_heads(const void* from, void* to, int64_t rows, int heads, int count, int D, cudaStream_t stream) {
  const int64_t n = rows * heads * (D == 0 ? 1 : D / 8), blocks = (n + 255) / 256;
  if (blocks == 0) return cudaSuccess;
  if (D == 0) sum_heads_kernel<<<blocks, 256, 0, stream>>>(static_cast<const float*>(from), static_cast<float*>(to), n, count);
  else sum_heads_kernel<<<blocks, 256, 0, stream>>>(static_cast<const uint4*>(from), static_cast<uint4*>(to), n, heads, count, D / 8);
  return cudaGetLastError();
}

}  // namespace
}  // namespace oryx::gated_delta_cuda

using namespace oryx::gated_delta_cuda;

extern "C" size_t oryx_gated_delta_backward_workspace(const OryxGatedDelta* p) { return plan(*p).d_bytes; }

extern "C" int oryx_gated_delta_backward(const OryxGatedDelta* p, const OryxGatedDeltaGradients* d, void* workspace, cudaStream_t stream) {
  Plan r = plan(*p);
  Shape& s = r.shape;
  if (s.N == 0) return cudaSuccess;
  char *const scratch = static_cast<char*>(workspace), *const saved = static_cast<char*>(p->saved);
  float* const own = reinterpret_cast<float*>(scratch + r.d_own);
  int32_t* const offsets = reinterpret_cast<int32_t*>(scratch + r.d_offsets);
  uint32_t* const done = reinterpret_cast<uint32_t*>(scratch + r.d_done);
  int32_t* const order = reinterpret_cast<int32_t*>(scratch + r.d_order);
  s.chunk_offsets = p->cu_seqlens == nullptr ? nullptr : offsets;
  // Gradients of heads that several others read: of each reader first.
  void* const d_q = s.Ho == s.Hq ? d->d_q : scratch + r.d_q;
  void* const d_k = s.Ho == s.Hk ? d->d_k : scratch + r.d_k;
  void* const d_v = s.Hs == s.Hv ? d->d_v : scratch + r.d_v;
  float* const d_g = s.Ho == s.Hs ? d->d_g : reinterpret_cast<float*>(scratch + r.d_g);

  const int64_t tokens = static_cast<int64_t>(s.B) * s.T;
  CUtensorMap maps[5] = {};  // q, k, v, d_o, d_v
  cudaError_t status = cudaSuccess;
  if (tokens > 0) {
    if ((status = encode(&maps[0], p->q, tokens, s.Hq, s.D)) != cudaSuccess) return status;
    if ((status = encode(&maps[1], p->k, tokens, s.Hk, s.D)) != cudaSuccess) return status;
    if ((status = encode(&maps[2], p->v, tokens, s.Hv, s.D)) != cudaSuccess) return status;
    if ((status = encode(&maps[3], d->d_o, tokens, s.Ho, s.D)) != cudaSuccess) return status;
    if ((status = encode(&maps[4], d_v, tokens, s.Hs, s.D)) != cudaSuccess) return status;
  }
  const CUtensorMap walk[3] = {maps[0], maps[1], maps[3]};
  if ((status = launch_offsets(s, offsets, stream)) != cudaSuccess) return status;
  const int row_blocks = s.D == 64 ? 1 : kD / r.d_rows;
  if ((status = launch_order(s, static_cast<int>(r.records), r.merged, r.d_blocks / (s.Hs * row_blocks), order, done, stream)) != cudaSuccess)
    return status;
  if (s.segments > 1) {
    if ((status = launch_backward_recurrence(*p, *d, s, false, 128, 1, 1 << 30, walk, saved, own, scratch, d_v, done, stream)) != cudaSuccess)
      return status;
    const float* maps_transposed = reinterpret_cast<const float*>(saved + r.maps_transposed);
    if ((status = launch_combine(s, true, nullptr, own, maps_transposed, stream)) != cudaSuccess) return status;
  }
  status = launch_backward_recurrence(*p, *d, s, true, r.d_rows, r.merged, r.d_blocks, walk, saved, own, scratch, d_v, done, stream);
  if (status != cudaSuccess) return status;
  status = launch_backward_chunk(*p, *d, s, static_cast<int>(r.records), maps, saved, saved + r.states, scratch, order, done, row_blocks, d_q, d_k,
                                 d_g, stream);
  if (status != cudaSuccess) return status;
  if (d_q != d->d_q && (status = sum_heads(d_q, d->d_q, tokens, s.Hq, s.Ho / s.Hq, s.D, stream)) != cudaSuccess) return status;
  if (d_k != d->d_k && (status = sum_heads(d_k, d->d_k, tokens, s.Hk, s.Ho / s.Hk, s.D, stream)) != cudaSuccess) return status;
  if (d_v != d->d_v && (status = sum_heads(d_v, d->d_v, tokens, s.Hv, s.Hs / s.Hv, s.D, stream)) != cudaSuccess) return status;
  if (d_g != d->d_g && (status = sum_heads(d_g, d->d_g, tokens, s.Hs, s.Ho / s.Hs, 0, stream)) != cudaSuccess) return status;
  return cudaSuccess;
}
