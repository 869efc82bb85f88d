// The forward pass: what is launched, with which scratch memory, for a shape.
#include "gated_delta_cuda_internal.cuh"
#include "oryx/ops/cuda/tensor_map.h"

namespace oryx::gated_delta_cuda {
namespace {

constexpr int kProcessors = 132;  // of the H100 and H200: only the choice of segments reads it

size_t aligned(size_t bytes) { return (bytes + 127) / 128 * 128; }

}  // namespace

Plan plan(const OryxGatedDelta& p) {
  Plan r{};
  Shape& s = r.shape;
  s.B = p.B, s.T = p.T, s.N = p.cu_seqlens == nullptr ? p.B : p.N;
  s.Hq = p.Hq, s.Hk = p.Hk, s.Hv = p.Hv;
  s.Hs = p.Hk > p.Hv ? p.Hk : p.Hv;
  s.Ho = p.Hq > s.Hs ? p.Hq : s.Hs;
  s.D = p.D;
  s.scale = p.scale != 0.f ? p.scale : p.D == 64 ? 0.125f : 0.08838834764831845f;
  s.l2_eps = p.l2_eps;
  s.cu_seqlens = p.cu_seqlens;
  s.chunks = (p.T + kC - 1) / kC;
  r.records = p.cu_seqlens == nullptr ? static_cast<size_t>(p.B) * s.chunks : static_cast<size_t>(p.T / kC + p.N);

  // Enough blocks for the chip: first 128 rows a block, then 64, then segments (which cost a second pass).
  const int walks = p.D == 64 ? (s.N * s.Ho + 1) / 2 : s.N * s.Ho, mean_chunks = static_cast<int>(r.records / (s.N > 0 ? s.N : 1));
  r.rows = walks * 4 >= kProcessors * 3 ? 128 : 64;
  s.segments = 1;
  if (walks * 4 <= kProcessors) {
    r.rows = 128;
    s.segments = kProcessors / walks;
    if (s.segments > mean_chunks / 8) s.segments = mean_chunks / 8;
    if (s.segments < 2) s.segments = 1, r.rows = 64;
  }
  if (p.segments != 0) s.segments = p.segments;
  if (p.rows != 0) r.rows = p.rows;
  if (p.D == 64) r.rows = 64;

  const size_t segments = s.segments > 1 ? static_cast<size_t>(s.N) * s.Hs * s.segments * kD * kD * sizeof(float) : 0;
  const size_t heads = r.records * s.Hs, offsets = p.cu_seqlens == nullptr ? 0 : (static_cast<size_t>(p.N) + 1) * sizeof(int32_t);
  r.states = heads * kRecordBytes;
  r.maps_transposed = r.states + heads * state_bytes(p.D);
  r.saved = r.maps_transposed + segments;
  r.own = p.saved == nullptr ? heads * kRecordBytes : 0;
  r.map = r.own + segments;
  r.offsets = r.map + segments;
  r.bytes = r.offsets + offsets;

  // Half of the chip for the walk, which backward_chunk runs beside.
  const int state_walks = s.N * s.Hs, half = kProcessors / 2;
  r.merged = 1;
  while (r.merged < s.segments && state_walks * ((s.segments + r.merged - 1) / r.merged) > half) ++r.merged;
  r.d_rows = p.rows != 0 ? p.rows : state_walks * ((s.segments + r.merged - 1) / r.merged) * 2 <= half ? 64 : 128;
  if (p.D == 64) r.d_rows = 64;
  // Those of some sequences' (or pieces') heads at a time, as far as all heads of one fit.
  const int heads_blocks = s.Hs * (p.D == 64 ? 1 : kD / r.d_rows);
  r.d_blocks = heads_blocks > half ? half : half / heads_blocks * heads_blocks;

  const size_t tokens = static_cast<size_t>(p.B) * p.T;
  const auto summed = [&](int heads_in, int heads_out, size_t width) { return heads_in == heads_out ? 0 : aligned(tokens * heads_in * width); };
  r.d_own = heads * state_bytes(p.D);
  r.d_offsets = r.d_own + segments;
  r.d_done = aligned(r.d_offsets + offsets);
  r.d_order = r.d_done + (heads + 1) * sizeof(uint32_t);
  r.d_q = aligned(r.d_order + r.records * sizeof(int32_t));
  r.d_k = r.d_q + summed(s.Ho, s.Hq, 2 * p.D);
  r.d_v = r.d_k + summed(s.Ho, s.Hk, 2 * p.D);
  r.d_g = r.d_v + summed(s.Hs, s.Hv, 2 * p.D);
  r.d_bytes = r.d_g + summed(s.Ho, s.Hs, sizeof(float));
  return r;
}

cudaError_t encode(CUtensorMap* map, const void* data, int64_t tokens, int heads, int D, int columns) {
  const cuuint64_t sizes[4] = {64, static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens), static_cast<cuuint64_t>(D / 64)};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(2 * D), static_cast<cuuint64_t>(heads) * 2 * D, 128};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), 1, kC, 1};
  return ops::cuda::encode_tensor_map(map, data, sizes, strides, box, columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B);
}

}  // namespace oryx::gated_delta_cuda

using namespace oryx::gated_delta_cuda;

extern "C" size_t oryx_gated_delta_workspace(const OryxGatedDelta* p) { return plan(*p).bytes; }

extern "C" size_t oryx_gated_delta_saved(const OryxGatedDelta* p) { return plan(*p).saved; }

extern "C" int oryx_gated_delta_forward(const OryxGatedDelta* p, void* workspace, cudaStream_t stream) {
  Plan r = plan(*p);
  if (r.shape.N == 0) return cudaSuccess;
  char *const scratch = static_cast<char*>(workspace), *const saved = static_cast<char*>(p->saved);
  char* const record = saved == nullptr ? scratch : saved;
  char* const states = saved == nullptr ? nullptr : saved + r.states;
  float* const maps_transposed = saved == nullptr ? nullptr : reinterpret_cast<float*>(saved + r.maps_transposed);
  float* own = reinterpret_cast<float*>(scratch + r.own);
  float* map = reinterpret_cast<float*>(scratch + r.map);
  int32_t* offsets = reinterpret_cast<int32_t*>(scratch + r.offsets);
  r.shape.chunk_offsets = p->cu_seqlens == nullptr ? nullptr : offsets;
  const int64_t tokens = static_cast<int64_t>(p->B) * p->T;
  CUtensorMap maps[4] = {};  // q, k, v; o, of which a warp writes 16 columns
  cudaError_t status = cudaSuccess;
  if (tokens > 0) {
    if ((status = encode(&maps[0], p->q, tokens, p->Hq, p->D)) != cudaSuccess) return status;
    if ((status = encode(&maps[1], p->k, tokens, p->Hk, p->D)) != cudaSuccess) return status;
    if ((status = encode(&maps[2], p->v, tokens, p->Hv, p->D)) != cudaSuccess) return status;
    if ((status = encode(&maps[3], p->o, tokens, r.shape.Ho, p->D, 16)) != cudaSuccess) return status;
  }
  if ((status = launch_offsets(r.shape, offsets, stream)) != cudaSuccess) return status;
  const float floor = saved == nullptr ? 0.f : 1e-12f;
  if ((status = launch_prepare(*p, r.shape, static_cast<int>(r.records), maps[1], floor, record, stream)) != cudaSuccess) return status;
  if (r.shape.segments > 1) {
    if ((status = launch_segments(r.shape, maps, record, own, map, maps_transposed, stream)) != cudaSuccess) return status;
    if ((status = launch_combine(r.shape, false, p->initial_state, own, map, stream)) != cudaSuccess) return status;
  }
  return launch_recurrence(*p, r.shape, r.rows, maps, record, own, states, stream);
}
