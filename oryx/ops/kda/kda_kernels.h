// Kimi Delta Attention on the CPU in float32: pointers and strides, no torch. One call works on one sequence and one state head; calls for
// different sequences or heads write different memory and may run side by side.
#pragma once

#include <cstddef>
#include <cstdint>

#include "oryx/ops/gated_delta/gated_delta_kernels.h"

namespace oryx::ops::kimi {

// As those of the gated delta rule, but for g and its gradient: [B * T, Hs, K].
using gated_delta::KernelArgs;
using gated_delta::KernelGradients;
using gated_delta::KernelSequence;

size_t scratch_floats(const KernelArgs& a, bool backward);
void forward_head(const KernelArgs& a, const KernelSequence& s, int64_t head, float* scratch);
// Reads what forward_head saved (chunk_states, residual); o and final_state are not used.
void backward_head(const KernelArgs& a, const KernelGradients& d, const KernelSequence& s, int64_t head, float* scratch);

struct StepArgs {
  int64_t K, V, Hq, Hk, Hv, Hs, groups;  // groups = Ho / Hs
  float scale, l2_eps;
  const float *q, *k, *v, *g, *beta;  // dense [N, Hq, K], [N, Hk, K], [N, Hv, V], [N, Hs, K], [N, Hs]
  float* state;                       // [V, K] dense, at n * state_sequence + h * state_head
  int64_t state_sequence, state_head;
  float* o;  // [N, Ho, V]
};

size_t step_scratch_floats(const StepArgs& a);
void step_head(const StepArgs& a, int64_t n, int64_t head, float* scratch);

}  // namespace oryx::ops::kimi
