// The backward pass: what is launched (see gated_delta_cuda.h).
#include "gated_delta_cuda_internal.cuh"

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
  if (s.segments > 1) {
    if ((status = launch_backward_recurrence(*p, *d, s, false, 128, 1, 1 << 30, walk, saved, own, scratch, d_v, done, stream)) != cudaSuccess) return status;
    if (s.segments > 2) {
      const float* maps_transposed = reinterpret_cast<const float*>(saved + r.maps_transposed);
      if ((status = launch_combine(s, true, own, maps_transposed, stream)) != cudaSuccess) return status;
    }
  }
  const int row_blocks = s.D == 64 ? 1 : kD / r.d_rows;
  if ((status = launch_order(s, static_cast<int>(r.records), r.merged, r.d_blocks / (s.Hs * row_blocks), order, done, stream)) != cudaSuccess) return status;
  status = launch_backward_recurrence(*p, *d, s, true, r.d_rows, r.merged, r.d_blocks, walk, saved, own, scratch, d_v, done, stream);
  if (status != cudaSuccess) return status;
  status = launch_backward_chunk(*p, *d, s, static_cast<int>(r.records), maps, saved, saved + r.states, scratch, order, done, row_blocks, d_q, d_k,
                                 d_g, stream);
  if (status != cudaSuccess) return status;
  if (d_q != d->d_q && (status = launch_sum_heads(d_q, d->d_q, tokens, s.Hq, s.Ho / s.Hq, s.D, stream)) != cudaSuccess) return status;
  if (d_k != d->d_k && (status = launch_sum_heads(d_k, d->d_k, tokens, s.Hk, s.Ho / s.Hk, s.D, stream)) != cudaSuccess) return status;
  if (d_v != d->d_v && (status = launch_sum_heads(d_v, d->d_v, tokens, s.Hv, s.Hs / s.Hv, s.D, stream)) != cudaSuccess) return status;
  if (d_g != d->d_g && (status = launch_sum_heads(d_g, d->d_g, tokens, s.Hs, s.Ho / s.Hs, 0, stream)) != cudaSuccess) return status;
  return cudaSuccess;
}
