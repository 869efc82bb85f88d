// Softmax attention by blocks of queries in plain ATen: any floating dtype, memory linear in the number of tokens,
// hand-written backward. It serves float64 (gradient checks); float32 and bfloat16 have the vector kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <utility>

#include "oryx/ops/span_attention/span_attention_plan.h"

namespace oryx::ops {

// o [B, Tq, Hq, V], and the logarithm (natural) of the softmax denominators [B, Tq, Hq].
std::pair<at::Tensor, at::Tensor> span_attention_blockwise(const at::Tensor& q, const at::Tensor& k,
                                                           const at::Tensor& v, const AttentionPlan& plan);

// dq, dk, dv
std::array<at::Tensor, 3> span_attention_blockwise_backward(const at::Tensor& q, const at::Tensor& k,
                                                            const at::Tensor& v, const at::Tensor& o,
                                                            const at::Tensor& lse, const at::Tensor& d_o,
                                                            const AttentionPlan& plan);

}  // namespace oryx::ops
