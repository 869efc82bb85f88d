// One token of the gated delta rule, in place (oryx/ops/cuda/state_step.cuh).
#include "oryx/ops/gated_delta/cuda/gated_delta_step.h"

#include <algorithm>
#include <type_traits>

#include "oryx/ops/cuda/state_step.cuh"

namespace {

struct GatedDelta {
  static constexpr bool kChannels = false;
  static constexpr bool kPredicts = true;
  const float *g, *beta;
  int64_t heads;
  float scale, eps;
  __device__ oryx::ops::cuda::StepScalars scalars(int64_t n, int head, float kk) const {
    return {expf(__ldcg(g + n * heads + head)), __ldcg(beta + n * heads + head), rsqrtf(kk + eps), 0.0f, 0.0f};
  }
  __device__ float query_scale(float qq) const { return scale * rsqrtf(qq + eps); }
};

int any_step(const void* q, const void* k, const void* v, const float* g, const float* beta, float* state, void* o, int dtype, int64_t N, int64_t Hq,
             int64_t Hk, int64_t Hv, int64_t K, int64_t V, int64_t state_sequence, int64_t state_head, float scale, float l2_eps, const int32_t* places, const int32_t* active, void* stream, bool chained) {
  const int64_t Hs = std::max(Hk, Hv);
  const oryx::ops::cuda::StateStep step{q, k, v, state, o, N, Hq, Hk, Hv, Hs, std::max(Hq, Hs), K, V, state_sequence, state_head, places, active};
  return oryx::ops::cuda::launch_state_step(step, GatedDelta{g, beta, Hs, scale, l2_eps}, dtype, static_cast<cudaStream_t>(stream), chained);
}

}  // namespace

extern "C" int oryx_gated_delta_step(const void* q, const void* k, const void* v, const float* g, const float* beta, float* state, void* o, int dtype,
                                     int64_t N, int64_t Hq, int64_t Hk, int64_t Hv, int64_t K, int64_t V, int64_t state_sequence, int64_t state_head,
                                     float scale, float l2_eps, void* stream) {
  return any_step(q, k, v, g, beta, state, o, dtype, N, Hq, Hk, Hv, K, V, state_sequence, state_head, scale, l2_eps, nullptr, nullptr, stream, false);
}
extern "C" int oryx_gated_delta_step_chained(const void* q, const void* k, const void* v, const float* g, const float* beta, float* state, void* o, int dtype,
                                             int64_t N, int64_t Hq, int64_t Hk, int64_t Hv, int64_t K, int64_t V, int64_t state_sequence, int64_t state_head,
                                             float scale, float l2_eps, const int32_t* places, const int32_t* active, void* stream) {
  return any_step(q, k, v, g, beta, state, o, dtype, N, Hq, Hk, Hv, K, V, state_sequence, state_head, scale, l2_eps, places, active, stream, true);
}
