// Softmax attention on the CPU for float32 and bfloat16 (float32 inside): the kernels of span_attention_kernels.h over
// all threads. The result does not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <utility>

#include "oryx/ops/span_attention/span_attention_plan.h"

namespace oryx::ops {

// o [B, Tq, Hq, V], and with want_lse log2 of the softmax denominators [B, Tq, Hq] float32 (else undefined). k and v
// may have any strides.
std::pair<at::Tensor, at::Tensor> span_attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     const AttentionPlan& plan, bool want_lse);

// dq, dk, dv in the dtype of q.
std::array<at::Tensor, 3> span_attention_cpu_backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                      const at::Tensor& o, const at::Tensor& lse, const at::Tensor& d_o,
                                                      const AttentionPlan& plan);

}  // namespace oryx::ops
