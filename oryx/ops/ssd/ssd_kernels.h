// CPU kernels of the SSD recurrence in float32, on plain pointers and strides (in floats; the last dimension is
// contiguous).
//
// One task is one state head of one sequence: it walks the chunks of the sequence with the state in its own memory, so
// that the result does not depend on how tasks are spread over threads. ssd_chunked.cc has the formulas.
#pragma once

#include <cstddef>
#include <cstdint>

namespace oryx::ops {

inline constexpr size_t kSsdChunk = 64;

// Rows of [tokens, heads, dim].
template <typename T>
struct SsdRows {
  T* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
  T* at(size_t token, size_t head) const {
    return data + static_cast<int64_t>(token) * token_stride + static_cast<int64_t>(head) * head_stride;
  }
};

// One state head of one sequence, with the output heads that read it.
struct SsdTask {
  size_t length, K, V;
  size_t readers;  // output heads of this state head; reader r has query head q_head + r
  size_t q_head;
  size_t k_head, v_head, head;           // head: of dt_raw and of the state
  SsdRows<const float> q, k, v, dt_raw;  // token 0 of the sequence
  float dt_bias, A, D;                   // A = -exp(A_log)
  const uint8_t* wanted;                 // [length], or null: the readout is wanted everywhere
  const float* initial_state;            // [V, K], or null: zeros
};

// Floats of scratch that a task of these sizes needs.
size_t ssd_forward_scratch(size_t K, size_t V);
size_t ssd_backward_scratch(size_t length, size_t K, size_t V);

// o: token 0, the first reader's head; only wanted tokens are written. final_state [V, K]. Scratch is aligned to 64
// bytes.
void ssd_forward_kernel(const SsdTask& task, const SsdRows<float>& o, float* final_state, float* scratch);

struct SsdTaskGradients {
  SsdRows<const float> d_o;       // as o
  const float* d_final_state;     // [V, K], or null: zero
  SsdRows<float> d_q;             // as o, dim K, one for each output head; only wanted tokens are written
  SsdRows<float> d_k, d_v, d_dt;  // token 0 of this state head's own rows
  float* d_initial_state;         // [V, K]
  double* d_head;                 // [3], added to: gradients of dt_bias, A, D
};

void ssd_backward_kernel(const SsdTask& task, const SsdTaskGradients& grad, float* scratch);

// One token: q, k, v rows as in the task (length 1); state [V, K] contiguous, updated; o as above.
void ssd_step_kernel(const SsdTask& task, float* state, const SsdRows<float>& o);

}  // namespace oryx::ops
