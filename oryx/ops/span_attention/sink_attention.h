// Attention over a sequence's first keys ("attention sinks": arXiv 2309.17453) and the last ones: what a bounded cache can give.
//
//   o_t = sum_{s visible to t} softmax_s(scale * q_t . k_s) v_s         s visible:  s <= t  and  (s < first or s > t - window)
//
// and with reach > 0 also s > t - reach. Keys between may be seen too, each by the queries of an interval.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::ops {

// Keys that are neither the first nor the last: query t sees key i of its sequence when from_i <= t < until_i.
struct KeysBetween {
  at::Tensor k, v;                    // [N, C, Hk, K or V], finite
  at::Tensor positions, from, until;  // [N, C] int32, on the CPU or where k is
};

// As span_attention's arguments, where not said otherwise. No gradients.
struct SinkAttention {
  at::Tensor q = {};               // [B, Tq, Hq, K]
  at::Tensor k = {}, v = {};            // [B, Tk, Hk, K or V]: the last keys of each sequence, at least window - 1 before its first query, or all there are
  at::Tensor sink_k = {}, sink_v = {};  // [N, first, Hk, K or V]: sequence n's tokens 0 to first - 1; finite, whatever stands behind its own
  at::Tensor positions = {};       // [B, Tq] int32: of the queries in their sequences, consecutive in each
  std::optional<KeysBetween> between = {};
  std::optional<at::Tensor> spans = {}, cu_seqlens = {}, cu_seqlens_k = {}, key_lengths = {};
  int64_t window = 1;  // at least 1
  int64_t reach = 0;   // 0: no end
  std::optional<double> scale = {};
};

// -> o [B, Tq, Hq, V]; zero outside of spans. On Hopper in bfloat16 with K = V = 64 or 128 one kernel, which reads nothing back to the host; elsewhere
// softmaxes over the window (span_attention), over the first keys and over those between, joined by their denominators.
at::Tensor sink_attention(const SinkAttention& a);

}  // namespace oryx::ops
