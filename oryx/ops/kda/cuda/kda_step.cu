// One token of Kimi Delta Attention, in place (oryx/ops/cuda/state_step.cuh): the gated delta rule's step with a decay for each column of the state.
#include "oryx/ops/kda/cuda/kda_step.h"

#include <algorithm>
#include <type_traits>

#include "oryx/ops/cuda/state_step.cuh"

namespace {

struct Kda {
  static constexpr bool kChannels = true;
  static constexpr bool kPredicts = true;
  const float *g, *beta;
  int64_t heads;
  float scale, eps;
  __device__ oryx::ops::cuda::StepScalars scalars(int64_t n, int head, float kk) const { return {1.0f, __ldcg(beta + n * heads + head), rsqrtf(kk + eps), 0.0f, 0.0f}; }
  __device__ float query_scale(float qq) const { return scale * rsqrtf(qq + eps); }
  __device__ float decay_at(int64_t n, int head, int K, int i) const { return expf(__ldcg(g + (n * heads + head) * K + i)); }
  __device__ float4 decays(int64_t n, int head, int K, int i) const {
    return make_float4(decay_at(n, head, K, i), decay_at(n, head, K, i + 1), decay_at(n, head, K, i + 2), decay_at(n, head, K, i + 3));
  }
};

}  // namespace

extern "C" int oryx_kda_step(const void* q, const void* k, const void* v, const float* g, const float* beta, float* state, void* o, int dtype, int64_t N, int64_t Hq, int64_t Hk,
                             int64_t Hv, int64_t K, int64_t V, int64_t state_sequence, int64_t state_head, float scale, float l2_eps, int chained, const int32_t* places,
                  const int32_t* active, void* stream) {
  const int64_t Hs = std::max(Hk, Hv);
  const oryx::ops::cuda::StateStep step{q, k, v, state, o, N, Hq, Hk, Hv, Hs, std::max(Hq, Hs), K, V, state_sequence, state_head, places, active};
  return oryx::ops::cuda::launch_state_step(step, Kda{g, beta, Hs, scale, l2_eps}, dtype, static_cast<cudaStream_t>(stream), chained != 0);
}
