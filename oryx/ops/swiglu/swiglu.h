// SwiGLU (Shazeer 2020, arXiv 2002.05202): y = silu(gate) * up.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::ops {

// gate, up [..., F], one dtype; returns [..., F]. Differentiable in both. The backward recomputes silu: nothing but the
// two inputs is kept.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_naive(const at::Tensor& gate, const at::Tensor& up);

}  // namespace oryx::ops
