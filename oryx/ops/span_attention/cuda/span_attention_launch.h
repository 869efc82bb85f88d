// Launchers of the Hopper kernels of span_attention (../span_attention.h): bfloat16, K = V = 64 or 128. No torch header.
//
// Work is planned on the device from spans and bounds (span_attention_plan.cu), then run:
//
//   slots     every sequence's computed queries, side by side, each sequence from a multiple of 64; `rows` has a slot's row of q
//   forward   tiles of 128 slots over blocks of 128 keys (span_attention_forward.cu)
//   backward  blocks of 128 keys over tiles of 64 slots (span_attention_backward.cu)
//
// No launcher waits for the device. Out-of-range spans are clipped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// Keys beside the last ones, of each sequence [N, keys, Hk, D]: bfloat16 as k and v, finite. keys 0: none.
struct OryxFarKeys {
  const void *k, *v;
  int64_t k_stride[3], v_stride[3];
  int32_t keys;
};

struct OryxSpanAttention {
  const void *q, *k, *v;             // bfloat16; the strides below, in elements; heads' elements dense
  const void *o_in, *d_o;            // backward: [B, Tq, Hq, D] dense
  void* o;                           // [B, Tq, Hq, D] dense: every row is written
  float* lse;                        // [Hq, slots]: logarithms (base 2) of the denominators; may be null in the forward pass
  void *dq, *dk, *dv;                // dense; dq every row; dk, dv the rows of sequences' keys
  const int32_t *spans, *cu_q, *cu_k, *key_lengths;  // as in the contract, or null
  int64_t q_stride[3], k_stride[3], v_stride[3];     // of batch row, token, head
  int32_t B, Tq, Tk, Hq, Hk, D;
  int32_t n_spans, N;                // N sequences: B without cu_q
  int32_t window;                    // 0: unlimited
  int32_t processors;                // multiprocessors of the device
  float scale;                       // > 0
  // The forward pass alone: a sequence's first keys, of which the query at position t sees s when s <= t - far_window and (reach == 0 or s > t - reach), and keys between,
  // of which it sees i when seen[n][i][0] <= t < seen[n][i][1]. k and v are then a sequence's last keys.
  OryxFarKeys first, between;
  const int32_t* positions;  // [B, Tq], of the queries in their sequences, consecutive; with first keys or keys between
  const int32_t* seen;       // [N, between.keys up to a multiple of 128, 2]; 16-byte aligned
  int32_t far_window, reach;
};

extern "C" {
int64_t oryx_span_attention_slots(const OryxSpanAttention* p);
// Bytes of the plan, which forward and backward share, and of each pass's scratch memory. 16-byte aligned, contents arbitrary.
size_t oryx_span_attention_plan_bytes(const OryxSpanAttention* p);
size_t oryx_span_attention_forward_bytes(const OryxSpanAttention* p);
size_t oryx_span_attention_backward_bytes(const OryxSpanAttention* p);
// A cudaError_t each.
int oryx_span_attention_plan(const OryxSpanAttention* p, void* plan, cudaStream_t stream);
int oryx_span_attention_forward(const OryxSpanAttention* p, void* plan, void* scratch, cudaStream_t stream);
int oryx_span_attention_backward(const OryxSpanAttention* p, void* plan, void* scratch, cudaStream_t stream);
}
