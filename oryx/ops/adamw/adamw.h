// AdamW with decoupled decay (Loshchilov & Hutter 2019, arXiv 1711.05101), in torch's order of operations:
//
//   p *= 1 - lr * weight_decay;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//   p -= lr * (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)          n = step, counted from 1
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace oryx::ops {

struct AdamwOptions {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

// One fused pass over parameter p, gradient g, moments m and v, in place (float32 contiguous; float64 by ATen).
// `grad_scale` multiplies the gradient first (clipping).
void adamw_step(at::Tensor p, const at::Tensor& g, at::Tensor m, at::Tensor v, int64_t step,
                const AdamwOptions& options, double grad_scale = 1);

// The same for many tensors in one parallel loop, so that small ones cost little. Four lists of one length; a parameter
// whose gradient is undefined is passed over (its moments stand still).
void adamw_step_all(const std::vector<at::Tensor>& p, const std::vector<at::Tensor>& g,
                    const std::vector<at::Tensor>& m, const std::vector<at::Tensor>& v, int64_t step,
                    const AdamwOptions& options, double grad_scale = 1);

// A whole step decided on the device, so that the host need not wait for it: the global norm of the gradients, clipping to `clip` (0: none), and no update at
// all where the norm or the loss is not finite. CUDA tensors only.
struct AdamwUpdate {
  std::vector<at::Tensor> p, m, v;  // float32
  std::vector<at::Tensor> g;        // float32 or bfloat16
  std::vector<at::Tensor> weight;   // bfloat16 copies of p that are written along, undefined where there is none
  std::vector<bool> decays;
};
// control: float64 [kAdamwControl], zeros before the first step. After the call it holds loss, norm, 1 where the step was taken else 0, and the number of
// steps taken (which is read: bias correction), and what is the kernels' own. options.lr below 0: the rate is control[kAdamwRate], so that a captured graph
// takes another one at each replay.
constexpr int64_t kAdamwControl = 10, kAdamwRate = 4;
// squares: float64, one value, the sum of squares of all gradients where the lists are but a part of them; undefined: of the lists' own.
// decided: control is that of an earlier call, for other lists of the same step.
void adamw_update(const AdamwUpdate& lists, at::Tensor control, const at::Tensor& loss, const AdamwOptions& options, double clip, const at::Tensor& squares = {}, bool decided = false);
// The sum of squares of gradients, float64 [], on their device. No gradients: undefined.
at::Tensor sum_of_squares(const std::vector<at::Tensor>& gradients);

// sqrt of the sum of all squares, accumulated in double in an order that does not depend on the number of threads.
// Undefined gradients are passed over.
double global_norm(const std::vector<at::Tensor>& gradients);

}  // namespace oryx::ops
