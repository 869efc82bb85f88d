// One token of SSD, in place (oryx/ops/cuda/state_step.cuh).
#include "oryx/ops/ssd/cuda/ssd_step.h"

#include <algorithm>
#include <type_traits>

#include "oryx/ops/cuda/state_step.cuh"

namespace {

struct Ssd {
  static constexpr bool kChannels = false;
  static constexpr bool kPredicts = false;
  const float *dt_raw, *dt_bias, *A_log, *D;
  int64_t heads;
  __device__ oryx::ops::cuda::StepScalars scalars(int64_t n, int head, float) const {
    const float x = __ldcg(dt_raw + n * heads + head) + __ldg(dt_bias + head);
    const float dt = x > 0.0f ? x + log1pf(expf(-x)) : log1pf(expf(x));
    return {expf(-dt * expf(__ldg(A_log + head))), dt, 1.0f, 0.0f, __ldg(D + head)};
  }
  __device__ float query_scale(float) const { return 1.0f; }
};

int any_step(const void* q, const void* k, const void* v, const float* dt_raw, const float* dt_bias, const float* A_log, const float* D, float* state, void* o,
             int dtype, int64_t N, int64_t Hq, int64_t Hk, int64_t Hv, int64_t K, int64_t V, int64_t state_sequence, int64_t state_head, const int32_t* places, const int32_t* active, void* stream,
             bool chained) {
  const int64_t Hs = std::max(Hk, Hv);
  const oryx::ops::cuda::StateStep step{q, k, v, state, o, N, Hq, Hk, Hv, Hs, std::max(Hq, Hs), K, V, state_sequence, state_head, places, active};
  return oryx::ops::cuda::launch_state_step(step, Ssd{dt_raw, dt_bias, A_log, D, Hs}, dtype, static_cast<cudaStream_t>(stream), chained);
}

}  // namespace

extern "C" int oryx_ssd_step(const void* q, const void* k, const void* v, const float* dt_raw, const float* dt_bias, const float* A_log, const float* D,
                             float* state, void* o, int dtype, int64_t N, int64_t Hq, int64_t Hk, int64_t Hv, int64_t K, int64_t V, int64_t state_sequence,
                             int64_t state_head, void* stream) {
  return any_step(q, k, v, dt_raw, dt_bias, A_log, D, state, o, dtype, N, Hq, Hk, Hv, K, V, state_sequence, state_head, nullptr, nullptr, stream, false);
}
extern "C" int oryx_ssd_step_chained(const void* q, const void* k, const void* v, const float* dt_raw, const float* dt_bias, const float* A_log, const float* D,
                                     float* state, void* o, int dtype, int64_t N, int64_t Hq, int64_t Hk, int64_t Hv, int64_t K, int64_t V,
                                     int64_t state_sequence, int64_t state_head, const int32_t* places, const int32_t* active, void* stream) {
  return any_step(q, k, v, dt_raw, dt_bias, A_log, D, state, o, dtype, N, Hq, Hk, Hv, K, V, state_sequence, state_head, places, active, stream, true);
}
