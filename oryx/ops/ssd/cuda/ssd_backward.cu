// The backward pass: what is launched, with which scratch memory, and the sums over blocks.
#include "oryx/ops/ssd/cuda/ssd_backward.cuh"

namespace oryx::ssd_cuda {
namespace {

// out [rows, dim] = sum of the `count` consecutive rows of part [rows * count, dim] that make each, in order.
template <typename T>
__global__ void sum_kernel(const float* __restrict__ part, T* __restrict__ out, int64_t size, int dim, int count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  wait_for_previous();
  if (i >= size) return;
  const float* from = part + i / dim * count * dim + i % dim;
  float sum = from[0];
  for (int c = 1; c < count; ++c) sum += from[static_cast<int64_t>(c) * dim];
  out[i] = static_cast<T>(sum);
}
template <typename T>
cudaError_t launch_sum(const float* part, T* out, int64_t rows, int dim, int count, cudaStream_t stream) {
  const int64_t size = rows * dim;
  if (size == 0) return cudaSuccess;
  return static_cast<cudaError_t>(launch_after(sum_kernel<T>, dim3(static_cast<unsigned>((size + 255) / 256)), 256, 0,
                                               stream, part, out, size, dim, count));
}

// out [3][Hs] = sums of part [3, Hs, readers * records] over the chunks there are.
__global__ void __launch_bounds__(256)
    head_sum_kernel(const float* __restrict__ part, const int32_t* chunk_offsets, int N, int records, int Hs,
                    int readers, float* d_bias, float* d_A_log, float* d_D) {
  __shared__ double shared[256];
  wait_for_previous();
  const int h = blockIdx.x, kind = blockIdx.y,
            count = chunk_offsets == nullptr ? records : min(chunk_offsets[N], records);
  double sum = 0;
  for (int r = 0; r < readers; ++r) {
    const float* from = part + ((static_cast<size_t>(kind) * Hs + h) * readers + r) * records;
    for (int i = threadIdx.x; i < count; i += 256) sum += from[i];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int d = 128; d > 0; d /= 2) {
    if (threadIdx.x < d) shared[threadIdx.x] += shared[threadIdx.x + d];
    __syncthreads();
  }
  if (threadIdx.x == 0) (kind == 0 ? d_bias : kind == 1 ? d_A_log : d_D)[h] = static_cast<float>(shared[0]);
}

int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

struct Plan {
  Shape shape;
  int records, heads;
  size_t state_bytes;  // of S0, of dS
  // offsets in bytes
  size_t states, segments, decays, offsets, dq, dk, dv, step, head, bytes;
};

Plan plan(const OryxSsd& p) {
  Plan r{};
  Shape& s = r.shape;
  s = make_shape(p);
  const int64_t chunks = (static_cast<int64_t>(p.T) + kC - 1) / kC;
  r.records = static_cast<int>(p.cu_seqlens == nullptr ? p.B * chunks : p.T / kC + p.N);
  const int64_t walks = static_cast<int64_t>(s.N) * s.Hs * (s.V / 64);
  s.segments = p.segments != 0 ? p.segments : choose_segments(walks, s.N > 0 ? r.records / s.N : 0);
  s.pieces = s.N > 0 ? choose_pieces(walks, 2, s.segments, r.records / s.N) : 1;
  // Heads that share a key head and a query head; fewer where there would be too few blocks for the chip.
  r.heads = gcd(s.Ho / s.Hq, s.Ho / s.Hk);
  while (r.heads % 2 == 0 && static_cast<int64_t>(r.records) * (s.Ho / r.heads) < kProcessors * 7 / 4) r.heads /= 2;

  const size_t tokens = static_cast<size_t>(p.B) * p.T, units = s.Ho / r.heads;
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    const size_t from = at;
    at += (bytes + 127) / 128 * 128;
    return from;
  };
  r.state_bytes = static_cast<size_t>(r.records) * s.Hs * s.V * s.K * 2;
  r.states = take(2 * r.state_bytes);
  r.segments = take(s.segments > 1 ? 2 * walks * s.segments * s.pieces * 64 * s.K * sizeof(float) : 0);
  r.decays = take(s.segments > 1 ? 2 * walks * s.segments * s.pieces * sizeof(float) : 0);
  r.offsets = take(p.cu_seqlens == nullptr ? 0 : (static_cast<size_t>(p.N) + 1) * sizeof(int32_t));
  r.dq = take(units == static_cast<size_t>(s.Hq) ? 0 : tokens * units * s.K * sizeof(float));
  r.dk = take(units == static_cast<size_t>(s.Hk) ? 0 : tokens * units * s.K * sizeof(float));
  r.dv = take(s.Ho == s.Hv ? 0 : tokens * s.Ho * s.V * sizeof(float));
  r.step = take(s.Ho == s.Hs ? 0 : tokens * s.Ho * sizeof(float));
  r.head = take(3 * static_cast<size_t>(s.Ho) * r.records * sizeof(float));
  r.bytes = at;
  return r;
}

}  // namespace
}  // namespace oryx::ssd_cuda

using namespace oryx::ssd_cuda;

extern "C" size_t oryx_ssd_backward_workspace(const OryxSsd* p) { return plan(*p).bytes; }

extern "C" int oryx_ssd_backward(const OryxSsd* p, const OryxSsdGradients* g, void* workspace, cudaStream_t stream) {
  const Plan r = plan(*p);
  const Shape& s = r.shape;
  char* const at = static_cast<char*>(workspace);
  const auto floats = [&](size_t offset) { return reinterpret_cast<float*>(at + offset); };
  const int64_t tokens = static_cast<int64_t>(p->B) * p->T;
  int32_t* const offsets = p->cu_seqlens == nullptr ? nullptr : reinterpret_cast<int32_t*>(at + r.offsets);
  cudaError_t status = cudaSuccess;
  if (s.N > 0) {
    CUtensorMap maps[4] = {};
    if (tokens > 0) {
      if ((status = encode(&maps[0], p->k, tokens, p->Hk, p->K)) != cudaSuccess) return status;
      if ((status = encode(&maps[1], p->v, tokens, p->Hv, p->V)) != cudaSuccess) return status;
      if ((status = encode(&maps[2], p->q, tokens, p->Hq, p->K)) != cudaSuccess) return status;
      if ((status = encode(&maps[3], g->d_o, tokens, s.Ho, p->V)) != cudaSuccess) return status;
    }
    if (offsets != nullptr && (status = launch_chunk_offsets(s, offsets, stream)) != cudaSuccess) return status;

    Walk w{};
    w.directions = 2, w.dt_raw = p->dt_raw, w.dt_bias = p->dt_bias, w.A_log = p->A_log, w.wanted = p->wanted,
    w.chunk_offsets = offsets;
    w.start[0] = p->initial_state, w.start[1] = g->d_final_state, w.end[1] = g->d_initial_state;
    const size_t pieces = static_cast<size_t>(s.N) * s.Hs * (s.V / 64) * s.segments * s.pieces;
    for (int i = 0; i < 2; ++i) {
      w.states[i] = reinterpret_cast<__nv_bfloat16*>(at + r.states + i * r.state_bytes);
      w.segments[i] = {floats(r.segments) + i * pieces * 64 * s.K, floats(r.decays) + i * pieces};
    }
    if (s.segments > 1 && (status = launch_walk(s, w, true, maps, stream)) != cudaSuccess) return status;
    if ((status = launch_walk(s, w, false, maps, stream)) != cudaSuccess) return status;

    if (tokens > 0) {
      const int units = s.Ho / r.heads;
      GradientArguments a{};
      a.dt_raw = p->dt_raw, a.dt_bias = p->dt_bias, a.A_log = p->A_log, a.D = p->D, a.wanted = p->wanted;
      a.states[0] = w.states[0], a.states[1] = w.states[1];
      a.chunk_offsets = offsets, a.records = r.records, a.heads = r.heads;
      a.d_q = static_cast<__nv_bfloat16*>(g->d_q), a.d_k = static_cast<__nv_bfloat16*>(g->d_k),
      a.d_v = static_cast<__nv_bfloat16*>(g->d_v);
      a.dq_part = units == s.Hq ? nullptr : floats(r.dq), a.dk_part = units == s.Hk ? nullptr : floats(r.dk);
      a.dv_part = s.Ho == s.Hv ? nullptr : floats(r.dv), a.d_step = s.Ho == s.Hs ? g->d_dt_raw : floats(r.step);
      a.head_part = floats(r.head);
      if ((status = launch_gradients(s, a, maps, stream)) != cudaSuccess) return status;
      if (a.dq_part != nullptr &&
          (status = launch_sum(a.dq_part, a.d_q, tokens * s.Hq, s.K, units / s.Hq, stream)) != cudaSuccess)
        return status;
      if (a.dk_part != nullptr &&
          (status = launch_sum(a.dk_part, a.d_k, tokens * s.Hk, s.K, units / s.Hk, stream)) != cudaSuccess)
        return status;
      if (a.dv_part != nullptr &&
          (status = launch_sum(a.dv_part, a.d_v, tokens * s.Hv, s.V, s.Ho / s.Hv, stream)) != cudaSuccess)
        return status;
      if (s.Ho != s.Hs &&
          (status = launch_sum(a.d_step, g->d_dt_raw, tokens * s.Hs, 1, s.Ho / s.Hs, stream)) != cudaSuccess)
        return status;
    }
  }
  return static_cast<cudaError_t>(launch_after(head_sum_kernel, dim3(s.Hs, 3), 256, 0, stream,
                                               static_cast<const float*>(floats(r.head)),
                                               static_cast<const int32_t*>(offsets), s.N, tokens > 0 ? r.records : 0,
                                               s.Hs, s.Ho / s.Hs, g->d_dt_bias, g->d_A_log, g->d_D));
}
