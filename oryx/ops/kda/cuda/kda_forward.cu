// The forward pass: what is launched, with which scratch memory, for a shape.
#include "kda_walk.cuh"

namespace oryx::kda_cuda {
namespace {

size_t aligned(size_t bytes) { return (bytes + 127) / 128 * 128; }

}  // namespace

Plan plan(const OryxKda& p) {
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
  s.segments = 1;
  r.records = p.cu_seqlens == nullptr ? static_cast<size_t>(p.B) * s.chunks : static_cast<size_t>(p.T / kC + p.N);
  const auto rows = [&](int walks) { return p.D == 64 ? 64 : p.rows != 0 ? p.rows : walks * 4 >= kProcessors * 3 ? 128 : 64; };
  r.rows = rows(s.N * s.Ho);
  r.d_rows = rows(s.N * s.Hs);

  const size_t heads = r.records * s.Hs, outputs = r.records * s.Ho, tokens = static_cast<size_t>(p.B) * p.T;
  r.P = heads * kTriangle;
  r.triangles = r.P + outputs * kTriangle;
  r.states = r.triangles;
  r.u = r.states + heads * state_bytes(p.D);
  r.saved = aligned(r.u + tokens * s.Hs * 2 * p.D);
  r.queries = heads * keys_bytes(p.D);
  r.offsets = r.queries + outputs * image_bytes(p.D);
  r.T = aligned(r.offsets + (p.cu_seqlens == nullptr ? 0 : (static_cast<size_t>(p.N) + 1) * sizeof(int32_t)));
  r.bytes = r.T + (p.saved == nullptr ? r.triangles : 0);

  const auto summed = [&](int heads_in, int heads_out, size_t width) { return heads_in == heads_out ? 0 : aligned(tokens * heads_in * width); };
  r.d_states = r.T;
  r.d_w = r.d_states + heads * state_bytes(p.D);
  r.d_q = r.d_w + summed(s.Hs, s.Hv, 2 * p.D);
  r.d_k = r.d_q + summed(s.Ho, s.Hq, 2 * p.D);
  r.d_g = r.d_k + summed(s.Ho, s.Hk, 2 * p.D);
  r.d_bytes = r.d_g + summed(s.Ho, s.Hs, 4 * p.D);
  return r;
}

}  // namespace oryx::kda_cuda

using namespace oryx::kda_cuda;

extern "C" size_t oryx_kda_workspace(const OryxKda* p) { return plan(*p).bytes; }

extern "C" size_t oryx_kda_saved(const OryxKda* p) { return plan(*p).saved; }

extern "C" int oryx_kda_forward(const OryxKda* p, void* workspace, cudaStream_t stream) {
  Plan r = plan(*p);
  if (r.shape.N == 0) return cudaSuccess;
  char *const scratch = static_cast<char*>(workspace), *const saved = static_cast<char*>(p->saved);
  int32_t* const offsets = reinterpret_cast<int32_t*>(scratch + r.offsets);
  r.shape.chunk_offsets = p->cu_seqlens == nullptr ? nullptr : offsets;
  const int64_t tokens = static_cast<int64_t>(p->B) * p->T;
  CUtensorMap v_map{};
  cudaError_t status = cudaSuccess;
  if (tokens > 0 && (status = oryx::gated_delta_cuda::encode(&v_map, p->v, tokens, p->Hv, p->D)) != cudaSuccess) return status;
  if ((status = oryx::gated_delta_cuda::launch_offsets(r.shape, offsets, stream)) != cudaSuccess) return status;
  char* const triangles = saved == nullptr ? scratch + r.T : saved;
  const Records records{triangles, triangles + r.P, scratch, scratch + r.queries};
  const float floor = saved == nullptr ? 0.f : kFloor;
  if ((status = launch_prepare(*p, r.shape, static_cast<int>(r.records), true, floor, records, stream)) != cudaSuccess) return status;
  return launch_recurrence(*p, r.shape, r.rows, v_map, records, saved == nullptr ? nullptr : saved + r.states, saved == nullptr ? nullptr : saved + r.u, stream);
}
