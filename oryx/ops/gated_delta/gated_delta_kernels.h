// The gated delta rule on the CPU in float32: pointers and strides, no torch. One call works on one sequence and one
// state head; calls for different sequences or heads write different memory and may run side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace oryx::ops::gated_delta {

// x[b, t, h, :] = data[b * batch + t * token + h * head + ...], the last axis dense.
struct TokenHeads {
  const float* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

struct KernelArgs {
  int64_t T, K, V, Hq, Hk, Hv, Hs, groups;  // groups = Ho / Hs
  float scale, l2_eps;
  TokenHeads q, k, v;
  const float *g, *beta;       // [B * T, Hs]; g of Kimi Delta Attention [B * T, Hs, K]
  const float* initial_state;  // [N, Hs, V, K] or null: zeros
  const uint8_t* wanted;       // [B * T] or null: everywhere
  float *o, *final_state;      // [B * T, Ho, V], [N, Hs, V, K]
  float* chunk_states;         // [chunks, Hs, K, V]: the transposed state before each chunk; null when not to be saved
  float* residual;             // [B * T, Hs, V]: v - a S k; null likewise
};

struct KernelGradients {
  const float *d_o, *d_final;  // [B * T, Ho, V], [N, Hs, V, K]
  float *q, *k, *v;            // [B * T, Ho, K], [B * T, Hs, K], [B * T, Hs, V]: not yet summed over heads that share
  float *g, *beta;             // as of KernelArgs
  float* state;                // [N, Hs, V, K]
};

// Tokens [begin, end) of the flattened token axis are sequence `index`, whose first chunk is `first_chunk`.
struct KernelSequence {
  int64_t index, begin, end, first_chunk;
};

size_t scratch_floats(const KernelArgs& a, bool backward);
void forward_head(const KernelArgs& a, const KernelSequence& s, int64_t head, float* scratch);
// Reads what forward_head saved (chunk_states, residual); o and final_state are not used.
void backward_head(const KernelArgs& a, const KernelGradients& d, const KernelSequence& s, int64_t head,
                   float* scratch);

// The three as one choice, for what runs them over sequences and heads (gated_delta_cpu.cc).
struct HeadKernels {
  size_t (*scratch_floats)(const KernelArgs&, bool backward);
  void (*forward)(const KernelArgs&, const KernelSequence&, int64_t head, float* scratch);
  void (*backward)(const KernelArgs&, const KernelGradients&, const KernelSequence&, int64_t head, float* scratch);
};

struct StepArgs {
  int64_t K, V, Hq, Hk, Hv, Hs, groups;
  float scale, l2_eps;
  const float *q, *k, *v, *g, *beta;  // dense [N, Hq, K], [N, Hk, K], [N, Hv, V], [N, Hs], [N, Hs]
  float* state;                       // [V, K] dense, at n * state_sequence + h * state_head
  int64_t state_sequence, state_head;
  float* o;  // [N, Ho, V]
};

// scratch: (groups + 1) * (K + 32) floats.
void step_head(const StepArgs& a, int64_t n, int64_t head, float* scratch);

// For tests: the instruction sets that are compiled in and that this machine has (Highway's numbers), and the choice of
// one (0: the best). The choice holds for all kernels of the process.
std::vector<int64_t> instruction_sets();
void choose_instruction_set(int64_t target);

}  // namespace oryx::ops::gated_delta
